"""Weights of RAE's published DiT-DH (github.com/bytetriper/RAE, stage 2) as weights of `DiT`."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from openvision3.config import OpenVisionError
from openvision3.generation.config import GeneratorConfig, StackConfig
from openvision3.generation.dit import DiT
from openvision3.generation.layers import fixed_positions, rope_table

# what the mathematics here needs of a published config; the defaults there too
_FIXED: dict[str, Any] = {
    "patch_size": 1,
    "mlp_ratio": 4.0,
    "use_swiglu": True,
    "use_rope": True,
    "use_rmsnorm": True,
    "wo_shift": False,
    "use_pos_embed": True,
}
_READ = {
    "input_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes", "use_qknorm", "class_dropout_prob",
}  # fmt: skip

_NAMES = {
    "t_embedder.W": "time.frequencies",
    "t_embedder.mlp.0": "time.up",
    "t_embedder.mlp.2": "time.down",
    "y_embedder.embedding_table": "classes",
    "s_embedder.proj": "backbone_in",
    "x_embedder.proj": "head_in",
    "s_projector": "to_head",
    "final_layer.norm_final": "final.norm",
    "final_layer.adaLN_modulation.1": "final.modulation.linear",
    "final_layer.linear": "final.out",
}
_BLOCK_NAMES = {
    "norm1": "norm_1",
    "norm2": "norm_2",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.out",
    "attn.q_norm": "attention.norm_query",
    "attn.k_norm": "attention.norm_key",
    "mlp.w12": "mlp.w12",
    "mlp.w3": "mlp.w3",
    "adaLN_modulation.1": "modulation.linear",
}
TABLE_TOLERANCE = 1e-4  # of stored positions, which are computed here


def rae_config(published: Mapping[str, Any], name: str = "rae") -> GeneratorConfig:
    """The config of a published network, from its parameters (`input_size`, `in_channels`, `hidden_size` ...).

    Raises `OpenVisionError` for missing or unknown parameters, and for variants of the network that RAE did not
    publish.
    """
    if unknown := sorted(set(published) - _READ - set(_FIXED)):
        raise OpenVisionError(f"RAE config: unknown parameters {', '.join(unknown)}")
    needed = _READ - {"use_qknorm", "class_dropout_prob"}
    if missing := sorted(needed - set(published)):
        raise OpenVisionError(f"RAE config: missing parameters {', '.join(missing)}")
    for key, expected in _FIXED.items():
        value = published.get(key, expected)
        if value != expected and value != [expected, expected]:
            raise OpenVisionError(f"RAE config: {key} {value!r} is not supported, only {expected!r}")
    heads = published["num_heads"]
    heads = [heads, heads] if isinstance(heads, int) else heads
    try:
        backbone, head = (
            StackConfig(int(width), int(depth), int(count))
            for width, depth, count in zip(published["hidden_size"], published["depth"], heads, strict=True)
        )
        side, width, classes = (int(published[key]) for key in ("input_size", "in_channels", "num_classes"))
    except (TypeError, ValueError) as error:
        raise OpenVisionError(f"RAE config: expected two widths, depths and heads, all whole: {error}") from None
    dropout = float(published.get("class_dropout_prob", 0.1))
    if dropout <= 0:
        raise OpenVisionError("RAE config: class_dropout_prob 0 means weights without a null class: not supported")
    return GeneratorConfig(
        name=name,
        token_width=width,
        grid=(side, side),
        backbone=backbone,
        head=head,
        num_classes=classes,
        qk_norm=bool(published.get("use_qknorm", False)),
        dropout=dropout,
        allow_narrow_head=head.width < width,
    )


def convert_rae(published: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[GeneratorConfig, dict[str, Tensor]]:
    """The config and state dict of `DiT` for a published network's.

    Raises `OpenVisionError` that names unknown or missing weights, weights of another shape, and stored tables of
    positions that differ from the computed ones.
    """
    config = rae_config(published)
    with torch.device("meta"):
        expected = DiT(config).state_dict()
    tables = _tables(config)
    sources = {name: key for key in state if key not in tables and (name := _translate(key, config)) is not None}
    unknown = sorted(set(state) - set(tables) - {key for name, key in sources.items() if name in expected})
    missing = sorted(set(tables) - set(state)) + sorted(set(expected) - set(sources))
    if unknown or missing:
        raise OpenVisionError(
            f"not the weights of this RAE network: unknown {_listed(unknown)}; missing {_listed(missing)}"
        )
    for key, table in tables.items():
        stored = state[key].float()
        if stored.shape != table.shape or (stored - table).abs().max() > TABLE_TOLERANCE:
            raise OpenVisionError(f"RAE weights: {key} is not the table that this network computes")
    converted = {}
    for name, key in sources.items():
        value = state[key]
        value = value[..., 0, 0] if value.ndim == 4 and value.shape[2:] == (1, 1) else value
        if value.shape != expected[name].shape:
            raise OpenVisionError(
                f"RAE weights: {key} has the shape {tuple(value.shape)}, expected {tuple(expected[name].shape)}"
            )
        converted[name] = value.to(expected[name].dtype).contiguous()
    return config, converted


def load_rae(published: Mapping[str, Any], state: Mapping[str, Tensor]) -> DiT:
    """The published network, ready to run, on the memory of `state`; raises as `convert_rae`.

    It takes RAE's own tokens, normalised as there.
    """
    config, converted = convert_rae(published, state)
    with torch.device("meta"):  # random weights would take longer to draw than these to load
        model = DiT(config)
    model.load_state_dict(converted, assign=True)
    return model.eval()


def _translate(key: str, config: GeneratorConfig) -> str | None:
    """The name here of a published weight; None for one that has none."""
    if key in _NAMES:
        return _NAMES[key]
    module, _, leaf = key.rpartition(".")
    if module in _NAMES:
        return f"{_NAMES[module]}.{leaf}"
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
    if match is None or match[2] not in _BLOCK_NAMES:
        return None
    index, depth = int(match[1]), config.backbone.depth
    place = f"backbone.{index}" if index < depth else f"head.{index - depth}"
    return f"{place}.{_BLOCK_NAMES[match[2]]}.{leaf}"


def _tables(config: GeneratorConfig) -> dict[str, Tensor]:
    """The tables that published weights hold and that are computed here."""
    tables = {"pos_embed": fixed_positions(config.grid, config.backbone.width)[None]}
    for part, size in (("enc", config.backbone), ("dec", config.head)):
        # both numbers of a pair have their angle there
        table = rope_table(config.grid, size.width // size.num_heads).repeat_interleave(2, dim=1)
        tables[f"{part}_feat_rope.freqs_cos"], tables[f"{part}_feat_rope.freqs_sin"] = table.unbind(-1)
    return tables


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:8]) or "none"
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")
