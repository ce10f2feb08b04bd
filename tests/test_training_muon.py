"""Muon beside AdamW: the directions it takes, which parameters it steps, and that a stopped run goes on exactly."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import make_vae, tiny_config, tiny_model

from openvision3.config import OptimizerConfig
from openvision3.model.openvision3 import OpenVision3
from openvision3.training.loop import train
from openvision3.training.muon import MuonWithAdamW, orthogonalise
from openvision3.training.optimizer import build_optimizer, set_learning_rate
from openvision3.training.run_folder import RunInterrupted

MUON = OptimizerConfig(kind="muon", weight_decay=0.05)


@pytest.mark.parametrize("shape", [(2, 24, 24), (1, 12, 48), (3, 48, 12)])
def test_directions_have_singular_values_near_one(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    directions = orthogonalise(matrices).float()
    values = torch.linalg.svdvals(directions)
    # singular values near zero take more iterations than five: the square ones may have one or two
    assert values.median() > 0.6 and values.max() < 1.3, values
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    nearest = u @ v
    cosine = (directions * nearest).sum((1, 2)) / directions.norm(dim=(1, 2)) / nearest.norm(dim=(1, 2))
    assert (cosine > 0.95).all(), cosine


def test_stacked_maps_are_orthogonalised_one_by_one() -> None:
    """Queries, keys and values of very different gradients all move by the same amount."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(3 * 16, 16))
    weight.grad = torch.randn(3, 16, 16).mul(torch.tensor([1.0, 1e-3, 1e3])[:, None, None]).flatten(0, 1)
    optimizer = MuonWithAdamW([{"params": [weight], "matrices": True, "parts": 3}], (0.9, 0.95), 1e-8)
    set_learning_rate(optimizer, 1e-2)
    optimizer.step()
    moved = weight.detach().unflatten(0, (3, 16)).square().mean((1, 2)).sqrt()
    torch.testing.assert_close(moved, torch.full((3,), 0.2e-2), rtol=0.2, atol=0)  # 0.2 * lr, AdamW's typical step


def test_muon_steps_block_matrices_and_adamw_equals_torch_on_the_rest(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = OpenVision3(tiny_model(make_vae(tmp_path)))
    optimizer = build_optimizer(model, MUON)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    in_blocks = {names[id(p)] for g in optimizer.param_groups if g["matrices"] for p in g["params"]}
    ends = ("qkv.weight", "query.weight", "key_value.weight", "out.weight", "up.weight", "down.weight")
    assert in_blocks == {name for name in names.values() if "blocks" in name and name.endswith(ends)}
    assert sorted(names[id(p)] for g in optimizer.param_groups for p in g["params"]) == sorted(names.values())

    weight = torch.nn.Parameter(torch.randn(5, 3))
    twin = torch.nn.Parameter(weight.detach().clone())
    ours = MuonWithAdamW([{"params": [weight], "weight_decay": 0.1}], (0.9, 0.95), 1e-8)
    theirs = torch.optim.AdamW([twin], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for optimizer in (ours, theirs):
        set_learning_rate(optimizer, 1e-2)
    for _ in range(3):
        weight.grad = torch.randn(5, 3)
        twin.grad = weight.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(weight, twin)


def test_a_stopped_run_goes_on_exactly(tmp_path: Path) -> None:
    vae = make_vae(tmp_path / "vae")
    whole = train(replace(tiny_config(tmp_path / "whole", vae), optimizer=MUON), "cpu")

    def stop(model: OpenVision3, step: int) -> dict[str, float]:
        raise KeyboardInterrupt

    config = replace(tiny_config(tmp_path / "stopped", vae), optimizer=MUON, checkpoint_every=4, eval_every=8)
    with pytest.raises((KeyboardInterrupt, RunInterrupted)):
        train(config, "cpu", stop)
    stopped = train(config, "cpu")
    weights, wanted = (load_file(run / "model" / "model.safetensors") for run in (stopped, whole))
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
