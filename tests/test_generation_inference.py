"""The form for sampling: the same velocities as the generator's own, from weights converted once."""

from dataclasses import replace

import pytest
import torch
from test_generation_dit import TEXT, TINY, as_double, build, inputs, texts

from openvision3.generation.condition import Condition
from openvision3.generation.config import GeneratorConfig
from openvision3.generation.inference import FrozenLinear, evaluator, frozen


def condition_of(config: GeneratorConfig) -> Condition:
    return texts() if config.condition == "text" else Condition(labels=torch.tensor([0, 1, 5]))


@pytest.mark.parametrize("config", [TINY, TEXT, replace(TINY, qk_norm=False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_velocities_are_the_same(config: GeneratorConfig, dtype: torch.dtype) -> None:
    model, (x, t), condition = build(config), inputs(config), condition_of(config)
    if dtype == torch.float64:
        model, x, t = model.double(), x.double(), t.double()
        condition = as_double(condition) if config is TEXT else condition
    plain = model(x, t, condition)
    found = evaluator(model)(x, t, condition)
    assert found.dtype == plain.dtype
    # 16 * 8 / 3 and 24 * 8 / 3 are no multiples of 32: both stacks are padded
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("config", [TINY, TEXT])
@torch.no_grad()
def test_bf16_is_as_near_as_autocast(config: GeneratorConfig) -> None:
    model, (x, t), condition = build(config), inputs(config), condition_of(config)
    plain = model(x, t, condition)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        usual = model(x, t, condition).float()
        velocity = evaluator(model)
    found = velocity(x, t, condition).float()
    assert 0 < (found - plain).norm() < 1.5 * (usual - plain).norm()
    cosine = torch.nn.functional.cosine_similarity(found, plain, dim=-1)
    assert cosine.min() > 0.998


def test_the_generator_stays_as_it_is() -> None:
    model = build(TINY)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copied = frozen(model)
    assert not any(isinstance(module, FrozenLinear) for module in model.modules()) and model.training
    norms = [dict(each.named_parameters())["backbone.0.norm_1.weight"] for each in (copied, model)]
    assert not copied.training and norms[0] is norms[1]
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
