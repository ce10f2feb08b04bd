"""Which parameters decay, and the learning rate in samples seen."""

import math

import pytest
import torch
from torch import nn

from openvision3.config import OpenVisionError, StageConfig, TrainConfig
from openvision3.training.optimizer import adamw, clip_gradients, parameter_groups, set_learning_rate, warmup_cosine
from openvision3.training.stages import plan, validate


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 2)
        self.norm = nn.LayerNorm(4)
        self.in_proj_weight = nn.Parameter(torch.ones(12, 4))
        self.words = nn.Embedding(7, 4)
        self.output = nn.Linear(4, 7, bias=False)
        self.output.weight = self.words.weight
        self.class_embedding = nn.Parameter(torch.ones(1, 4))
        self.positions = nn.Parameter(torch.ones(5, 4))
        self.proj = nn.Parameter(torch.ones(4, 2))
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.vae = nn.Linear(4, 4).requires_grad_(False)


def test_decay_falls_on_matrices_only() -> None:
    model = Small()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, undecayed = parameter_groups(model, 0.2)
    assert decayed["weight_decay"] == 0.2 and undecayed["weight_decay"] == 0.0
    assert [names[id(p)] for p in decayed["params"]] == ["in_proj_weight", "proj", "conv1.weight"]
    assert {names[id(p)] for p in undecayed["params"]} == {
        "class_embedding",
        "positions",
        "logit_scale",
        "conv1.bias",
        "norm.weight",
        "norm.bias",
        "words.weight",
    }


def test_decay_is_scaled_by_the_learning_rate() -> None:
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.fill_(2.0)
    optimizer = adamw(model, 0.9, 0.95, 1e-8, 0.2)
    set_learning_rate(optimizer, 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert model.weight.item() == pytest.approx(2.0 * (1 - 0.1 * 0.2))
    assert model.bias.item() == 2.0


def test_warmup_then_cosine_to_zero() -> None:
    rates = [warmup_cosine(seen, 100, 1100) for seen in (0, 50, 100, 350, 600, 1100, 1200)]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.5 + math.sqrt(0.125), 0.5, 0.0, 0.0])
    assert warmup_cosine(0, 0, 10) == 1.0


def test_clipping_returns_the_norm_before() -> None:
    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert clip_gradients(model, 0.0).item() == 5.0
    assert torch.equal(model.weight.grad, torch.tensor([[3.0, 4.0]]))
    assert clip_gradients(model, 1.0).item() == 5.0
    assert torch.allclose(model.weight.grad, torch.tensor([[0.6, 0.8]]))


STAGE1 = StageConfig(32, samples=100, warmup_samples=20, batch_size=8, base_lr=3.2e-3)
STAGE2 = StageConfig(64, samples=30, warmup_samples=0, batch_size=16, base_lr=1.6e-4, lpips_weight=0.5)


def test_plan_counts_steps_and_samples() -> None:
    first, second = plan(TrainConfig("x", stage1=STAGE1, stage2=STAGE2))
    assert (first.steps, first.last_step, first.last_sample) == (13, 13, 104)  # whole batches, at least `samples`
    assert (second.number, second.first_step, second.last_step, second.last_sample) == (2, 13, 15, 136)
    assert STAGE1.peak_lr == pytest.approx(1e-4)
    assert first.learning_rate(1) == pytest.approx(1e-4 * 4 / 20)
    assert second.learning_rate(14) == pytest.approx(1e-5 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert [step for step in range(1, 14) if first.due(step, 20)] == [3, 5, 8, 10, 13]
    assert [step for step in range(1, 14) if first.due(step, 0)] == [13]
    (only,) = plan(TrainConfig("x", stage2=STAGE2))
    assert (only.number, only.first_step) == (2, 0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TrainConfig("x"), "nothing to train"),
        (TrainConfig("x", stage1=StageConfig(100, samples=10, batch_size=2)), "stage1.resolution is 100"),
        (TrainConfig("x", stage1=StageConfig(32, samples=10, warmup_samples=10, batch_size=2)), "warmup_samples is 10"),
        (TrainConfig("x", stage2=StageConfig(16, samples=10, batch_size=2, lpips_weight=0.5)), "at least 31"),
        (TrainConfig("x", stage1=STAGE1, log_every=0), "log_every is 0"),
    ],
)
def test_impossible_recipes_are_refused(config: TrainConfig, message: str) -> None:
    with pytest.raises(OpenVisionError, match=message):
        validate(config)
