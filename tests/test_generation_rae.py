"""RAE's published format: golden outputs of its network, and refusal of anything else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file

from openvision3.config import OpenVisionError
from openvision3.generation.config import StackConfig
from openvision3.generation.dit import Condition
from openvision3.generation.rae import convert_rae, load_rae, rae_config

GOLDEN = Path(__file__).parent / "golden" / "rae-dit-dh-tiny"


@pytest.fixture
def published() -> dict[str, Any]:
    return json.loads((GOLDEN / "config.json").read_text())


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "model.safetensors")


def test_golden_velocity(published, state):
    model, expected = load_rae(published, state), load_file(GOLDEN / "expected.safetensors")
    assert 10 in expected["y"]  # the null class is among them
    tokens = rearrange(expected["x"], "b d h w -> b (h w) d")
    with torch.no_grad():
        velocity = model(tokens, expected["t"], Condition(labels=expected["y"]))
    velocity = rearrange(velocity, "b (h w) d -> b d h w", h=4)
    assert expected["velocity"].abs().max() > 1
    assert (velocity - expected["velocity"]).abs().max() <= 1e-5


def test_config_of_the_published_sizes(published):
    config = rae_config(published)
    assert (config.backbone, config.head) == (StackConfig(32, 2, 2), StackConfig(48, 2, 3))
    assert (config.token_width, config.grid, config.num_classes, config.qk_norm) == (8, (4, 4), 10, False)
    assert rae_config(published | {"num_heads": 2, "use_qknorm": True}).head.num_heads == 2
    assert rae_config(published | {"patch_size": [1, 1]}) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_rope": False}, "use_rope"),
        ({"patch_size": 2}, "patch_size"),
        ({"mlp_ratio": 3.0}, "mlp_ratio"),
        ({"class_dropout_prob": 0.0}, "null class"),
        ({"in_chans": 8}, "in_chans"),
        ({"depth": [2]}, "depths"),
        ({"hidden_size": "wide"}, "widths"),
    ],
)
def test_config_refuses_other_networks(published, change, message):
    with pytest.raises(OpenVisionError, match=message):
        rae_config(published | change)


def test_config_names_what_is_missing(published):
    del published["in_channels"]
    with pytest.raises(OpenVisionError, match="missing parameters in_channels"):
        rae_config(published)


def test_weights_are_strict(published, state):
    with pytest.raises(OpenVisionError, match=r"unknown blocks\.9\.norm1\.weight; missing none"):
        convert_rae(published, state | {"blocks.9.norm1.weight": torch.ones(48)})
    with pytest.raises(OpenVisionError, match=r"unknown other; missing none"):
        convert_rae(published, state | {"other": torch.ones(1)})
    for key, name in {"blocks.3.mlp.w3.bias": r"head\.1\.mlp\.w3\.bias", "pos_embed": "pos_embed"}.items():
        less = {other: value for other, value in state.items() if other != key}
        with pytest.raises(OpenVisionError, match=f"unknown none; missing {name}"):
            convert_rae(published, less)
    with pytest.raises(OpenVisionError, match=r"s_projector\.bias has the shape \(47,\)"):
        convert_rae(published, state | {"s_projector.bias": torch.zeros(47)})
    with pytest.raises(OpenVisionError, match="missing backbone.0.attention.norm_key.weight"):
        convert_rae(published | {"use_qknorm": True}, state)


@pytest.mark.parametrize("key", ["pos_embed", "enc_feat_rope.freqs_sin", "dec_feat_rope.freqs_cos"])
def test_stored_tables_must_be_the_computed_ones(published, state, key):
    with pytest.raises(OpenVisionError, match=key):
        convert_rae(published, state | {key: state[key] + 0.01})


def test_weights_with_norms_of_queries_and_keys(published, state):
    plain = load_rae(published, state)
    for index, width in enumerate((16, 16, 16, 16)):
        state |= {f"blocks.{index}.attn.{part}_norm.weight": torch.full((width,), 2.0) for part in "qk"}
    model = load_rae(published | {"use_qknorm": True}, state)
    assert model.head[1].attention.norm_key.weight.eq(2).all()  # type: ignore[union-attr]
    expected = load_file(GOLDEN / "expected.safetensors")
    x, condition = rearrange(expected["x"], "b d h w -> b (h w) d"), Condition(labels=expected["y"])
    with torch.no_grad():
        assert not torch.allclose(model(x, expected["t"], condition), plain(x, expected["t"], condition), atol=1e-3)
