"""What tests share, and the note on those that the default run leaves out."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

LEFT_OUT = {"slow": "make test-slow", "hf": "make test-hf", "browser": "make test-browser", "lmms": "make test-lmms"}
_deselected: Counter[str] = Counter()


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        _deselected.update(marker for marker in LEFT_OUT if item.get_closest_marker(marker))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (output := getattr(session.config, "workeroutput", None)) is not None:  # of one of several processes
        output["deselected"] = dict(_deselected)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    global _deselected
    _deselected |= Counter(getattr(node, "workeroutput", {}).get("deselected", {}))  # each has seen them all


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for marker, command in LEFT_OUT.items():
        if _deselected[marker]:
            terminalreporter.write_line(f"left out: {_deselected[marker]} tests marked {marker!r} ({command})")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with every part, of random weights and the demo's tokenizer: 64 px, 16 px a token, width 32."""
    import torch

    from openvision3.config import (
        ModelConfig,
        TextDecoderConfig,
        TextEncoderConfig,
        TinyVAEConfig,
        TransformerConfig,
        VAEConfig,
    )
    from openvision3.data.tokenizer import demo_tokenizer
    from openvision3.model.openvision3 import OpenVision3
    from openvision3.vae import TinyVAE

    torch.manual_seed(0)
    size, tokenizer = TransformerConfig(32, 1, 2), demo_tokenizer()
    vae = TinyVAE(VAEConfig(licence="MIT"), TinyVAEConfig((8, 8, 8), (1, 1, 1), (8, 8, 8), (1, 1, 1)))
    config = ModelConfig(
        name="tiny",
        image_size=64,
        embed_dim=16,
        encoder=size,
        decoder=size,
        text_encoder=TextEncoderConfig(size, tokenizer.vocab_size, context_length=16),
        text_decoder=TextDecoderConfig(size, tokenizer.vocab_size, context_length=8),
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    OpenVision3(config, vae.freeze(), tokenizer).save(folder)  # type: ignore[arg-type]
    return folder
