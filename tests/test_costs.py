"""The table of docs/CHOOSING.md is what its command prints, and its counts are the formulas'."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from openvision3.config import ModelConfig, TransformerConfig
from openvision3.model.flops import forward_flops, stack_flops, vae_flops

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def costs() -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("costs")
    finally:
        sys.path.pop(0)


def test_the_document_has_the_table_that_the_command_prints(costs: Any) -> None:
    rows = list(costs.costs())
    printed = costs.table(rows)
    assert printed in (ROOT / "docs" / "CHOOSING.md").read_text(), f"put this into docs/CHOOSING.md:\n{printed}"
    found = {(row.name, row.size): row for row in rows}
    tower = found["CLIP B/16", 224]
    by_hand = 2 * 196 * 768 * 768 + stack_flops(TransformerConfig(768, 12, 12), 197) + 2 * 768 * 512
    assert tower.flops == pytest.approx(by_hand, rel=1e-3)
    ours = found["OpenVision 3 B, FLUX.1's VAE", 256]
    assert ours.flops == pytest.approx(forward_flops(ModelConfig(), 256)["encoder"], rel=1e-3)
    assert 34e6 < ours.vae_parameters < 35e6


def test_the_flops_of_a_diffusers_vae_can_be_counted(costs: Any) -> None:
    """A convolution's count by hand: the first of FLUX.1's, 3 -> 128 channels at full size, is part of it."""
    vae = costs.flux_shell()
    counts = vae_flops(vae, 64)
    assert counts["vae_decoder"] > counts["vae_encoder"] > 2 * 64 * 64 * 9 * 3 * 128
    larger = vae_flops(vae, 128)
    assert larger["vae_encoder"] / counts["vae_encoder"] == pytest.approx(4, rel=0.05)  # but for the attention
    assert next(vae.parameters()).device == torch.device("meta")
