"""The generator's network: sizes, positions, conditions, and agreement of its ways to run."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from openvision3.config import OpenVisionError, from_dict, load_json, save_json, to_dict
from openvision3.generation import layers
from openvision3.generation.condition import concatenate
from openvision3.generation.config import GeneratorConfig, StackConfig, named
from openvision3.generation.dit import Condition, DiT, flops
from openvision3.generation.flow import velocity_loss

TINY = GeneratorConfig(
    token_width=8, grid=(3, 4), backbone=StackConfig(16, 2, 2), head=StackConfig(24, 2, 3), num_classes=5
)
TEXT = replace(TINY, condition="text", text_width=6, text_embed_dim=10, text_length=4)


def build(config: GeneratorConfig, seed: int = 0) -> DiT:
    """A generator of random weights, with those that start at zero drawn too."""
    torch.manual_seed(seed)
    model = DiT(config)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return model


def inputs(config: GeneratorConfig, batch: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, config.num_tokens, config.token_width, generator=generator)
    return x, torch.rand(batch, generator=generator)


def texts(batch: int = 3, length: int = 4, seed: int = 2) -> Condition:
    """Texts of 1, 2, 3 ... tokens, padded."""
    generator = torch.Generator().manual_seed(seed)
    return Condition(
        pooled=torch.randn(batch, 10, generator=generator),
        tokens=torch.randn(batch, length, 6, generator=generator),
        mask=torch.arange(length) <= torch.arange(batch)[:, None],
    )


@pytest.mark.parametrize(("name", "millions"), [("S", "196.5"), ("B", "294"), ("L", "622"), ("XL", "839")])
def test_parameter_counts_of_the_paper(name, millions):
    config = named(name)
    with torch.device("meta"):
        model = DiT(config)
    # as the paper counts: fixed positions and frequencies among them, no norms of queries and keys
    count = sum(p.numel() for n, p in model.named_parameters() if "norm_query" not in n and "norm_key" not in n)
    count += layers.TIME_FREQUENCIES + config.num_tokens * config.backbone.width
    digits = len(millions.partition(".")[2])
    assert f"{count / 1e6:.{digits}f}" == millions


def test_demo_size():
    config = named("demo", 384, grid=(8, 8), num_classes=7)
    assert (config.backbone, config.head, config.num_classes) == (StackConfig(256, 8, 4), StackConfig(384, 2, 6), 7)
    with pytest.raises(OpenVisionError, match="use one of demo, S, B, L, XL"):
        named("huge")


def test_config_goes_through_json(tmp_path):
    save_json(TEXT, tmp_path / "config.json")
    assert load_json(GeneratorConfig, tmp_path / "config.json") == TEXT
    data: dict[str, Any] = json.loads(json.dumps(to_dict(TINY)))
    data["head"]["width"] = 6
    with pytest.raises(OpenVisionError):
        from_dict(GeneratorConfig, data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": StackConfig(4, 1, 1)}, "below token_width 8"),
        ({"head": StackConfig(24, 0, 3)}, "positive"),
        ({"backbone": StackConfig(20, 1, 2)}, "multiple of 4"),
        ({"backbone": StackConfig(16, 1, 3)}, "multiple of 4"),
        ({"grid": (0, 4)}, "grid"),
        ({"dropout": 1.0}, "dropout"),
        ({"num_classes": 0}, "num_classes"),
        ({"condition": "text"}, "text_embed_dim"),
        ({"condition": "text", "text_embed_dim": 3, "text_width": 3}, "text_length"),
    ],
)
def test_config_refuses_what_cannot_be_built(change, message):
    with pytest.raises(OpenVisionError, match=message):
        replace(TINY, **change)


def test_narrow_head_needs_the_flag():
    assert replace(TINY, head=StackConfig(4, 1, 1), allow_narrow_head=True).head.width == 4


def test_velocity_starts_at_zero_and_learns_from_there():
    torch.manual_seed(0)
    model, (x, t) = DiT(TINY), inputs(TINY)
    condition = Condition(labels=torch.tensor([0, 1, 5]))
    assert not model(x, t, condition).any()
    losses = []
    for _ in range(3):
        loss = velocity_loss(model, x, torch.zeros_like(x), t, condition).mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("config", [TINY, TEXT, replace(TINY, qk_norm=False)])
def test_every_parameter_has_a_gradient(config):
    model, (x, t) = build(config), inputs(config)
    condition = texts() if config.condition == "text" else Condition(labels=torch.tensor([0, 1, 5]))
    condition = replace(condition, null=torch.tensor([False, True, False]))
    velocity_loss(model, x, torch.randn_like(x), t, condition).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("config", [TINY, TEXT])
def test_samples_do_not_depend_on_their_batch(config):
    model, (x, t) = build(config), inputs(config)
    condition = texts() if config.condition == "text" else Condition(labels=torch.tensor([0, 1, 5]))
    whole = model(x, t, condition)
    for i in range(3):
        alone = model(x[i : i + 1], t[i : i + 1], condition.rows(slice(i, i + 1)))
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=1e-4, atol=1e-5)
    joined = concatenate([condition.rows(slice(0, 1)), condition.rows(torch.tensor([1, 2]))])
    torch.testing.assert_close(model(x, t, joined), whole, rtol=0, atol=1e-6)
    assert (whole - model(x, t.flip(0), condition)).abs().max() > 1e-3  # times matter


def test_literal_rope_and_positions():
    table = layers.rope_table((2, 3), 8, prefix=1)
    assert table.shape == (7, 4, 2)
    assert torch.equal(table[:2], torch.tensor([1.0, 0.0]).expand(2, 4, 2))  # no turn of the prefix and of the corner
    angles = torch.tensor([1.0, 0.01, 2.0, 0.02])  # row 1, column 2
    torch.testing.assert_close(table[-1], torch.stack([angles.cos(), angles.sin()], dim=-1))
    x = torch.tensor([1.0, 0, 0, 1, 1, 0, 0, 1]).expand(1, 7, 8)
    c, s, d, e = math.cos(1), math.sin(1), math.cos(0.01), math.sin(0.01)
    c2, s2, d2, e2 = math.cos(2), math.sin(2), math.cos(0.02), math.sin(0.02)
    torch.testing.assert_close(layers.rotate(x, table)[0, -1], torch.tensor([c, s, -e, d, c2, s2, -e2, d2]))
    positions = layers.fixed_positions((2, 3), 8)
    sin, cos = torch.sin, torch.cos
    x, y = torch.tensor([2.0, 0.02]), torch.tensor([1.0, 0.01])
    torch.testing.assert_close(positions[-1], torch.cat([sin(x), cos(x), sin(y), cos(y)]))
    torch.testing.assert_close(positions[1], torch.cat([sin(x / 2), cos(x / 2), sin(y * 0), cos(y * 0)]))


def test_rotation_as_compiled_is_the_same(monkeypatch):
    table, x = layers.rope_table((2, 3), 8)[:, None], torch.randn(2, 6, 3, 8)
    plain = layers.rotate(x, table)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(layers.rotate(x, table), plain)


def test_rmsnorm_computes_in_fp32():
    norm, x = layers.RMSNorm(64), torch.randn(5, 64) * 1e3
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x), expected.float())
    assert norm(x.bfloat16()).dtype == torch.float32 and norm(x.double()).dtype == torch.float64


def test_other_grids_are_computed_not_stored():
    model = build(TINY)
    transposed = build(replace(TINY, grid=(6, 2)))
    x, t = inputs(TINY)
    condition = Condition(labels=torch.tensor([0, 1, 5]))
    there = model(x, t, condition, grid=(6, 2))
    assert torch.equal(there, transposed(x, t, condition))
    assert (there - model(x, t, condition)).abs().max() > 1e-3
    assert model(torch.randn(2, 30, 8), t[:2], condition.rows(slice(0, 2)), grid=(5, 6)).shape == (2, 30, 8)
    with pytest.raises(OpenVisionError, match="grid of 3x4"):
        model(x[:, :11], t, condition)


def test_null_class_is_the_last_or_marked():
    model, (x, t) = build(TINY), inputs(TINY)
    null = model(x, t, Condition(labels=torch.full((3,), 5)))
    marked = Condition(labels=torch.tensor([0, 1, 2]), null=torch.ones(3, dtype=torch.bool))
    assert torch.equal(model(x, t, marked), null)
    assert torch.equal(model(x, t, Condition(labels=torch.tensor([0, 1, 2])).as_null()), null)
    assert (model(x, t, Condition(labels=torch.tensor([0, 1, 2]))) - null).abs().amax((1, 2)).min() > 1e-4


def test_null_text_forgets_the_text():
    model, (x, t) = build(TEXT), inputs(TEXT)
    null = model(x, t, texts().as_null())
    other = Condition(pooled=torch.randn(3, 10), tokens=torch.randn(3, 4, 6), mask=torch.zeros(3, 4, dtype=torch.bool))
    torch.testing.assert_close(model(x, t, other.as_null()), null)
    some = replace(texts(), null=torch.tensor([False, True, False]))
    mixed, given = model(x, t, some), model(x, t, texts())
    torch.testing.assert_close(mixed[1], null[1])
    torch.testing.assert_close(mixed[[0, 2]], given[[0, 2]])
    assert (given - null).abs().amax((1, 2)).min() > 1e-4


def test_padding_of_a_text_changes_nothing_and_its_tokens_do():
    model, (x, t) = build(TEXT), inputs(TEXT)
    given = texts()
    plain = model(x, t, given)
    assert given.tokens is not None and given.mask is not None
    for filler in (100.0, math.nan):
        other = replace(given, tokens=torch.where(given.mask[..., None], given.tokens, filler))
        torch.testing.assert_close(model(x, t, other), plain)
    longer = replace(
        given,
        tokens=torch.cat([given.tokens, torch.randn(3, 3, 6)], 1),
        mask=torch.cat([given.mask, torch.zeros(3, 3, dtype=torch.bool)], 1),
    )
    torch.testing.assert_close(model(x, t, longer), plain, rtol=1e-4, atol=1e-5)
    shorter = Condition(pooled=given.pooled, tokens=given.tokens[:, :3], mask=given.mask[:, :3])
    torch.testing.assert_close(model(x, t, shorter), plain, rtol=1e-4, atol=1e-5)
    changed = given.tokens.clone()
    changed[:, 0] += 1
    assert (model(x, t, replace(given, tokens=changed)) - plain).abs().amax((1, 2)).min() > 1e-4
    pooled = replace(given, pooled=torch.randn(3, 10))
    assert (model(x, t, pooled) - plain).abs().amax((1, 2)).min() > 1e-4


def test_text_tokens_are_a_set():
    """Their order is in their features alone: they are not turned."""
    model, (x, t) = build(TEXT), inputs(TEXT)
    given = replace(texts(), mask=torch.ones(3, 4, dtype=torch.bool))
    assert given.tokens is not None
    turned = replace(given, tokens=given.tokens.flip(1))
    torch.testing.assert_close(model(x, t, turned), model(x, t, given), rtol=1e-4, atol=1e-5)


def test_pooled_text_alone():
    config = replace(TINY, condition="text", text_embed_dim=10)
    model, (x, t) = build(config), inputs(config)
    given = Condition(pooled=torch.randn(3, 10))
    assert (model(x, t, given) - model(x, t, given.as_null())).abs().amax((1, 2)).min() > 1e-4


@pytest.mark.parametrize(
    ("config", "condition", "message"),
    [
        (TINY, texts(), "class labels"),
        (TEXT, Condition(labels=torch.zeros(3, dtype=torch.int64)), "takes texts"),
        (TEXT, Condition(pooled=torch.zeros(3, 10)), "tokens"),
        (TEXT, replace(texts(), pooled=torch.zeros(3, 9)), r"pooled must be \(3, 10\)"),
        (TEXT, replace(texts(), mask=torch.ones(3, 3, dtype=torch.bool)), r"mask must be \(3, 4\)"),
        (TINY, Condition(labels=torch.zeros(2, dtype=torch.int64)), r"labels must be \(3,\)"),
    ],
)
def test_conditions_that_do_not_fit(config, condition, message):
    with pytest.raises(OpenVisionError, match=message):
        build(config)(*inputs(config), condition)


def test_nulled_keeps_what_was_null():
    condition = Condition(labels=torch.arange(4), null=torch.tensor([True, False, False, True]))
    dropped = condition.nulled(torch.tensor([False, False, True, True]))
    assert dropped.is_null.tolist() == [True, False, True, True]
    assert dropped.labels is condition.labels


@pytest.mark.parametrize("config", [TINY, TEXT])
def test_checkpointing_gives_the_same_gradients(config):
    x, t = inputs(config)
    condition = texts() if config.condition == "text" else Condition(labels=torch.tensor([0, 1, 5]))
    gradients = []
    for checkpointed in (False, True):
        model = build(config)
        model.checkpoint_blocks = checkpointed
        calls = []
        model.backbone[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        velocity_loss(model, x, torch.ones_like(x), t, condition).sum().backward()
        assert len(calls) == 1 + checkpointed
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


@pytest.mark.parametrize("config", [TINY, TEXT])
def test_attention_paths_agree(config):
    x, t = inputs(config)
    condition = texts() if config.condition == "text" else Condition(labels=torch.tensor([0, 1, 5]))
    outputs = [build(replace(config, attention=path))(x, t, condition) for path in ("matmul", "sdpa")]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [TINY, TEXT])
def test_bf16_is_near_and_fp64_is_nearer(config):
    model, (x, t) = build(config), inputs(config)
    condition = texts() if config.condition == "text" else Condition(labels=torch.tensor([0, 1, 5]))
    plain = model(x, t, condition)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(x, t, condition)
    assert 0 < (rounded.float() - plain).std() / plain.std() < 0.03
    exact = model.double()(x.double(), t.double(), condition if config is TINY else as_double(condition))
    assert exact.dtype == torch.float64
    assert (exact - plain).abs().max() < 1e-4 * plain.abs().max()


def as_double(condition: Condition) -> Condition:
    assert condition.pooled is not None and condition.tokens is not None
    return replace(condition, pooled=condition.pooled.double(), tokens=condition.tokens.double())


@pytest.mark.parametrize("grid", [None, (5, 7)])
@pytest.mark.parametrize("config", [TINY, TEXT, replace(TINY, head=StackConfig(16, 1, 2))])
def test_flops_are_those_that_pytorch_counts(config, grid):
    rows, columns = grid or config.grid
    with torch.device("meta"), torch.no_grad():
        model = DiT(config)
        x, t = torch.empty(2, rows * columns, config.token_width), torch.empty(2)
        condition = (texts() if config is TEXT else Condition(labels=torch.zeros(3, dtype=torch.int64))).rows(slice(2))
        condition = condition.to("meta")
        with FlopCounterMode(display=False) as counter:
            model(x, t, condition, grid=grid)
    assert flops(config, 2, grid) == counter.get_total_flops()
