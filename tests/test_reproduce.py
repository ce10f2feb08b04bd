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
from openvision3.reproduction.arms import (
    ARMS,
    CLASSIFIER,
    QUICK,
    GenerationRecipe,
    Length,
    QuestionsRecipe,
    arm_config,
    recipe,
)
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
    assert Interval.of([1.0, math.nan]).high == Interval.of([1.0, math.inf]).high == math.inf


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
    kind = ARMS[arm].kind
    made = to_dict(recipe(arm, seed, Length(), Path("unused")))
    if kind != "encoder":
        return {"config": made, "figures": used(arm), "samples_per_second": 1.0, "seconds": 60.0}
    return {
        "config": made,
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


def used(arm: str) -> dict[str, Any]:
    """Figures of what is made of an encoder; unified tokens are the best."""
    worse = 0.0 if arm.endswith("unified") else 0.1
    questions = ("presence, random", "presence, popular", "presence, adversarial", "relation", "count", "scene")
    return {
        "classifier/top1": 0.95,
        "generation/real_top1": 0.97,
        "generation/KID-EffNetLite0": 0.2 + worse,
        "generation/KID-EffNetLite0, each": [0.19 + worse, 0.21 + worse],
        "generation/reconstructions KID-EffNetLite0": 0.05,
        "generation/top1": 0.6 - worse,
        "generation/top1, each": [0.6 - worse],
        "generation/reconstructions top1": 0.9,
        **{f"questions/{name}": 0.9 - worse for name in questions},
        **{f"questions/{name}, interval": [0.8, 0.95] for name in questions},
        **{f"blind/{name}": None if name == "scene" else 0.5 for name in questions},
        "questions/things": 0.4 - worse,
        "questions/things, interval": [0.25, 0.5],
        "blind/things": 0.05,
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
            if "stage1" in of_arm["config"]:
                of_arm["config"]["stage1"]["samples"] = 80_000
    assert verdicts(short)["a"] == CONTRADICTED
    control = made_up()
    for seed in control.values():
        seed["untrained"]["meter"][-1]["pixel_l1"] = 0.01
    assert verdicts(control)["b"] == SUPPORTED, "a control has no vote"
    rising = made_up()
    for seed in rising.values():  # a negative share of a fall that is none is below every bound
        seed["unified"]["meter"][-1]["contrastive"] = 5.1
    assert verdicts(rising)["c"] == UNDECIDED
    broken = made_up()
    broken[1]["unified"]["meter"][-1]["pixel_l1"] = "nan"
    broken[2]["unified"]["figures"]["reconstruction/psnr"] = None
    assert verdicts(broken) == dict.fromkeys(CLAIMS, UNDECIDED) | {"b": SUPPORTED, "d": SUPPORTED}
    json.dumps(page.as_json([page.judge(claim, broken, False) for claim in CLAIMS.values()]), allow_nan=False)
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
    assert "| generation-clip | a generator of the tokens of `clip` | 0.3 | 0.29, 0.31 | 0.05 | 50 | 50 | 90 |" in text
    assert (
        "| questions-clip | a language model that sees the tokens of `clip` | 30 | 25, 50 | 5 | 80 | 80, 95 |" in text
    )
    assert "| KID of generated pictures, unified less CLIP-style | -0.1 | one seed | -0.1 | below 0 | open |" in text
    assert (
        "right in 95.0 % of other held-out scenes, and 97.0 % of these" in text and "24,000 scenes of one thing" in text
    )
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        assert len({row.count(" | ") for row in table.splitlines()}) == 1, table
    page.write_page(outcomes, found, path, "ov3 reproduce all --seeds 3")
    assert path.read_text() == text
    figures = json.loads(json.dumps(page.as_json(outcomes)))
    assert figures["a"]["checks"][0]["values"] == pytest.approx([1, 0.97, 0.94])


def test_arms_differ_in_one_thing() -> None:
    encoders = [arm.name for arm in ARMS.values() if arm.kind == "encoder"]
    configs = {arm: arm_config(arm, 1, QUICK, Path("x")) for arm in encoders}
    for arm, config in configs.items():
        validate(config)
        same = replace(config, recipe="", loss=replace(config.loss, detach="none"), model=configs["unified"].model)
        assert same == replace(configs["unified"], recipe=""), arm
    assert configs["unified"].seed == configs["unified"].data.seed == 1
    assert configs["noise-0.8"].model.noise_tau == 0.8 and configs["pixels"].model.downsampling == 16
    assert configs["clip"].model == configs["pixels"].model and configs["clip"].loss.detach == "reconstruction"
    assert {arm for claim in CLAIMS.values() for arm in claim.arms} | {CLASSIFIER} == set(ARMS)
    planned = schedule.jobs(list(CLAIMS.values()), 3, QUICK, Path("x"), "fp32")
    assert len({job.folder for job in planned}) == len(planned) == 3 * 5 + 3 + 1 + 1 + 8 + 3
    places = {job.folder: number for number, job in enumerate(planned)}
    assert all(places[folder] < places[job.folder] for job in planned for folder in job.needs)
    with pytest.raises(OpenVisionError, match="at least 128"):
        Length(64)


def test_what_is_made_of_encoders_differs_in_the_encoder() -> None:
    """Generators, and language models, are alike but for the model that they read, or the space that they draw."""
    for kind, field in (("generation", "model"), ("questions", "tower")):
        found = {
            arm.of: recipe(arm.name, 1, QUICK, Path("x")) for arm in ARMS.values()
            if arm.kind == kind and arm.space == "tokens"
        }  # fmt: skip
        for of, one in found.items():
            assert isinstance(one, GenerationRecipe | QuestionsRecipe)
            assert getattr(one.train, field) == f"x/{of}-seed1/model"
            alike: Any = replace(one, train=replace(one.train, out="", **{field: ""}))
            first: Any = found["unified"]
            assert alike == replace(first, train=replace(first.train, out="", **{field: ""}))
    latents, tokens = (recipe(f"generation-{name}", 1, QUICK, Path("x")) for name in ("latents", "unified"))
    assert isinstance(latents, GenerationRecipe) and isinstance(tokens, GenerationRecipe)
    assert replace(latents.train, out="", space="tokens") == replace(tokens.train, out="")


def test_an_arm_waits_for_what_it_needs(tmp_path: Path) -> None:
    planned = schedule.jobs([CLAIMS["noise"]], 1, QUICK, tmp_path, "fp32")
    last = planned[-1]
    assert [folder.name for folder in last.needs] == ["noise-0.8-seed0", "classifier"]
    assert schedule._next([last]) is None
    with pytest.raises(OpenVisionError, match="what it needs is neither finished"):
        schedule.run_jobs([last], 1, "cpu", lambda _: None)
    for folder in last.needs:
        folder.mkdir()
        (folder / "result.json").write_text("{}")
    assert schedule._next([last]) is last
    assert last.samples() == 96 and last.seen() == 0


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
    save_json(job.recipe, folder / RECIPE)
    stopped = subprocess.Popen([sys.executable, "-m", "openvision3.reproduction.arm", str(folder), "encoder", "cpu"])
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
    config = tiny(folder, vae, 40)
    longer = replace(job, recipe=replace(config, stage1=replace(config.stage1, samples=800)))
    with pytest.raises(OpenVisionError, match="begun with another stage1.samples"):
        schedule.run_jobs([longer], 1, "cpu", said.append)


def test_an_arm_that_fails_is_named_in_one_line(
    tmp_path: Path, vae: VAEConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = schedule.Job("unified", 0, replace(tiny(tmp_path, vae), init=str(tmp_path / "nothing")))
    with pytest.raises(OpenVisionError, match=r"^unified, seed 0: .*nothing.*log.txt\)$"):
        schedule.run_jobs([job], 1, "cpu", lambda _: None)
    killed = replace(job, recipe=tiny(tmp_path, vae))  # the same folder, whose log tells of an earlier failure
    (tmp_path / RECIPE).unlink()
    monkeypatch.setattr(sys, "executable", str(executable := tmp_path / "killed"))
    executable.write_text("#!/bin/sh\nkill -9 $$\n")
    executable.chmod(0o755)
    with pytest.raises(OpenVisionError, match=r"^unified, seed 0: exit code -9"):
        schedule.run_jobs([killed], 1, "cpu", lambda _: None)


def test_quick_is_wired_from_command_to_page(
    tmp_path: Path, vae: VAEConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(schedule, "recipe", lambda arm, seed, length, out, *_: tiny(out / f"{arm}-seed{seed}", vae))
    monkeypatch.setitem(CLAIMS, "a", replace(CLAIMS["a"], arms=("unified",), checks=CLAIMS["a"].checks[:1]))
    written, figures = tmp_path / "REPRODUCTION.md", tmp_path / "figures.json"
    arguments = ["reproduce", "a", "--quick", "--device", "cpu", "--out", str(tmp_path / "runs")]
    arguments += ["--write", str(written), "--json", str(figures)]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "not decided" in printed.out
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
        (["a", "--write", "page.svg"], "expected a page's file"),
        (["clip", "--generator-samples", "-1"], "generator_samples is -1"),
        (["clip", "--questions", "5"], "questions is 5: expected at least 16"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_without_transformers_clip_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert main(["reproduce", "all", "--quick", "--out", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err
    assert "needs transformers: pip install 'openvision3[vlm]', or leave it out" in said and said.count("\n") == 1
    assert not (tmp_path / "runs").exists()


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
    assert arms.RESOLUTION % 16 == 0
