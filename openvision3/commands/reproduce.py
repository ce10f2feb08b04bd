"""`ov3 reproduce CLAIM`: the paper's claims at laptop size, from trainings to verdicts."""

import dataclasses
import importlib.util
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
    from openvision3.training.precision import Precision as AnyPrecision

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


def reproduce(
    claims: tyro.conf.Positional[tuple[str, ...]],
    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    out: Path = Path("runs/reproduce"),
    seeds: int = 3,
    samples: int = 0,
    generator_samples: int = 0,
    questions: int = 0,
    jobs: int = 0,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    write: Path | None = None,
    json: Path | None = None,
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> int:
    """Trains what the claims compare, on scenes, and judges them by stated rules; the same command goes on.

    claims: a, b, c, d, noise, clip or all; `list` says what they are. quick: checks the pipeline in minutes, with one
    seed, and decides nothing. samples: scenes that an encoder sees, 0 for about 6,000; generator_samples: that a
    generator sees, 0 for 24,000; questions: of a language model's second stage, 0 for 2,400. jobs: trainings side by
    side; 0: one a core (one on a GPU). precision: auto is timed once for encoders, once for what is made of them.
    write: the page, Markdown as docs/REPRODUCTION.md, with its curves beside it.
    """
    from openvision3.reproduction.arms import ARMS, QUICK, Length
    from openvision3.reproduction.claims import CLAIMS, MOST_SEEDS
    from openvision3.reproduction.page import as_json, chosen_claims, judge, write_page
    from openvision3.reproduction.schedule import cores, results, run_jobs
    from openvision3.reproduction.schedule import jobs as planned

    if "list" in claims or not claims:
        print(_list())
        return 0 if claims else 2
    for name in claims:
        if name not in (*CLAIMS, "all"):
            raise OpenVisionError(f"there is no claim {name!r}; there are {', '.join(CLAIMS)}, all and list")
    if not 1 <= seeds <= MOST_SEEDS:
        raise OpenVisionError(f"seeds is {seeds}: expected 1 to {MOST_SEEDS}")
    given = {"samples": samples, "generator_samples": generator_samples, "questions": questions}
    for name, value in (*given.items(), ("jobs", jobs)):
        if value < 0:
            raise OpenVisionError(f"{name} is {value}: expected at least 0")
    if write is not None and (write.is_dir() or write.suffix == ".svg"):
        raise OpenVisionError(f"write is {write}: expected a page's file, such as page.md (its curves go to page.svg)")
    for path in (write, write and write.with_suffix(".svg"), json):
        common.refuse_existing(path, overwrite)
    given = {name: value for name, value in given.items() if value}
    if quick and given:
        raise OpenVisionError(f"--quick has its own length: leave out --{next(iter(given)).replace('_', '-')}")
    length = QUICK if quick else Length(**given)
    out = (out / "quick" if quick else out).resolve()  # recipes hold it, and are compared
    chosen = chosen_claims(claims)
    kinds = {ARMS[arm].kind for claim in chosen for arm in claim.arms}
    if "questions" in kinds:
        _can_ask()
    kind = _device_kind(device)
    at_once = jobs or (cores() if kind == "cpu" else 1)
    of_encoders = _precision(out, length, device, precision, quick)
    of_uses = _uses_precision(out, device, precision, quick) if kinds > {"encoder"} else "fp32"
    wanted = planned(chosen, 1 if quick else seeds, length, out, of_encoders, of_uses)
    run_jobs(wanted, at_once, device, lambda line: print(line, file=sys.stderr, flush=True))
    found = results(wanted)
    outcomes = [judge(claim, found, quick) for claim in chosen]
    for outcome in outcomes:
        _print(outcome)
    common.write_json(json, as_json(outcomes), overwrite)
    if write is not None:
        write_page(outcomes, found, write, _command(claims, quick, seeds, given))
        print(f"page: {write}")
    return 0


def _list() -> str:
    from openvision3.reproduction.claims import CLAIMS

    lines = ["usage: ov3 reproduce CLAIM... [--quick] [--write page.md]", ""]
    for claim in CLAIMS.values():
        arms = f" [{', '.join(claim.arms)}{'; one seed' if claim.one_seed else ''}]"
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

    recorded = recorded_precision(out, ["encoder"])
    if wanted == "auto" and recorded is not None:
        return recorded
    if wanted != "auto" or quick:
        return "bf16" if wanted == "bf16" else "fp32"
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(arm_config("unified", 0, length, Path(folder)), precision="auto")
        model = build_model(config, resolve_device(device))
        return "bf16" if settle_precision(config, Path(folder), model, plan(config)[0]) == "bf16" else "fp32"


def _uses_precision(out: Path, device: str, wanted: str, quick: bool) -> "Precision":
    """As `_precision`, for generators and language models, by products of their size."""
    import torch

    from openvision3.reproduction.schedule import recorded_precision
    from openvision3.training.precision import autocast, choose_precision, resolve_device

    recorded = recorded_precision(out, ["generation", "questions"])
    if wanted == "auto" and recorded is not None:
        return recorded
    if wanted != "auto" or quick:
        return "bf16" if wanted == "bf16" else "fp32"
    place = resolve_device(device)
    layers = torch.nn.Sequential(*(torch.nn.Linear(576, 576) for _ in range(32))).to(place)
    rows = torch.randn(1024, 576, device=place)

    def run_step(precision: "AnyPrecision") -> None:
        with autocast(place, precision):
            layers(rows).sum().backward()

    return "bf16" if choose_precision("auto", place, run_step) == "bf16" else "fp32"


def _can_ask() -> None:
    """Raises `OpenVisionError` where language models can't be trained here, before anything else is."""
    for library in ("transformers", "accelerate", "gguf"):
        if importlib.util.find_spec(library) is None:
            raise OpenVisionError(
                f"the claim clip needs {library}: pip install 'openvision3[vlm]', or leave it out (a b c d noise)"
            )
    from openvision3.vlm.language_model import SMOLLM2, open_language_model

    open_language_model(SMOLLM2)  # fetched where it is not there yet


def _command(claims: tuple[str, ...], quick: bool, seeds: int, given: dict[str, int]) -> str:
    words = ["ov3 reproduce", *claims]
    words += ["--quick"] if quick else [f"--seeds {seeds}"]
    return " ".join([*words, *(f"--{name.replace('_', '-')} {value}" for name, value in given.items())])


def _print(outcome: "Outcome") -> None:
    claim = outcome.claim
    seeds = f", {outcome.seeds} seed{'s' if outcome.seeds != 1 else ''}"
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
