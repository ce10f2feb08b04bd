"""`ov3 reproduce`: rules on made-up figures, the page from fixed results, and arms that stop and go on."""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_resume import wait_for_steps
from tiny_run import make_vae, tiny_config

from openvision3.cli import main
from openvision3.commands import reproduce as command
from openvision3.config import OpenVisionError, StageConfig, TrainConfig, VAEConfig, save_json, to_dict
from openvision3.reproduction import arms, page, schedule
from openvision3.reproduction.arm import RECIPE
from openvision3.reproduction.arms import ARMS, QUICK, Length, arm_config
from openvision3.reproduction.claims import (
    CLAIMS,
    CONTRADICTED,
    NOT_DECIDED,
    SUPPORTED,
    UNDECIDED,
    Check,
    Interval,
    verdict,
)
from openvision3.training.stages import validate


def test_interval_is_students() -> None:
    interval = Interval.of([1.0, 2.0, 3.0])
    assert (interval.mean, interval.low, interval.high) == pytest.approx((2, 2 - 2.484, 2 + 2.484), abs=1e-3)
    assert Interval.of([4.0]).low == -math.inf


def test_verdicts_follow_from_intervals() -> None:
    below = Check("", lambda _: 0.0, "below", 1.0)
    right, wrong, over = Interval.of([0.5, 0.51]), Interval.of([1.5, 1.51]), Interval.of([0.5, 1.4])
    assert (below.holds(right), below.holds(wrong), below.holds(over)) == (True, False, None)
    above = replace(below, side="above")
    assert (above.holds(right), above.holds(wrong), above.holds(over)) == (False, True, None)
    assert below.holds(Interval.of([0.5])) is None, "one seed decides nothing"
    assert verdict([True, True]) == SUPPORTED
    assert verdict([True, None]) == UNDECIDED and verdict([]) == UNDECIDED
    assert verdict([True, None, False]) == CONTRADICTED
    assert verdict([True], quick=True) == NOT_DECIDED


def result(arm: str, seed: int) -> dict[str, Any]:
    """A made-up one, in which the paper is right."""
    start = {"pixel_l1": 0.4, "latent_l1": 0.8, "caption": 6.0, "contrastive": 5.0}
    end = {
        "unified": (0.10, 0.30, 1.0, 2.0),
        "understanding": (0.20, 0.50, 1.0, 2.0),
        "reconstruction": (0.12, 0.29, 2.0, 4.8),
        "untrained": (0.25, 0.60, 2.5, 4.9),
    }.get(arm, (0.2, 0.5, 2.0, 3.0))
    jitter = 1 + 0.001 * seed
    last = {name: value * jitter for name, value in zip(start, end, strict=True)}
    return {
        "config": to_dict(arm_config(arm, seed, Length(), Path("unused"))),
        "figures": {
            "reconstruction/psnr": 30.0 * jitter - 4 * (arm == "pixels"),
            **({} if arm == "pixels" else {"reconstruction/vae_psnr": 31.0}),
            "reconstruction/KID-EffNetLite0": 0.05 + 0.1 * (arm == "pixels") + 0.001 * seed * (arm == "pixels"),
            "zeroshot/templates_top1": 0.6 - 0.2 * (arm == "pixels") + 0.001 * seed,
            "zeroshot/chance_top1": 1 / 30,
            "retrieval/image_to_text_r1": 0.3 + 0.001 * seed,
        },
        "meter": [
            {"samples_seen": 64, **start, "gradient_cosine": 0.1},
            {"samples_seen": 6016, **last, "gradient_cosine": 0.2 + seed},
        ],
        "samples_per_second": 30.0,
        "seconds": 200.0,
        "environment": {"threads": 1, "packages": {"torch": "2"}, "platform": "Linux"},
    }


def made_up(seeds: int = 3) -> dict[int, dict[str, Any]]:
    return {seed: {arm: result(arm, seed) for arm in ARMS} for seed in range(seeds)}


def verdicts(found: dict[int, dict[str, Any]], quick: bool = False) -> dict[str, str]:
    return {name: page.judge(claim, found, quick).verdict for name, claim in CLAIMS.items()}


def test_claims_are_judged_by_their_rules() -> None:
    found = made_up()
    assert verdicts(found) == dict.fromkeys("abcd", SUPPORTED) | {"noise": UNDECIDED, "clip": UNDECIDED}
    assert set(verdicts(found, quick=True).values()) == {NOT_DECIDED}
    assert verdicts(made_up(1)) == dict.fromkeys(CLAIMS, UNDECIDED)
    for seed in found.values():
        seed["unified"]["meter"][-1]["pixel_l1"] = 0.13  # above that of reconstruction alone
        seed["understanding"]["meter"][-1]["latent_l1"] = 0.9  # above its start
        seed["pixels"]["figures"]["reconstruction/KID-EffNetLite0"] = 0.01
        seed["unified"]["figures"]["reconstruction/psnr"] = 20.0  # far from that of reconstruction alone
    assert verdicts(found) == dict.fromkeys("abcd", CONTRADICTED) | {"noise": UNDECIDED, "clip": UNDECIDED}
    short = made_up()
    for seed in short.values():
        seed["unified"]["figures"]["reconstruction/vae_psnr"] = 40.0
    assert verdicts(short)["a"] == UNDECIDED, "so short a training does not contradict the ceiling"
    for seed in short.values():
        for of_arm in seed.values():
            of_arm["config"]["stage1"]["samples"] = 80_000
    assert verdicts(short)["a"] == CONTRADICTED
    control = made_up()
    for seed in control.values():
        seed["untrained"]["meter"][-1]["pixel_l1"] = 0.01
    assert verdicts(control)["b"] == SUPPORTED, "a control has no vote"
    missing = made_up()
    del missing[0]["pixels"], missing[1]["pixels"]
    assert page.judge(CLAIMS["d"], missing, False).seeds == 1


def test_page_from_fixed_results(tmp_path: Path) -> None:
    found = made_up()
    outcomes = [page.judge(claim, found, False) for claim in CLAIMS.values()]
    path = tmp_path / "REPRODUCTION.md"
    page.write_page(outcomes, found, path, "ov3 reproduce all --seeds 3")
    text = path.read_text()
    assert "| a | The unified encoder reconstructs near its VAE's ceiling while understanding holds | 3 |" in text
    assert "| 0.97 | 0.8955 to 1.045 | 1, 0.97, 0.94 | below 2 | holds |" in text
    assert "| pixels | as unified, on RGB patches of 16 in place of latents | 26.03 (26 to 26.06) |  | 0.151" in text
    assert "a gap of 0.60 dB" in text
    assert "| unified | 0.4 | 0.1001 |" in text and "cosine of the gradients" in text
    assert "(REPRODUCTION.svg)" in text and "<svg" in (tmp_path / "REPRODUCTION.svg").read_text()
    assert text.count("**supported at demo size**") == 8 and "nan" not in text.lower()
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        assert len({row.count(" | ") for row in table.splitlines()}) == 1, table
    page.write_page(outcomes, found, path, "ov3 reproduce all --seeds 3")
    assert path.read_text() == text
    figures = json.loads(json.dumps(page.as_json(outcomes)))
    assert figures["a"]["checks"][0]["values"] == pytest.approx([1, 0.97, 0.94])


def test_arms_differ_in_one_thing() -> None:
    configs = {arm: arm_config(arm, 1, QUICK, Path("x")) for arm in ARMS}
    for arm, config in configs.items():
        validate(config)
        same = replace(config, recipe="", loss=replace(config.loss, detach="none"), model=configs["unified"].model)
        assert same == replace(configs["unified"], recipe=""), arm
    assert configs["unified"].seed == configs["unified"].data.seed == 1
    assert configs["noise-0.8"].model.noise_tau == 0.8 and configs["pixels"].model.downsampling == 16
    assert {arm for claim in CLAIMS.values() for arm in claim.arms} == set(ARMS)
    planned = schedule.jobs(list(CLAIMS.values()), 3, QUICK, Path("x"), "fp32")
    assert len({job.folder for job in planned}) == len(planned) == 3 * 5 + 3
    with pytest.raises(OpenVisionError, match="at least 128"):
        Length(64)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> VAEConfig:
    return make_vae(tmp_path_factory.mktemp("vae"))


def tiny(folder: Path, vae: VAEConfig, steps: int = 4) -> TrainConfig:
    config = tiny_config(folder, vae, steps, stage2=StageConfig(samples=0), meter_samples=4, eval_samples=4)
    return replace(config, stage1=replace(config.stage1, samples=4 * steps), checkpoint_every=4)


@pytest.mark.slow
def test_a_stopped_arm_goes_on_exactly_and_a_finished_one_is_kept(
    tmp_path: Path, vae: VAEConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as many everywhere: they change the order of sums
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    schedule.run_jobs([schedule.Job("unified", 0, tiny(tmp_path / "unbroken", vae, 40))], 1, "cpu", lambda _: None)
    expected = tmp_path / "unbroken" / "model" / "model.safetensors"
    folder = tmp_path / "arm"
    job = schedule.Job("unified", 0, tiny(folder, vae, 40))
    folder.mkdir()
    save_json(job.config, folder / RECIPE)
    stopped = subprocess.Popen([sys.executable, "-m", "openvision3.reproduction.arm", str(folder), "cpu"])
    wait_for_steps(stopped, folder / "metrics.jsonl", 3, 60)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(60) == 128 + signal.SIGTERM
    assert 0 < job.seen() < 160 and not schedule.results([job])
    said: list[str] = []
    schedule.run_jobs([job], 1, "cpu", said.append)
    assert "done: unified, seed 0" in said and "resuming" in (folder / "log.txt").read_text()
    assert (folder / "model" / "model.safetensors").read_bytes() == expected.read_bytes()
    found = schedule.results([job])[0]["unified"]
    assert "zeroshot/templates_top1" in found["figures"] and not (folder / "checkpoints").exists()
    assert [row["samples_seen"] for row in found["meter"]] == [4, 160]

    before = (folder / "result.json").stat().st_mtime_ns
    schedule.run_jobs([job], 1, "cpu", said.append)
    assert said[-1] == "1 of 1 trainings are done already"
    assert (folder / "result.json").stat().st_mtime_ns == before
    longer = replace(job, config=replace(job.config, stage1=replace(job.config.stage1, samples=800)))
    with pytest.raises(OpenVisionError, match="begun with another stage1.samples"):
        schedule.run_jobs([longer], 1, "cpu", said.append)


def test_an_arm_that_fails_is_named_in_one_line(tmp_path: Path, vae: VAEConfig) -> None:
    job = schedule.Job("unified", 0, replace(tiny(tmp_path, vae), init=str(tmp_path / "nothing")))
    with pytest.raises(OpenVisionError, match=r"^unified, seed 0: .*nothing.*log.txt\)$"):
        schedule.run_jobs([job], 1, "cpu", lambda _: None)


def test_quick_is_wired_from_command_to_page(
    tmp_path: Path, vae: VAEConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(schedule, "arm_config", lambda arm, seed, length, out, precision: tiny(out, vae))
    monkeypatch.setitem(CLAIMS, "a", replace(CLAIMS["a"], arms=("unified",), checks=CLAIMS["a"].checks[:1]))
    written, figures = tmp_path / "REPRODUCTION.md", tmp_path / "figures.json"
    arguments = ["reproduce", "a", "clip", "--quick", "--device", "cpu", "--out", str(tmp_path / "runs")]
    arguments += ["--write", str(written), "--json", str(figures)]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "not decided" in printed.out and "generation_comparison.py" in printed.out
    assert "**not decided**" in written.read_text() and "supported at demo size**" not in written.read_text()
    assert json.loads(figures.read_text())["a"]["verdict"] == NOT_DECIDED
    assert (tmp_path / "runs" / "quick" / "unified-seed0" / "result.json").exists()
    assert main(arguments) == 2 and "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["e"], "no claim 'e'; there are a, b, c, d, noise, clip, all and list"),
        (["a", "--seeds", "11"], "seeds is 11: expected 1 to 10"),
        (["a", "--samples", "-1"], "samples is -1"),
        (["a", "--samples", "64"], "an arm needs at least 128"),
        (["a", "--quick", "--samples", "640"], "leave out --samples"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_commands_that_are_listed_are_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "list"]) == 0
    listed = capsys.readouterr().out
    for _, line in command.RECIPES:
        assert line in listed
        from openvision3.commands.train import resolve
        from openvision3.recipes import RECIPES

        words = shlex.split(line)
        config = resolve(RECIPES[words[2]](), words[3:]).config
        assert isinstance(config, TrainConfig)
        validate(config)
    from openvision3.vlm.recipes import VLM_RECIPES

    assert all(line.split()[3] in VLM_RECIPES for line in command.CLIP if "vlm train" in line)
    assert arms.RESOLUTION % 16 == 0
