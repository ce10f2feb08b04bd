"""Packed texts against padded ones: features, losses and gradients, with and without rounding up."""

from dataclasses import replace

import pytest
import torch

from openvision3.config import TextDecoderConfig, TextEncoderConfig, TransformerConfig
from openvision3.model.packing import Packing
from openvision3.model.text import CaptionDecoder, TextEncoder

SIZE = TransformerConfig(16, 2, 2)
IDS = torch.tensor([[1, 5, 2, 0, 0, 0, 0, 3], [1, 7, 8, 9, 2, 0, 0, 3], [1, 2, 0, 0, 0, 0, 0, 3]])
CAPTIONS = torch.tensor([[1, 5, 2, 0, 0, 0, 0], [1, 7, 8, 9, 2, 0, 0], [1, 2, 0, 0, 0, 0, 0]])


def test_positions() -> None:
    packing = Packing.of(IDS != 0)
    assert packing.take(IDS).tolist() == [1, 5, 2, 3, 1, 7, 8, 9, 2, 3, 1, 2, 3]
    assert packing.columns.tolist() == [0, 1, 2, 7, 0, 1, 2, 3, 4, 7, 0, 1, 7]
    assert packing.used.shape == (3, 6)  # columns 5 and 6 are padding in each
    x = torch.randn(13, 4)
    unpacked = packing.unpack(x)
    assert torch.equal(packing.pack(unpacked), x)
    assert torch.equal(unpacked[0, 5], x[3]) and not unpacked[0, 4].any()


@pytest.mark.parametrize("multiple", [1, 4, 64])
def test_rounded_up(multiple: int) -> None:
    packing = Packing.of(IDS != 0, multiple)
    rows, columns = len(packing.index), packing.used.shape[1]
    assert rows == min(-(-13 // multiple) * multiple, 3 * columns)
    assert columns == min(-(-6 // multiple) * multiple, 8)
    assert len(set(packing.index.tolist())) == rows
    assert torch.equal(packing.take(IDS), IDS.flatten()[packing.source])


@pytest.mark.parametrize("multiple", [1, 5, 64])
def test_text_encoder(multiple: int) -> None:
    torch.manual_seed(0)
    tower = TextEncoder(TextEncoderConfig(SIZE, 10, 8), 12, "auto").double()
    check(tower, lambda: tower(IDS).square().sum(), lambda: tower(IDS, Packing.of(IDS != 0, multiple)).square().sum())


@pytest.mark.parametrize("image_input", ["cross", "prefix"])
@pytest.mark.parametrize("multiple", [1, 5, 64])
def test_caption_decoder(image_input: str, multiple: int) -> None:
    torch.manual_seed(0)
    config = replace(TextDecoderConfig(SIZE, 10, 8), image_input=image_input, image_positions=1.0)
    tower = CaptionDecoder(config, 12, "auto").double()
    tokens, (inputs, targets) = torch.randn(3, 4, 12).double(), (CAPTIONS[:, :-1], CAPTIONS[:, 1:])
    packing = Packing.of(targets != 0, multiple)
    check(
        tower,
        lambda: tower.loss(tokens, inputs, targets, 7),
        lambda: tower.loss(tokens, inputs, targets, 7, packing),
    )


def check(tower: torch.nn.Module, plain, packed) -> None:
    expected, found = plain(), packed()
    torch.testing.assert_close(found, expected)
    parameters = list(tower.parameters())
    for a, b in zip(*(torch.autograd.grad(x, parameters) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)
