"""LPIPS, with its real weights."""

from pathlib import Path
from typing import Literal

import lpips
import pytest
import torch

from openvision3.config import OpenVisionError
from openvision3.evaluation.perceptual import Perceptual, load_lpips

NETS: tuple[Literal["alex", "vgg"], ...] = ("alex", "vgg")


@pytest.fixture(scope="module")
def metrics() -> dict[str, Perceptual]:
    return {net: load_lpips(net) for net in NETS}


def pictures(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """Smooth random pictures in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)


@pytest.mark.parametrize("net", NETS)
def test_heads_are_those_of_the_package(metrics: dict[str, Perceptual], net: str) -> None:
    """The package ships its heads: an independent witness that the fetched weights are LPIPS v0.1."""
    path = Path(lpips.__file__).parent / f"weights/v0.1/{net}.pth"
    heads = torch.load(path, map_location="cpu", weights_only=True)
    state = metrics[net].network.state_dict()
    assert len(heads) == 5
    for name, head in heads.items():
        assert torch.equal(state[name], head)


def test_trunks_are_torchvisions(metrics: dict[str, Perceptual]) -> None:
    """The first weights of AlexNet and VGG16 (IMAGENET1K_V1), as torchvision publishes them."""
    alex, vgg = (metrics[net].network.net.slice1[0].weight for net in NETS)
    torch.testing.assert_close(alex[0, 0, 0, :3], torch.tensor([0.1186, 0.0941, 0.0954]), rtol=0, atol=6e-5)
    torch.testing.assert_close(vgg[0, 0, 0], torch.tensor([-0.5537, 0.1427, 0.5290]), rtol=0, atol=6e-5)


@pytest.mark.parametrize(
    ("net", "expected"), [("alex", [0.2556, 3.181e-05, 0.2302]), ("vgg", [0.6502, 0.0001558, 0.6353])]
)
def test_distances_equal_the_packages_own(metrics: dict[str, Perceptual], net: str, expected: list[float]) -> None:
    metric, a, b = metrics[net], pictures(3, 64), pictures(3, 64, seed=1)
    b[1] = a[1] + 0.01 * b[1]
    distances = metric(a, b)
    assert distances.shape == (3,) and distances.dtype == torch.float32
    torch.testing.assert_close(distances, metric.network(a, b).flatten(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(distances, torch.tensor(expected), rtol=1e-3, atol=1e-6)
    assert metric(a, a).tolist() == [0, 0, 0]
    torch.testing.assert_close(metric(b, a), distances)


def test_frozen_and_always_in_evaluation_mode(metrics: dict[str, Perceptual]) -> None:
    metric = metrics["alex"]
    expected = metric(pictures(1, 64), pictures(1, 64, seed=1))
    metric.train()
    torch.nn.Sequential(metric).train()
    assert not any(module.training for module in metric.modules())
    assert not any(parameter.requires_grad for parameter in metric.parameters())
    assert torch.equal(metric(pictures(1, 64), pictures(1, 64, seed=1)), expected)


def test_a_step_against_the_gradient_brings_pictures_closer(metrics: dict[str, Perceptual]) -> None:
    metric, target = metrics["alex"], pictures(2, 64)
    images = pictures(2, 64, seed=1).requires_grad_()
    before = metric(images, target)
    (gradient,) = torch.autograd.grad(before.sum(), images)
    after = metric(images - gradient / gradient.abs().max() * 0.02, target)
    assert (after < before).all()


def test_gradient_is_finite_where_all_features_are_zero(metrics: dict[str, Perceptual]) -> None:
    """The norm's square root has an infinite gradient there, which must not come through as NaN."""
    metric = metrics["alex"]
    first = metric.network.net.slice1[0]
    bias = first.bias.detach().clone()
    images = pictures(1, 64).requires_grad_()
    try:
        with torch.no_grad():
            first.bias.fill_(-1e6)  # every feature of the first layer is below zero, so that ReLU gives zeros
        metric(images, pictures(1, 64, seed=1)).sum().backward()
    finally:
        with torch.no_grad():
            first.bias.copy_(bias)
    assert images.grad is not None and torch.isfinite(images.grad).all()


def test_compares_in_fp32_under_autocast(metrics: dict[str, Perceptual]) -> None:
    """Close pictures' features differ by less than bf16 resolves: compared in bf16 the distance would be far off."""
    metric, a = metrics["alex"], pictures(2, 64)
    b = a + 0.01 * pictures(2, 64, seed=1)
    expected = metric(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        distances = metric(a, b)
    assert distances.dtype == torch.float32
    torch.testing.assert_close(distances, expected, rtol=0.3, atol=0)


@pytest.mark.parametrize(("net", "smallest"), [("alex", 31), ("vgg", 16)])
def test_small_pictures(metrics: dict[str, Perceptual], net: str, smallest: int) -> None:
    metric = metrics[net]
    distance = metric(pictures(1, smallest), pictures(1, smallest, seed=1))
    assert torch.isfinite(distance).all() and distance > 0
    with pytest.raises(OpenVisionError, match=f"at least {smallest} px"):
        metric(pictures(1, smallest - 1), pictures(1, smallest - 1))


def test_wrong_use(metrics: dict[str, Perceptual]) -> None:
    for a, b in [((1, 3, 64, 64), (2, 3, 64, 64)), ((1, 1, 64, 64), (1, 1, 64, 64)), ((3, 64, 64), (3, 64, 64))]:
        with pytest.raises(OpenVisionError, match="batches of shape"):
            metrics["alex"](torch.zeros(a), torch.zeros(b))
    with pytest.raises(OpenVisionError, match="no network 'squeeze'"):
        load_lpips("squeeze")  # pyright: ignore[reportArgumentType]


def test_loading_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    load_lpips("alex")
    assert torch.equal(state, torch.get_rng_state())
