"""Exact statistics of tokens, however the data is cut, and the normalisation by them."""

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from openvision3.config import OpenVisionError
from openvision3.generation.statistics import Normalizer, TokenStatistics


@pytest.fixture
def tokens() -> torch.Tensor:
    """Token grids with large means, small and large deviations, and a constant element."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(101, 6, 5, generator=generator) * torch.logspace(-2, 2, 5) + torch.linspace(-100, 100, 5)
    values[:, 3, 2] = 7.0
    return values


def gather(tokens: torch.Tensor, batch: int) -> TokenStatistics:
    statistics = TokenStatistics()
    for part in tokens.split(batch):
        statistics.update(part)
    return statistics


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_statistics_are_numpys_however_the_data_is_cut(tokens, parts, batch):
    total = TokenStatistics()
    total.merge(TokenStatistics())
    for part in tokens.tensor_split(parts):
        total.merge(gather(part, batch))
    total.merge(TokenStatistics())
    exact = tokens.double().numpy()
    assert total.count == 101
    np.testing.assert_allclose(total.mean.numpy(), exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(total.std.numpy(), exact.std(0), rtol=1e-9, atol=1e-12)


def test_merging_changes_only_the_first(tokens):
    one, two = gather(tokens[:40], 8), gather(tokens[40:], 8)
    before = {name: value.clone() for name, value in two.state().items()}
    empty = TokenStatistics()
    empty.merge(two)
    empty.merge(one)
    empty.update(tokens)
    for name, value in two.state().items():
        assert torch.equal(value, before[name])


def test_state_goes_through_safetensors_and_continues(tokens):
    kept = TokenStatistics.from_state(load(save(gather(tokens[:50], 8).state())))
    kept.update(tokens[50:])
    assert kept.count == 101
    torch.testing.assert_close(kept.std, tokens.double().std(0, correction=0), rtol=1e-9, atol=1e-12)


def test_statistics_refuse_what_they_cannot_hold(tokens):
    statistics = TokenStatistics()
    with pytest.raises(OpenVisionError, match="no tokens were seen"):
        _ = statistics.mean
    with pytest.raises(OpenVisionError, match="no tokens were seen"):
        statistics.state()
    statistics.update(tokens[:0])
    assert statistics.count == 0
    statistics.update(tokens)
    for bad, message in (
        (tokens[:, :5], "of one size"),
        (tokens[0], r"expected tokens \(B, N, D\)"),
        (torch.where(torch.arange(5) == 1, torch.nan, tokens), "not finite"),
        (torch.where(torch.arange(5) == 1, torch.inf, tokens[:1]), "not finite"),
    ):
        with pytest.raises(OpenVisionError, match=message):
            statistics.update(bad)
    assert statistics.count == 101
    good = statistics.state()
    mean = good["mean"]
    for state in ({}, good | {"more": mean}, good | {"squares": mean[:2]}, good | {"count": mean}):
        with pytest.raises(OpenVisionError):
            TokenStatistics.from_state(state)


def test_normalised_tokens_have_unit_variance_and_come_back(tokens):
    normalizer = Normalizer.of(gather(tokens, 16))
    normalized = normalizer.normalize(tokens)
    assert normalized.dtype == torch.float32
    assert normalized.mean(0).abs().max() < 1e-3
    spread = normalized.std(0, correction=0)
    constant = torch.zeros(6, 5, dtype=torch.bool)
    constant[3, 2] = True
    torch.testing.assert_close(spread[~constant], torch.ones(29), rtol=1e-3, atol=0)
    assert spread[constant].item() == 0 and normalized.isfinite().all()
    torch.testing.assert_close(normalizer.denormalize(normalized), tokens, rtol=1e-5, atol=1e-5)
    assert normalizer.normalize(tokens.bfloat16()).dtype == torch.float32
    with pytest.raises(OpenVisionError, match="statistics are of"):
        normalizer.normalize(tokens[:, :5])


def test_normalizer_is_saved_as_its_buffers(tokens):
    normalizer = Normalizer.of(gather(tokens, 16))
    fresh = Normalizer(torch.zeros(6, 5), torch.ones(6, 5))
    fresh.load_state_dict(load(save(normalizer.state_dict())))
    assert torch.equal(fresh.normalize(tokens), normalizer.normalize(tokens))
    assert normalizer.std.min().item() == pytest.approx(1e-5)
    with pytest.raises(OpenVisionError, match="two equal"):
        Normalizer(torch.zeros(6, 5), torch.ones(5))
