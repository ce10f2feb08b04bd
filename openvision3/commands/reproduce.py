"""`ov3 reproduce CLAIM`: the paper's claims at laptop size, from trainings to verdicts."""

import dataclasses
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from openvision3.commands import common
from openvision3.config import OpenVisionError

if TYPE_CHECKING:
    from openvision3.reproduction.arms import Length, Precision
    from openvision3.reproduction.page import Outcome

# in place of runs: what a full-size replication of the paper's other ablations would train
RECIPES = (
    ("decoder L in place of B", "ov3 train b16_1000_200 --model.decoder.width 1024 --model.decoder.depth 24 "
     "--model.decoder.num-heads 16 --out runs/decoder-l"),
    ("decoder of width 512 (the paper's M is not stated)", "ov3 train b16_1000_200 --model.decoder.width 512 "
     "--model.decoder.num-heads 8 --out runs/decoder-m"),
    ("encoder L in place of B, 1000 + 200 epochs", "ov3 train paper_l16 --stage1.samples 1280000000 "
     "--stage2.samples 256000000 --out runs/encoder-l"),
    ("omega_und : omega_rec of 1 : 1", "ov3 train b16_1000_200 --loss.omega-rec 1.0 --out runs/omega-1"),
    ("omega_und : omega_rec of 4 : 1", "ov3 train b16_1000_200 --loss.omega-rec 0.25 --out runs/omega-4"),
)  # fmt: skip
# generation and questions: the tokens of an encoder trained to understand alone stand for CLIP's
CLIP = (
    "python benchmarks/generation_comparison.py runs/generation",
    *(
        line
        for arm in ("unified", "understanding")
        for line in (
            f"ov3 vlm train demo --tower runs/generation/{arm}/model --out runs/vlm-{arm}",
            f"ov3 vlm eval runs/vlm-{arm}/model --suite scenes-vqa --json runs/vlm-{arm}.json",
        )
    ),
)


def reproduce(
    claims: tyro.conf.Positional[tuple[str, ...]],
    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    out: Path = Path("runs/reproduce"),
    seeds: int = 3,
    samples: int = 0,
    jobs: int = 0,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    write: Path | None = None,
    json: Path | None = None,
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> int:
    """Trains what the claims compare, on scenes, and judges them by stated rules; the same command goes on.

    claims: a, b, c, d, noise, clip or all; `list` says what they are. quick: checks the pipeline in minutes, with one
    seed, and decides nothing. samples: scenes an arm sees; 0: about 6,000. jobs: trainings side by side; 0: one a core
    (one on a GPU). precision: auto is timed once, for all arms. write: the page, such as docs/REPRODUCTION.md, with its
    curves beside it.
    """
    from openvision3.reproduction.arms import QUICK, Length
    from openvision3.reproduction.claims import CLAIMS, MOST_SEEDS
    from openvision3.reproduction.page import as_json, chosen_claims, judge, write_page
    from openvision3.reproduction.schedule import jobs as planned
    from openvision3.reproduction.schedule import results, run_jobs

    if "list" in claims or not claims:
        print(_list())
        return 0 if claims else 2
    for name in claims:
        if name not in (*CLAIMS, "all"):
            raise OpenVisionError(f"there is no claim {name!r}; there are {', '.join(CLAIMS)}, all and list")
    if not 1 <= seeds <= MOST_SEEDS:
        raise OpenVisionError(f"seeds is {seeds}: expected 1 to {MOST_SEEDS}")
    if samples < 0 or jobs < 0:
        raise OpenVisionError(f"samples is {samples} and jobs {jobs}: expected at least 0")
    for path in (write, json):
        common.refuse_existing(path, overwrite)
    if quick and samples:
        raise OpenVisionError("--quick has its own length: leave out --samples")
    length = QUICK if quick else Length(samples) if samples else Length()
    out = out / "quick" if quick else out
    chosen = chosen_claims(claims)
    if any(claim.arms for claim in chosen):
        kind = _device_kind(device)
        at_once = jobs or (len(os.sched_getaffinity(0)) if kind == "cpu" and hasattr(os, "sched_getaffinity") else 1)
        wanted = planned(chosen, 1 if quick else seeds, length, out, _precision(out, length, device, precision, quick))
        run_jobs(wanted, at_once, device, lambda line: print(line, file=sys.stderr, flush=True))
        found = results(wanted)
    else:
        found = {}
    outcomes = [judge(claim, found, quick) for claim in chosen]
    for outcome in outcomes:
        _print(outcome)
    if any(claim.name == "clip" for claim in chosen):
        print("\n".join(("clip, by hand:", *(f"  {line}" for line in CLIP))))
    common.write_json(json, as_json(outcomes), overwrite)
    if write is not None:
        write_page(outcomes, found, write, _command(claims, quick, seeds, samples))
        print(f"page: {write}")
    return 0


def _list() -> str:
    from openvision3.reproduction.claims import CLAIMS

    lines = ["usage: ov3 reproduce CLAIM... [--quick] [--write docs/REPRODUCTION.md]", ""]
    for claim in CLAIMS.values():
        arms = f" [{', '.join(claim.arms)}{'; one seed' if claim.one_seed else ''}]" if claim.arms else ""
        lines.append(f"  {claim.name:<6} {claim.words}{arms}")
    lines += ["  all    all of these", "", "recipes of the paper's other ablations, full size, not run here:"]
    return "\n".join(lines + [f"  {words}: {command}" for words, command in RECIPES])


def _device_kind(device: str) -> str:
    from openvision3.training.precision import resolve_device

    return resolve_device(device).type


def _precision(out: Path, length: "Length", device: str, wanted: str, quick: bool) -> "Precision":
    """That of the arms already begun; else the one asked for, or the faster by trial: one for all arms."""
    from openvision3.reproduction.arms import arm_config
    from openvision3.reproduction.schedule import recorded_precision
    from openvision3.training.precision import resolve_device
    from openvision3.training.setup import build_model, settle_precision
    from openvision3.training.stages import plan

    recorded = recorded_precision(out)
    if wanted == "auto" and recorded is not None:
        return recorded
    if wanted != "auto" or quick:
        return "bf16" if wanted == "bf16" else "fp32"
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(arm_config("unified", 0, length, Path(folder)), precision="auto")
        model = build_model(config, resolve_device(device))
        return "bf16" if settle_precision(config, Path(folder), model, plan(config)[0]) == "bf16" else "fp32"


def _command(claims: tuple[str, ...], quick: bool, seeds: int, samples: int) -> str:
    words = ["ov3 reproduce", *claims]
    words += ["--quick"] if quick else [f"--seeds {seeds}", *([f"--samples {samples}"] if samples else [])]
    return " ".join(words)


def _print(outcome: "Outcome") -> None:
    claim = outcome.claim
    seeds = f", {outcome.seeds} seed{'s' if outcome.seeds != 1 else ''}" if claim.arms else ""
    title = f"{claim.name}: {claim.words}: {outcome.verdict}{seeds}"
    words = {True: "holds", False: "fails", None: "open"}
    rows = [
        (check.words, interval.mean, f"{interval.low:.4g} to {interval.high:.4g}", f"{check.side} {check.bound:g}",
         words[holds] if check.votes else "beside it")
        for check, interval, holds in outcome.checks
    ]  # fmt: skip
    if rows:
        common.print_table(title, ("check", "mean", "95 % interval", "rule", "result"), rows)
    else:
        print(title)
