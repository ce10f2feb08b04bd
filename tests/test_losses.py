"""Eqs. 3-6 against numbers worked out by hand, and micro-batches against the whole batch."""

import math

import pytest
import torch
import torch.nn.functional as F

from openvision3 import chunked, losses


def test_noise_is_scaled_per_image_and_by_the_rms():
    tokens, epsilon = torch.ones(2, 1, 2), torch.tensor([[[1.0, -1.0]], [[2.0, 0.0]]])
    noisy = losses.add_noise(tokens, torch.tensor([0.0, 0.5]), epsilon, torch.tensor(2.0))
    assert noisy.tolist() == [[[1.0, 1.0]], [[3.0, 1.0]]]


def test_noise_unit_has_no_gradient():
    tokens = torch.randn(2, 3, 4, requires_grad=True)
    rms = tokens.square().mean().sqrt()
    noisy = losses.add_noise(tokens, torch.ones(2), torch.randn(2, 3, 4), rms)
    (gradient,) = torch.autograd.grad(noisy.sum(), tokens)
    assert torch.equal(gradient, torch.ones_like(tokens))
    torch.testing.assert_close(losses.mean_square(torch.tensor([3.0, 4.0, 0.0, 0.0])), torch.tensor(6.25))


def test_l1_is_a_mean_over_pictures():
    images, predicted = torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)
    predicted[0] = 0.5
    predicted[1, 0] = -3.0
    assert losses.pixel_l1(predicted, images, samples=2).item() == pytest.approx((0.5 + 1.0) / 2)
    assert losses.latent_l1(predicted, images, samples=4).item() == pytest.approx((0.5 + 1.0) / 4)


def test_perceptual_loss_divides_by_the_given_count():
    metric = lambda a, b: (a - b).abs().amax(dim=(1, 2, 3))  # noqa: E731
    a, b = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1), torch.zeros(2, 1, 1, 1)
    assert losses.perceptual_loss(metric, a, b, samples=8).item() == 0.5


def test_weighted_sums():
    assert losses.reconstruction_loss(torch.tensor(2.5), torch.tensor(2.0), beta=0.4).item() == pytest.approx(3.3)
    assert losses.understanding_loss(torch.tensor(2.0), torch.tensor(3.0), alpha=0.5).item() == pytest.approx(3.5)
    assert losses.total_loss(torch.tensor(2.0), torch.tensor(3.0), 0.5, 1.0).item() == pytest.approx(4.0)


def test_caption_loss_ignores_padding_and_nothing_else():
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 1] = math.log(3.0)  # probability 1/2
    targets = torch.tensor([[1, 2, 0]])
    expected = (math.log(2) + math.log(4)) / 5
    assert losses.caption_loss(logits, torch.eye(4), targets, pad_id=0, normalizer=5).item() == pytest.approx(expected)
    with_id_0 = expected + math.log(4) / 5
    assert losses.caption_loss(logits, torch.eye(4), targets, pad_id=3, normalizer=5).item() == pytest.approx(with_id_0)


@pytest.mark.parametrize("rows", [128, 4, 1])
def test_caption_loss_in_blocks_is_that_of_all_logits(rows: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chunked, "CPU_ROWS", rows)
    torch.manual_seed(0)
    hidden = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    output = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 9, (3, 5))
    targets[:, 3:] = 2  # padding
    whole = F.cross_entropy((hidden @ output.T).flatten(0, 1), targets.flatten(), ignore_index=2, reduction="sum") / 7
    found = losses.caption_loss(hidden, output, targets, 2, 7)
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=0)
    gradients = torch.autograd.grad(whole, (hidden, output))
    twice = torch.autograd.grad(2 * found, (hidden, output))
    torch.testing.assert_close(twice, tuple(2 * gradient for gradient in gradients), rtol=1e-12, atol=1e-15)
    frozen = losses.caption_loss(hidden.detach(), output, targets, 2, 7)
    torch.testing.assert_close(torch.autograd.grad(frozen, output)[0], gradients[1], rtol=1e-12, atol=1e-15)


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="needs PyTorch 2.13")
def test_caption_loss_is_that_of_pytorch():
    torch.manual_seed(0)
    hidden, output = torch.randn(64, 16, requires_grad=True), torch.randn(300, 16, requires_grad=True)
    targets = torch.randint(0, 20, (64,))
    theirs = F.linear_cross_entropy(
        hidden, output, targets, ignore_index=0, reduction="sum", options=torch.nn.LinearCrossEntropyOptions()
    )
    ours = losses.caption_loss(hidden, output, targets, 0, 1)
    assert abs(ours.item() / theirs.item() - 1) < 1e-6
    for mine, other in zip(*(torch.autograd.grad(x, (hidden, output)) for x in (ours, theirs)), strict=True):
        assert (mine - other).norm() / other.norm() < 1e-6


def test_caption_loss_under_autocast():
    torch.manual_seed(0)
    hidden, output = torch.randn(400, 16, requires_grad=True), torch.randn(300, 16, requires_grad=True)
    targets = torch.randint(0, 20, (400,))
    exact = losses.caption_loss(hidden, output, targets, 0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        rough = losses.caption_loss(hidden, output, targets, 0, 1)
    assert rough.dtype == torch.float32 and 0 < abs(rough.item() / exact.item() - 1) < 1e-3
    for mine, right in zip(*(torch.autograd.grad(x, (hidden, output)) for x in (rough, exact)), strict=True):
        assert mine.dtype == torch.float32 and (mine - right).norm() / right.norm() < 1e-2


def test_micro_batches_add_up_to_the_whole_batch():
    torch.manual_seed(0)
    images, logits = torch.randn(6, 3, 4, 4), torch.randn(6, 5, 7)
    targets = torch.randint(1, 7, (6, 5))
    targets[0, 1:] = targets[3, 2:] = 0  # captions of different lengths
    count = int((targets != 0).sum())
    predicted = torch.randn(6, 3, 4, 4, requires_grad=True)
    whole = losses.pixel_l1(predicted, images, 6)
    parts = torch.stack([losses.pixel_l1(predicted[i : i + 2], images[i : i + 2], 6) for i in (0, 2, 4)]).sum()
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, predicted), torch.autograd.grad(whole, predicted))
    whole = losses.caption_loss(logits, torch.eye(7), targets, 0, count)
    shares = [losses.caption_loss(logits[i : i + 2], torch.eye(7), targets[i : i + 2], 0, count) for i in (0, 2, 4)]
    parts = torch.stack(shares).sum()
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(whole, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=0))
