"""`ov3 vlm eval`: a vision-language model's answers, measured on scenes offline, or on public benchmarks."""

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import tyro

from openvision3.commands import common
from openvision3.commands.batching import OutputOptions
from openvision3.commands.vlm_model import WhereOptions, load
from openvision3.config import OpenVisionError, SceneConfig
from openvision3.vlm.scenes_questions import PER_SCENE, SCENES, SUITE

POPE = ("precision", "recall", "f1", "yes_rate")
DETAILS = {
    "count": ("one", "two", "three", "four"),
    "scene": ("commonest",),
    "caption": ("precision", "recall", "set", "valid", "relation", "relation_chance", "scene"),
}


@dataclass(frozen=True)
class VLMEvalOptions(WhereOptions):
    """What is asked."""

    suite: str = SUITE  # or a benchmark of lmms-eval (docs/VLM.md)
    num: int = 0  # scenes-vqa: scenes of each kind of question, 0 for 300; others: samples, 0 for all
    blind: bool = False  # scenes-vqa: grey in every picture's place
    data: Path | None = None  # others: folder with copies of the hub's data sets (DATA/POPE); else from the hub
    num_names: int = SCENES.num_names  # scenes-vqa: how many of the demo's 494 names occur
    batch_size: int = 8


Options = Annotated[VLMEvalOptions, tyro.conf.arg(name=""), tyro.conf.FlagCreatePairsOff]
Output = Annotated[OutputOptions, tyro.conf.arg(name=""), tyro.conf.FlagCreatePairsOff]


def vlm_eval(
    model: Annotated[str, tyro.conf.Positional] = "demo",
    options: Options = VLMEvalOptions(),
    output: Output = OutputOptions(),
) -> int:
    """Asks a model questions whose answers are known, and prints how many it gets right, with intervals.

    model: "demo", or a folder of `ov3 vlm train` or of any LLaVA. scenes-vqa: presence by POPE's protocol, counts,
    relations, scenes and captions, on landscapes that no training sees; --json keeps every question with its answer.
    """
    common.refuse_existing(output.json, output.overwrite)
    if options.num < 0:
        raise OpenVisionError(f"--num {options.num}: expected 0 or more")
    if options.suite != SUITE:
        _refuse_others(options)
        from openvision3.vlm.lmms import run_lmms

        return run_lmms(
            options.suite,
            model,
            options.num or None,
            output.json,
            options.data,
            options.batch_size,
            options.device,
            options.dtype,
        )
    if options.data is not None:
        raise OpenVisionError(f"--data is for lmms-eval's suites, not for {SUITE}, which draws its own scenes")
    from openvision3.vlm.scenes_vqa import scenes_vqa

    vlm, num = load(model, options), options.num or 300
    with common.Progress(PER_SCENE * num, "questions") as progress:
        figures = scenes_vqa(
            vlm,
            num,
            options.blind,
            options.batch_size,
            SceneConfig(num_names=options.num_names),
            lambda done: progress.advance(done - progress.done),
        )
    _print(figures)
    common.write_json(output.json, figures, output.overwrite)
    return 0


def _refuse_others(options: VLMEvalOptions) -> None:
    """Raises `OpenVisionError` for an option that only scenes-vqa heeds."""
    given = [
        field.name
        for field in fields(options)
        if field.name in ("blind", "num_names")
        if getattr(options, field.name) != field.default
    ]
    if given:
        raise OpenVisionError(f"--{given[0].replace('_', '-')} is for {SUITE} alone, not for {options.suite!r}")


def _print(figures: dict[str, Any]) -> None:
    seen = "grey in every picture's place" if figures["blind"] else f"pictures of {figures['size']} px"
    title = f"{figures['model']} on {figures['suite']}: {figures['num']} scenes of each kind, {seen}"
    yes_no = {f"presence, {kind}": part for kind, part in figures["presence"].items()}
    yes_no["relation"] = figures["relation"]
    rows = [
        (name, *_accuracy(part), *(_percent(part[figure]) for figure in POPE), part["n"], part["errors"])
        for name, part in yes_no.items()
    ]
    common.print_table(title, ("yes or no", "accuracy", "95 %", *POPE, "n", "errors"), rows)
    others = {name: figures[name] for name in ("count", "scene", "caption")}
    rows = [(name, *_accuracy(part), part["n"], part["errors"]) for name, part in others.items()]
    common.print_table("", ("others", "accuracy", "95 %", "n", "errors"), rows)
    details = [
        (f"{part} {name}", _percent(value))
        for part, names in DETAILS.items()
        for name, value in figures[part].items()
        if name in names
    ]
    common.print_table("", ("detail", "share"), details)
    print(f"({figures['protocol']})")
    errors = figures["errors"]
    if errors["number"]:
        print(f"{errors['number']} of {errors['of']} answers could not be read, and count as wrong:", file=sys.stderr)
        for example in errors["examples"]:
            print(f"  {example['question']} {example['answer'][:100]!r}", file=sys.stderr)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _accuracy(part: dict[str, Any]) -> tuple[str, str]:
    """With its interval, in per cent."""
    if part["interval"] is None:
        return "–", "–"
    low, high = part["interval"]
    return _percent(part["accuracy"]), f"{100 * low:.1f} to {100 * high:.1f}"
