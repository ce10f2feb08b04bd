"""Packed texts against padded ones: features, losses and gradients, with and without rounding up."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from openvision3.config import OpenVisionError, TextDecoderConfig, TextEncoderConfig, TransformerConfig
from openvision3.model.packing import Packing, up_to_last
from openvision3.model.text import CaptionDecoder, TextEmbedding, TextEncoder
from openvision3.training.parallel import compile_blocks

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


@pytest.mark.parametrize("image_input", ["cross", "prefix"])
def test_a_pad_id_inside_a_caption(image_input: str) -> None:
    torch.manual_seed(0)
    tower = CaptionDecoder(replace(TextDecoderConfig(SIZE, 10, 8), image_input=image_input), 12, "auto").double()
    captions = torch.tensor([[1, 5, 0, 0, 4, 2, 0, 0], [1, 0, 9, 2, 0, 0, 0, 0]])
    tokens, inputs, targets = torch.randn(2, 4, 12).double(), captions[:, :-1], captions[:, 1:]
    used = up_to_last(targets != 0)
    assert used.int().tolist() == [[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0]]
    check(
        tower,
        lambda: tower.loss(tokens, inputs, targets, 7),
        lambda: tower.loss(tokens, inputs, targets, 7, Packing.of(used)),
    )


def test_texts_that_are_too_long() -> None:
    embedding, ids = TextEmbedding(10, 8, 16), torch.ones(2, 9, dtype=torch.long)
    with pytest.raises(OpenVisionError, match="^text of 9 tokens exceeds the context length 8$"):
        embedding.packed(ids, Packing.of(ids != 0))


@pytest.mark.parametrize("how", ["plain", "checkpoint_blocks", "compiled"])
@pytest.mark.parametrize("image_input", ["cross", "prefix"])
def test_gradients_reach_the_picture(image_input: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = replace(TextDecoderConfig(SIZE, 10, 8), image_input=image_input)
    tower, texts = CaptionDecoder(config, 12, "auto").double(), TextEncoder(TextEncoderConfig(SIZE, 10, 8), 12, "auto")
    texts.double()
    picture = torch.nn.Parameter(torch.randn(3, 4, 12).double())
    inputs, targets = CAPTIONS[:, :-1], CAPTIONS[:, 1:]

    def loss(packing: Packing | None, of_texts: Packing | None) -> Tensor:
        compared = (texts(IDS, of_texts) * picture.mean(dim=1)).sum()
        return tower.loss(picture, inputs, targets, 7, packing) + compared

    parts = torch.nn.ModuleList([tower, texts])
    parameters = [picture, *parts.parameters()]
    expected = torch.autograd.grad(loss(None, None), parameters)
    if how == "compiled":
        compile_ = torch.compile
        monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend="eager"))
        compile_blocks(parts)
    elif how == "checkpoint_blocks":
        tower.transformer.checkpoint_blocks = texts.transformer.checkpoint_blocks = True
    for multiple in (1, 5):
        packings = Packing.of(targets != 0, multiple), Packing.of(IDS != 0, multiple)
        for a, b in zip(torch.autograd.grad(loss(*packings), parameters), expected, strict=True):
            torch.testing.assert_close(a, b)


def check(tower: torch.nn.Module, plain: Callable[[], Tensor], packed: Callable[[], Tensor]) -> None:
    expected, found = plain(), packed()
    torch.testing.assert_close(found, expected)
    parameters = list(tower.parameters())
    for a, b in zip(*(torch.autograd.grad(x, parameters) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)
