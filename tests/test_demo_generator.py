"""The embedded generator: there, small, and of the embedded model's tokens."""

import json
from pathlib import Path

import torch

from openvision3 import cli
from openvision3.generation.generator import DEMO_GENERATOR, load_generator
from openvision3.generation.sample import SamplerConfig


def test_it_draws_what_it_was_asked_for(tmp_path: Path) -> None:
    assert sum(path.stat().st_size for path in DEMO_GENERATOR.iterdir()) <= 14_500_000
    assert (DEMO_GENERATOR / "generator.safetensors").stat().st_size <= 14_000_000
    generator = load_generator("demo", device="cpu")
    sampler = SamplerConfig(steps=4, guidance=2.0)
    prompts = ("a pig", "a pig", "an evergreen tree")
    pink, same, green = (generator.images([p] * 2, [0, 1], 0, sampler).mean(dim=(2, 3)) for p in prompts)
    assert torch.equal(pink, same)
    assert (pink[:, 0] - pink[:, 1] > green[:, 0] - green[:, 1]).all()  # the prompt decides on red against green


def test_the_command_works_without_options(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli.main(["generate", "sample", "--prompt", "a lion", "--num", "2", "--steps", "2", "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} >= {"000000.png", "000001.png", "sheet.png", "samples.jsonl"}
    assert json.loads((out / "samples.jsonl").read_text().splitlines()[0])["prompt"] == "a lion"
