"""Configs: to and from JSON, and what a user sees of a mistake."""

import json

import pytest

from openvision3.config import OpenVisionError, TrainConfig, VAETrainConfig, differences, from_dict, load_json, to_dict
from openvision3.recipes import RECIPES


@pytest.mark.parametrize("name", [name for name in RECIPES])
def test_recipes_survive_json(name, tmp_path):
    config = RECIPES[name]()
    assert config.recipe == name
    assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"recipe": "x", "stage1": {"sampels": 3}}, "stage1 has no field 'sampels'; did you mean 'samples'"),
        ({"recipe": "x", "seed": "three"}, "seed: expected int, got 'three'"),
        ({"recipe": "x", "precision": "fp16"}, "'fp16' is not one of 'auto', 'bf16', 'fp32'"),
        ({"recipe": "x", "data": {"scenes": {"count_weights": [1, 2]}}}, "expected 4 values"),
        ({"recipe": "x", "model": 7}, "model: expected a table of fields, got 7"),
        ({}, "recipe"),
    ],
)
def test_mistakes_name_the_field(data, message):
    with pytest.raises(OpenVisionError) as error:
        from_dict(TrainConfig, data)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_unreadable_files(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(OpenVisionError, match="does not exist"):
        load_json(TrainConfig, path)
    path.write_bytes(b"\xff{")
    with pytest.raises(OpenVisionError, match="not valid JSON"):
        load_json(TrainConfig, path)


def test_differences_say_what_may_change():
    a = VAETrainConfig("x")
    b = from_dict(VAETrainConfig, {**to_dict(a), "seed": 1, "log_every": 7})
    assert list(differences(a, b)) == [("seed", 0, 1, False), ("log_every", 50, 7, True)]
