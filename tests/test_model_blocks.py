"""Positions, attention paths, masks and stacks of blocks."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from openvision3.config import OpenVisionError, TransformerConfig
from openvision3.model import blocks
from openvision3.model.blocks import SIZES, Block, Transformer, attend, resize_positions, sincos_positions
from openvision3.model.text import causal_mask

SMALL = TransformerConfig(16, 3, 2)


def test_sincos_positions_against_a_literal_table():
    table = sincos_positions((2, 2), 8)
    s, c, t, d = math.sin(1), math.cos(1), math.sin(1e-4), math.cos(1e-4)
    expected = [
        [0, 0, 1, 1, 0, 0, 1, 1],
        [s, t, c, d, 0, 0, 1, 1],  # one column to the right: x comes first
        [0, 0, 1, 1, s, t, c, d],  # one row down
        [s, t, c, d, s, t, c, d],
    ]
    torch.testing.assert_close(table, torch.tensor(expected), atol=1e-7, rtol=0)


def test_sincos_positions_against_big_vision_in_float64():
    height, columns, width = 3, 5, 64
    y, x = np.mgrid[:height, :columns]
    omega = 1.0 / (10000.0 ** (np.arange(width // 4) / (width // 4 - 1)))
    y, x = np.einsum("m,d->md", y.flatten(), omega), np.einsum("m,d->md", x.flatten(), omega)
    expected = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
    np.testing.assert_allclose(sincos_positions((height, columns), width).numpy(), expected, atol=2e-6)


def test_resized_positions_keep_rows_and_columns_apart():
    rows = torch.arange(4.0)[:, None].expand(4, 4)
    table = torch.stack([rows.flatten(), rows.T.flatten()], dim=1)
    resized = resize_positions(table, (4, 4), (8, 4)).view(8, 4, 2)
    assert (resized[1:, :, 0] > resized[:-1, :, 0]).all()
    torch.testing.assert_close(resized[..., 1], torch.arange(4.0).expand(8, 4))
    torch.testing.assert_close(resize_positions(table, (4, 4), (4, 4)), table)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_paths_agree_in_value_and_gradient(masked):
    torch.manual_seed(0)
    mask = torch.rand(2, 1, 5, 7) < 0.7
    mask[..., 0] = True
    outcomes = []
    for path in ("matmul", "sdpa"):
        torch.manual_seed(1)
        query, key, value = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 7, 7))
        out = attend(query, key, value, mask if masked else None, path)
        grads = torch.autograd.grad(out.square().sum(), (query, key, value))
        outcomes.append((out, *grads))
    for ours, fused in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, fused, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("masked", ["no", "rows", "all", "causal"])
def test_blocks_of_scores_change_nothing(masked, monkeypatch):
    torch.manual_seed(0)
    mask = torch.rand(1 if masked == "all" else 5, 1, 6, 7) < 0.7
    mask[..., 0] = True
    if masked == "causal":
        mask = torch.ones(6, 7, dtype=torch.bool).tril()
    inputs = [torch.randn(5, 3, n, 8, requires_grad=True) for n in (6, 7, 7)]
    outcomes = []
    for size in (2**20, 2 * 3 * 6 * 7, 1):  # the whole batch, two rows at a time, one
        monkeypatch.setattr(blocks, "_CPU_SCORES", size)
        query, key, value = inputs
        out = attend(query, key, value, None if masked == "no" else mask, "matmul")
        outcomes.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    assert len({type(out.grad_fn) for out, *_ in outcomes}) == 2  # a product; a concatenation
    for whole, *parts in zip(*outcomes, strict=True):
        for part in parts:
            torch.testing.assert_close(part, whole, atol=1e-6, rtol=1e-6)


def test_masked_positions_have_no_weight():
    query, key = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 3, 4)
    value = torch.tensor([[[[1.0], [2.0], [1000.0]]]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    for path in ("matmul", "sdpa"):
        out = attend(query, key, value.expand(1, 1, 3, 4), mask, path)
        assert out[0, 0, 0].max() < 2
        torch.testing.assert_close(out[0, 0, 1], torch.ones(4))


def test_self_attention_against_torch():
    torch.manual_seed(0)
    ours = Block(SMALL, "matmul").attention
    theirs = nn.MultiheadAttention(16, 2, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.out.weight,
            "out_proj.bias": ours.out.bias,
        }
    )
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0], atol=1e-6, rtol=1e-5)


def test_causal_mask_literal():
    expected = [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]
    assert causal_mask(3, 2, torch.device("cpu")).int().tolist() == expected


@pytest.mark.parametrize("kind", ["none", "keys", "causal"])
def test_skipping_queries_of_the_last_block_changes_nothing(kind):
    torch.manual_seed(0)
    stack, x = Transformer(SMALL, "matmul"), torch.randn(2, 6, 16)
    keys = torch.tensor([[1, 1, 1, 0, 0, 1], [1, 1, 1, 1, 1, 1]]).bool()[:, None, None]
    mask = {"none": None, "keys": keys, "causal": causal_mask(6, 0, x.device)}[kind]
    torch.testing.assert_close(stack(x, mask, first_query=4), stack(x, mask)[:, 4:])


def test_checkpointing_recomputes_and_gives_the_same_gradients():
    torch.manual_seed(0)
    stack, x = Transformer(SMALL, context_width=8), torch.randn(2, 5, 16)
    context = torch.randn(2, 3, 8, requires_grad=True)
    calls, outcomes = [], []
    stack.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for enabled in (False, True):
        stack.checkpoint_blocks = enabled
        calls.clear()
        loss = stack(x, context=context).square().sum()
        outcomes.append(torch.autograd.grad(loss, [context, *stack.parameters()]))
        assert len(calls) == (2 if enabled else 1)
    for plain, recomputed in zip(*outcomes, strict=True):
        torch.testing.assert_close(plain, recomputed, atol=0, rtol=0)


def test_bf16_autocast_stays_near_fp32():
    torch.manual_seed(0)
    stack, x = Transformer(TransformerConfig(64, 4, 2)), torch.randn(2, 17, 64)
    full = stack(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = stack(x)
    assert half.dtype == torch.float32  # the residual stream is not rounded
    assert (half - full).abs().max() / full.std() < 0.05


def test_family_sizes():
    heads = {name: size.width // size.num_heads for name, size in SIZES.items()}
    assert heads == {"Ti": 64, "S": 64, "B": 64, "L": 64, "So400m": 72, "H": 80}
    assert {name: size.depth for name, size in SIZES.items()} == {
        "Ti": 12,
        "S": 12,
        "B": 12,
        "L": 24,
        "So400m": 27,
        "H": 32,
    }
    assert SIZES["So400m"].mlp_width == 4304


@pytest.mark.parametrize(
    "size", [TransformerConfig(30, 1, 2), TransformerConfig(32, 1, 3), TransformerConfig(32, 0, 2)]
)
def test_impossible_sizes_are_refused(size):
    with pytest.raises(OpenVisionError):
        Transformer(size)
