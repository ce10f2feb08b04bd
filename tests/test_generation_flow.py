"""Path, times, solvers on an exactly known flow, guidance, and what a head must be wide enough for."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from openvision3.config import OpenVisionError
from openvision3.generation.config import GeneratorConfig, StackConfig
from openvision3.generation.dit import Condition, DiT
from openvision3.generation.flow import (
    Guidance,
    guided,
    integrate,
    path,
    shift,
    time_grid,
    token_shift,
    training_times,
    velocity_loss,
)


def test_literal_shifts():
    assert token_shift(256, 768) == pytest.approx(6.9282, abs=1e-4)
    assert token_shift(256, 1024) == 8.0
    assert token_shift(64, 64) == 1.0
    expected = [0.0, 0.25, 0.5, 0.75, 0.9, 1.0]
    torch.testing.assert_close(shift(torch.tensor([0.0, 0.1, 0.25, 0.5, 0.75, 1.0]), 3.0), torch.tensor(expected))
    for s in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(OpenVisionError, match="must be positive"):
            shift(torch.tensor(0.5), s)


@pytest.mark.parametrize("s", [1.0, 6.9282032302755, 8.0, 0.3])
def test_time_grid_ends_exactly(s):
    grid = time_grid(50, s)
    assert grid.dtype == torch.float64 and grid.shape == (51,)
    assert grid[0].item() == 1.0 and grid[-1].item() == 0.0
    assert (grid[1:] < grid[:-1]).all()
    assert grid[25].item() == pytest.approx(s / (1 + s))
    with pytest.raises(OpenVisionError, match="at least 1 step"):
        time_grid(0, s)


def test_drawn_times_are_shifted_logit_normal():
    times = training_times(torch.randn(20_000, generator=torch.Generator().manual_seed(0)), 8.0)
    assert times.dtype == torch.float32 and times.shape == (20_000,) and times.min() > 0 and times.max() < 1
    logits = torch.logit(times.double()) - math.log(8)  # a shift adds log s to the logit
    assert abs(logits.mean()) < 0.03 and abs(logits.std() - 1) < 0.03


def test_path_and_loss():
    x, noise, t = torch.randn(3, 4, 2), torch.randn(3, 4, 2), torch.tensor([0.0, 0.25, 1.0])
    noisy, velocity = path(x, noise, t)
    torch.testing.assert_close(noisy[0], x[0])
    torch.testing.assert_close(noisy[1], 0.75 * x[1] + 0.25 * noise[1])
    torch.testing.assert_close(noisy[2], noise[2])
    torch.testing.assert_close(velocity, noise - x)
    condition, seen = Condition(labels=torch.arange(3)), []

    def model(noisy: Tensor, times: Tensor, given: Condition) -> Tensor:
        seen.append((noisy, times, given))
        return (noise - x + torch.tensor([0.0, 1.0, 2.0])[:, None, None]).bfloat16()

    loss = velocity_loss(model, x, noise, t, condition)
    assert loss.shape == (3,) and loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor([0.0, 1.0, 4.0]), atol=0.05, rtol=0)
    assert torch.equal(seen[0][0], noisy) and torch.equal(seen[0][1], t) and seen[0][2] is condition


def test_losses_of_parts_sum_to_the_whole_batchs():
    def model(noisy: Tensor, times: Tensor, given: Condition) -> Tensor:
        return noisy * times[:, None, None]

    x, noise, t = torch.randn(7, 4, 2), torch.randn(7, 4, 2), torch.rand(7)
    condition = Condition(labels=torch.arange(7))
    whole = velocity_loss(model, x, noise, t, condition)
    parts = [velocity_loss(model, x[p], noise[p], t[p], condition.rows(p)) for p in (slice(0, 5), slice(5, 7))]
    torch.testing.assert_close(sum(part.sum() for part in parts) / 7, whole.mean())


class Mixture:
    """Gaussians in `dim` dimensions, whose velocity along the path to noise is known exactly, in fp64."""

    def __init__(self, dim: int = 3) -> None:
        generator = torch.Generator().manual_seed(0)
        self.means = torch.randn(4, dim, generator=generator, dtype=torch.float64)
        self.weights = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
        self.deviations = torch.tensor([0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
        self.times: list[float] = []

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """E[eps - x | x_t]: within a component all is Gaussian; components weigh as likely as they are."""
        self.times.append(t[0].item())
        time, keep = t[:, None, None].double(), 1 - t[:, None, None].double()
        variance = self.deviations[:, None] ** 2
        spread = keep**2 * variance + time**2  # (B, K, 1)
        offset = x[:, None] - keep * self.means
        squares = (offset**2).sum(-1) / spread[..., 0]
        weights = (self.weights.log() - 0.5 * (squares + x.shape[1] * spread[..., 0].log())).softmax(-1)
        of_each = (time - keep * variance) / spread * offset - self.means
        return (weights[..., None] * of_each).sum(1)


@pytest.fixture(scope="module")
def reference() -> tuple[Tensor, Tensor]:
    """Noise, and the ends of its trajectories after 4,096 steps of second order."""
    noise = torch.randn(64, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return noise, integrate(Mixture().velocity, noise, time_grid(4096, 1.0), "heun")


def test_reference_has_the_mixtures_moments():
    mixture = Mixture()
    noise = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    samples = integrate(mixture.velocity, noise, time_grid(40, 1.0), "heun")
    mean = (mixture.weights[:, None] * mixture.means).sum(0)
    second = (mixture.weights[:, None] * (mixture.means**2 + mixture.deviations[:, None] ** 2)).sum(0)
    torch.testing.assert_close(samples.mean(0), mean, atol=0.03, rtol=0)
    torch.testing.assert_close(samples.var(0), second - mean**2, atol=0.05, rtol=0)


@pytest.mark.parametrize(("solver", "order", "tolerance"), [("euler", 1, 0.1), ("heun", 2, 0.2)])
@pytest.mark.parametrize("s", [1.0, 3.0])
def test_order_of_the_solvers(reference, solver, order, tolerance, s):
    noise, exact = reference
    counts = [64, 128, 256, 512]
    errors = [
        (integrate(Mixture().velocity, noise, time_grid(n, s), solver) - exact).norm(dim=1).mean().item()
        for n in counts
    ]
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(-order, abs=tolerance)


@pytest.mark.parametrize(("solver", "times"), [("euler", [1, 0.5]), ("heun", [1, 0.5, 0.5, 0])])
def test_solvers_end_at_zero(solver, times):
    mixture = Mixture()
    integrate(mixture.velocity, torch.randn(2, 3, dtype=torch.float64), time_grid(2, 1.0), solver)
    assert mixture.times == times


def test_state_is_fp32_at_least_and_gradients_are_off():
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (2,) and t.dtype == x.dtype == torch.float32
        return weight.bfloat16() * torch.ones_like(x, dtype=torch.bfloat16)

    weight = torch.tensor(1.0, requires_grad=True)
    end = integrate(velocity, torch.zeros(2, 3, dtype=torch.bfloat16), time_grid(1000, 1.0))
    assert end.dtype == torch.float32 and not end.requires_grad
    torch.testing.assert_close(end, -torch.ones(2, 3))  # 1,000 steps of 0.001 are lost in bf16
    with pytest.raises(OpenVisionError, match="euler or heun"):
        integrate(velocity, torch.zeros(2, 3), time_grid(2, 1.0), "rk4")  # type: ignore[arg-type]


CONFIG = GeneratorConfig(
    token_width=4, grid=(2, 2), backbone=StackConfig(16, 1, 2), head=StackConfig(16, 1, 2), num_classes=5
)
TEXT = replace(CONFIG, condition="text", text_width=6, text_embed_dim=8, text_length=3)


def network(config: GeneratorConfig, seed: int) -> tuple[DiT, list[int]]:
    """A generator of random weights, and the sizes of the batches that it will be given."""
    torch.manual_seed(seed)
    model, sizes = DiT(config).requires_grad_(False), []
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    return model, sizes


@pytest.mark.parametrize("config", [CONFIG, TEXT])
def test_classifier_free_guidance_is_two_passes_in_one(config):
    model, sizes = network(config, 0)
    x, t = torch.randn(3, 4, 4), torch.full((3,), 0.4)
    condition = Condition(labels=torch.tensor([0, 1, 2]))
    if config is TEXT:
        mask = torch.tensor([[True, False, False], [True, True, True], [False, False, False]])
        condition = Condition(pooled=torch.randn(3, 8), tokens=torch.randn(3, 3, 6), mask=mask)
    good, null = model(x, t, condition), model(x, t, condition.as_null())
    sizes.clear()
    velocity = guided(model, condition, Guidance(1.75))
    torch.testing.assert_close(velocity(x, t), null + 1.75 * (good - null), rtol=1e-4, atol=1e-5)
    assert sizes == [6]
    assert torch.equal(guided(model, condition, Guidance())(x, t), good)
    assert sizes == [6, 3]


def test_autoguidance_pushes_away_from_the_weak_model():
    model, _ = network(CONFIG, 0)
    weak, sizes = network(CONFIG, 1)
    x, t, condition = torch.randn(3, 4, 4), torch.full((3,), 0.4), Condition(labels=torch.tensor([0, 1, 2]))
    good, bad = model(x, t, condition), weak(x, t, condition)
    velocity = guided(model, condition, Guidance(1.42, kind="auto"), weak)
    torch.testing.assert_close(velocity(x, t), bad + 1.42 * (good - bad))
    sizes.clear()
    late = guided(model, condition, Guidance(1.42, (0.5, 1.0), "auto"), weak)
    assert torch.equal(late(x, t), good) and sizes == []
    with pytest.raises(OpenVisionError, match="weak model"):
        guided(model, condition, Guidance(1.42, kind="auto"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_interval_holds_both_ends(dtype):
    guidance = Guidance(2.0, (0.3, 0.7))
    step = 1e-6
    for time, inside in ((0.3, True), (0.7, True), (0.5, True), (0.3 - step, False), (0.7 + step, False), (0.0, False)):
        assert guidance.active(torch.full((2,), time, dtype=dtype)) is inside
    assert all(Guidance(2.0).active(torch.tensor([time])) for time in (0.0, 1.0))
    assert not Guidance(1.0).active(torch.tensor([0.5]))


def test_guidance_refuses_impossible_values():
    kind = "none"
    for make in (
        lambda: Guidance(interval=(0.7, 0.3)),
        lambda: Guidance(interval=(-0.1, 0.3)),
        lambda: Guidance(math.nan),
        lambda: Guidance(kind=kind),  # type: ignore[arg-type]
    ):
        with pytest.raises(OpenVisionError):
            make()


def overfit(head_width: int, steps: int = 150) -> float:
    """The loss of the last steps on one token grid of width 16."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    config = GeneratorConfig(
        token_width=16,
        grid=(2, 2),
        backbone=StackConfig(32, 1, 2),
        head=StackConfig(head_width, 1, 2),
        num_classes=1,
        allow_narrow_head=True,
    )
    model, batch = DiT(config), 64
    tokens = torch.randn(1, 4, 16, generator=generator).expand(batch, -1, -1)
    condition = Condition(labels=torch.zeros(batch, dtype=torch.int64))
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for _ in range(steps):
        noise = torch.randn(tokens.shape, generator=generator)
        times = training_times(torch.randn(batch, generator=generator), 1.0)
        loss = velocity_loss(model, tokens, noise, times, condition).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


def test_one_picture_is_learnt_only_by_a_head_as_wide_as_the_tokens():
    """RAE, figure 3: the head's output spans as many dimensions as it is wide, and noise spans all of the tokens'."""
    assert overfit(16) < 0.35
    assert overfit(8) > 0.5  # half of the noise is out of its reach


def test_guided_sampling_reaches_the_learnt_picture() -> None:
    """A model that knows the velocity to one picture ends there by every solver, guided or not."""
    target, null = torch.randn(2, 4, 4), torch.randn(4, 4)

    def model(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert condition.labels is not None
        ends = torch.where(condition.is_null[:, None, None], null, target[condition.labels])
        return (x - ends) / t[:, None, None]  # x_t = (1 - t) x + t eps

    condition = Condition(labels=torch.tensor([1, 0]))
    velocity: Callable[[Tensor, Tensor], Tensor] = guided(model, condition, Guidance(1.5))
    end = integrate(velocity, torch.randn(2, 4, 4), time_grid(10, 2.0))
    torch.testing.assert_close(end, null + 1.5 * (target[[1, 0]] - null))
