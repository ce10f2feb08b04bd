"""The contrastive losses in one process: against numbers worked out by hand and against the whole matrix of logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openvision3 import contrastive
from openvision3.contrastive import contrastive_loss, sigmoid_loss


def features(samples: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(samples)
    image, text = torch.randn(2, samples, 16, generator=generator, dtype=dtype)
    image, text = F.normalize(image, dim=1), F.normalize(text + image / 2, dim=1)
    return image.requires_grad_(), text.requires_grad_()


def whole_softmax(image: Tensor, text: Tensor, temperature: Tensor) -> Tensor:
    logits, labels = temperature * image @ text.T, torch.arange(len(image))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def whole_sigmoid(image: Tensor, text: Tensor, temperature: Tensor, bias: Tensor) -> Tensor:
    signs = 2 * torch.eye(len(image), dtype=image.dtype) - 1
    return -F.logsigmoid(signs * (temperature * image @ text.T + bias)).sum() / len(image)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def test_softmax_by_hand():
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    text = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    rows = [math.log(math.e**2 + math.e**1.2) - 2, math.log(1 + math.e**1.6) - 1.6]
    columns = [math.log(math.e**2 + 1) - 2, math.log(math.e**1.2 + math.e**1.6) - 1.6]
    assert contrastive_loss(image, text, 2.0).item() == pytest.approx((sum(rows) + sum(columns)) / 4, abs=1e-6)


def test_sigmoid_by_hand():
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    text = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    probabilities = [1 / (1 + math.exp(-x)) for x in (2 - 1, -(1.2 - 1), -(0 - 1), 1.6 - 1)]
    expected = -sum(math.log(p) for p in probabilities) / 2
    assert sigmoid_loss(image, text, 2.0, -1.0).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("block", [2**21, 3 * 23, 1])
def test_blocks_are_the_whole_matrix(block: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(contrastive, "BLOCK", block)
    image, text = features(23)
    temperature, bias = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (30.0, -8.0))
    common = image, text, temperature
    for found, expected, inputs in (
        (contrastive_loss(*common), whole_softmax(*common), common),
        (sigmoid_loss(*common, bias), whole_sigmoid(*common, bias), (*common, bias)),
    ):
        assert relative_error(found, expected) < 1e-12
        pairs = zip(torch.autograd.grad(3 * found, inputs), torch.autograd.grad(3 * expected, inputs), strict=True)
        assert max(relative_error(*pair) for pair in pairs) < 1e-12


def test_fp32_is_near_fp64():
    image, text = features(64)
    short_image, short_text = (x.detach().float().requires_grad_() for x in (image, text))
    full, short = torch.tensor(100.0, dtype=torch.float64), torch.tensor(100.0)
    for found, expected in (
        (contrastive_loss(short_image, short_text, short), contrastive_loss(image, text, full)),
        (sigmoid_loss(short_image, short_text, short, -10.0), sigmoid_loss(image, text, full, -10.0)),
    ):
        assert found.dtype == torch.float32 and relative_error(found.double(), expected) < 1e-6
        found_gradient, gradient = torch.autograd.grad(found, short_image)[0], torch.autograd.grad(expected, image)[0]
        assert relative_error(found_gradient.double(), gradient) < 1e-5


def test_autocast_rounds_nothing():
    image, text = features(8, torch.float32)

    def run() -> list[Tensor]:
        losses = contrastive_loss(image, text, 100.0), sigmoid_loss(image, text, 100.0, -10.0)
        return [*losses, *torch.autograd.grad(torch.stack(losses).sum(), (image, text))]

    expected = run()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))
