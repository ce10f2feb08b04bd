"""docs/REPRODUCTION.md: verdicts, tables and curves, all from the results of the arms."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openvision3.files import whole_file
from openvision3.reproduction.arms import ARMS
from openvision3.reproduction.claims import CLAIMS, NOT_DECIDED, Check, Claim, Interval, Result, verdict
from openvision3.reproduction.schedule import by_seed

CURVES = {
    "pixel_l1": "pixel loss",
    "latent_l1": "latent loss",
    "caption": "caption loss, a token",
    "contrastive": "contrastive loss",
    "gradient_cosine": "cosine of the gradients",
}
FIGURES: dict[str, dict[str, tuple[str, float]]] = {  # of the end, by kind of arm: heading, name in the results, factor
    "encoder": {
        "PSNR, dB": ("reconstruction/psnr", 1),
        "its VAE alone": ("reconstruction/vae_psnr", 1),
        "KID": ("reconstruction/KID-EffNetLite0", 1),
        "zero-shot, %": ("zeroshot/templates_top1", 100),
        "R@1, %": ("retrieval/image_to_text_r1", 100),
    },
    "generation": {
        "KID": ("generation/KID-EffNetLite0", 1),
        "each of the sampler's seeds": ("generation/KID-EffNetLite0, each", 1),
        "KID, reconstructions": ("generation/reconstructions KID-EffNetLite0", 1),
        "classifier's top-1, %": ("generation/top1", 100),
        "each": ("generation/top1, each", 100),
        "reconstructions": ("generation/reconstructions top1", 100),
    },
    "questions": {
        "things named in captions, %": ("questions/things", 100),
        "95 %": ("questions/things, interval", 100),
        "blind": ("blind/things", 100),
        "presence, random": ("questions/presence, random", 100),
        "95 % of presence": ("questions/presence, random, interval", 100),
        "blind, presence": ("blind/presence, random", 100),
        "popular": ("questions/presence, popular", 100),
        "adversarial": ("questions/presence, adversarial", 100),
        "relation": ("questions/relation", 100),
        "count": ("questions/count", 100),
        "scene": ("questions/scene", 100),
    },
}
COLOURS = {"unified": "#0072b2", "understanding": "#d55e00", "reconstruction": "#009e73", "untrained": "#888888",
           "pixels": "#cc79a7", "clip": "#56b4e9"}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of a claim."""

    claim: Claim
    seeds: int
    checks: tuple[tuple[Check, Interval, bool | None], ...]
    verdict: str


def judge(claim: Claim, found: dict[int, dict[str, Result]], quick: bool) -> Outcome:
    """The claim's checks over the seeds that are finished, and its verdict."""
    seeds = list(by_seed(found, claim))
    checks = []
    for check in claim.checks if seeds else ():
        interval = Interval.of([check.value(seed) for seed in seeds])
        encoders = [result for arm, result in seeds[0].items() if ARMS[arm].kind == "encoder"]
        seen = min((result["config"]["stage1"]["samples"] for result in encoders), default=0)
        checks.append((check, interval, check.holds(interval, seen)))
    outcomes = [holds for check, _, holds in checks if check.votes]
    return Outcome(claim, len(seeds), tuple(checks), verdict(outcomes, quick))


def page(outcomes: Sequence[Outcome], found: dict[int, dict[str, Result]], command: str, picture: str) -> str:
    """The page as Markdown; `picture` is the curves' file beside it, empty: none."""
    seeds = max((outcome.seeds for outcome in outcomes), default=0)
    parts = [
        "# The paper's claims at demo size",
        f"Written by `{command}` from its runs' `result.json`; no figure here is typed by hand.",
        _how(found),
        "## Verdicts",
        "Four words are used: reproduced at full size, supported at demo size, code path tested only, contradicted. "
        f"A number of each seed ({seeds} here) gives a mean and a 95 % interval of Student's t; with three seeds that "
        "is 2.5 standard deviations each way, and an assumption that seeds spread normally. A check holds where all of "
        "the interval is on the right side of its bound, and fails where all of it is on the wrong side. A claim is "
        "contradicted by a check that fails, supported where all hold, and else its code path is tested only.",
        _table(
            ("claim", "", "seeds", "verdict"),
            [(o.claim.name, o.claim.words, o.seeds or "", f"**{o.verdict}**") for o in outcomes],
        ),
    ]
    for outcome in outcomes:
        parts += _claim(outcome, found)
    curves = _curve_tables(found)
    if curves:
        parts += ["## Held-out losses on the way", "On scenes never trained on; means over the seeds."]
        parts += [f"![Held-out losses of the arms]({picture})"] if picture else []
        parts += curves
    return "\n\n".join(part for part in parts if part) + "\n"


def _claim(outcome: Outcome, found: dict[int, dict[str, Result]]) -> list[str]:
    claim = outcome.claim
    said = f"**{outcome.verdict}**" + (", one seed" if claim.one_seed else "")
    parts = [f"## {claim.name}: {claim.words}", f"{said}. {claim.note}"]
    if claim.name == "a":
        demo = json.loads((Path(__file__).parents[1] / "weights" / "demo" / "figures.json").read_text())
        figures = demo["reconstruction"]
        parts.append(
            f"Beside it, the embedded demo model (one seed, trained as docs/RESULTS.md says): {figures['psnr']:.2f} dB "
            f"where its VAE alone has {figures['vae_psnr']:.2f} dB, a gap of {figures['psnr_gap']:.2f} dB."
        )
    if outcome.checks:
        words = {True: "holds", False: "fails", None: "open"}
        rows = []
        for check, interval, holds in outcome.checks:
            between = f"{interval.low:.4g} to {interval.high:.4g}" if outcome.seeds > 1 else "one seed"
            each = ", ".join(f"{value:.4g}" for value in interval.values)
            result = words[holds] if check.votes else f"{words[holds]}, beside it"
            if outcome.verdict == NOT_DECIDED:
                result = NOT_DECIDED
            rows.append((check.words, f"{interval.mean:.4g}", between, each, f"{check.side} {check.bound:g}", result))
        parts.append(_table(("check", "mean", "95 % interval", "each seed", "rule", "result"), rows))
    for kind, figures in FIGURES.items():
        arms = [arm for arm in claim.arms if ARMS[arm].kind == kind]
        if arms:
            parts.append(_table(("arm", "", *figures), [_arm_row(arm, claim, found) for arm in arms]))
    return parts


def _arm_row(arm: str, claim: Claim, found: dict[int, dict[str, Result]]) -> tuple[str, ...]:
    of_arm = [seed[arm]["figures"] for seed in by_seed(found, claim)]
    cells = [
        _cell([figures[name] for figures in of_arm if figures.get(name) is not None], unit)
        for name, unit in FIGURES[ARMS[arm].kind].values()
    ]
    return (arm, ARMS[arm].words, *cells)


def _cell(values: Sequence[Any], unit: float) -> str:
    """A figure of each seed; one that is itself several numbers is listed."""
    if values and isinstance(values[0], list):
        return "; ".join(", ".join(f"{unit * number:.4g}" for number in value) for value in values)
    return _spread([unit * value for value in values])


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    each = f" ({min(values):.4g} to {max(values):.4g})" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.4g}{each}"


def _how(found: dict[int, dict[str, Result]]) -> str:
    every = [result for arms in found.values() for arm, result in arms.items() if ARMS[arm].kind == "encoder"]
    if not every:
        return "No training is finished."
    config, environment = every[0]["config"], every[0]["environment"]
    stage, scenes = config["stage1"], config["data"]["scenes"]
    rates = sorted(result["samples_per_second"] for result in every)
    said = (
        f"Each encoder is the recipe `demo`, shortened to {stage['samples']:,} scenes of {scenes['num_names']} named "
        f"things at {stage['resolution']} px, in {config['precision']}, with {config['loss']['omega_rec']:g} : "
        f"{config['loss']['omega_und']:g} for omega_rec : omega_und. Arms of one seed "
        f"see the same scenes in the same order, and differ in one thing (`clip` in two: input and losses). Losses: "
        f"{config['meter_samples']} held-out scenes; other figures: {config['eval_samples']} scenes on landscapes "
        f"never trained on, zero-shot those of one thing alone. {len(every)} trainings, "
        f"{sum(result['seconds'] for result in every) / 3600:.1f} hours of the processes that ended them, "
        f"of {environment['threads']} thread(s), each at {rates[0]:.0f} to {rates[-1]:.0f} samples a second, torch "
        f"{environment['packages'].get('torch', '')}, {environment['platform']}."
    )
    return "\n\n".join((said, *_uses(found)))


def _uses(found: dict[int, dict[str, Result]]) -> Iterator[str]:
    """How generators and language models were trained and measured."""
    of_kind = {
        kind: [result for arms in found.values() for arm, result in arms.items() if ARMS[arm].kind == kind]
        for kind in ("generation", "questions", "classifier")
    }
    hours = {kind: sum(result["seconds"] for result in results) / 3600 for kind, results in of_kind.items()}
    if of_kind["generation"]:
        recipe = of_kind["generation"][0]["config"]
        train, sampler = recipe["train"], recipe["sampler"]
        judge = next((r["figures"]["classifier/top1"] for r in of_kind["classifier"]), None)
        real = of_kind["generation"][0]["figures"]["generation/real_top1"]
        classifier = (
            ""
            if judge is None
            else (f" (right in {100 * judge:.1f} % of other held-out scenes, and {100 * real:.1f} % of these)")
        )
        yield (
            f"Each generator is the embedded one's network and rates, by class in place of captions: "
            f"{train['samples']:,} scenes of one thing, {train['draws']} times and noises each, in "
            f"{train['precision']}; {recipe['pictures']} pictures of each of {recipe['sampler_seeds']} seeds, "
            f"{sampler['steps']} steps of {sampler['solver'].capitalize()}, guidance {sampler['guidance']:g}, for the "
            f"classes of as many held-out scenes. KID is EfficientNet-Lite0's, unbiased for generated pictures (that "
            f"of reconstructions is against their own originals, so a little low). The classifier sees pixels alone"
            f"{classifier}. {len(of_kind['generation'])} trainings, {hours['generation']:.1f} hours of the processes "
            "that ended them."
        )
    if of_kind["questions"]:
        train = of_kind["questions"][0]["config"]["train"]
        asked = of_kind["questions"][0]["config"]["asked"]
        yield (
            f"Each language model is SmolLM2-135M-Instruct by the recipe of `ov3 vlm train demo`, shortened: "
            f"{train['words']['samples']:,} captions' words, {train['stage1']['samples']:,} scenes, then "
            f"{train['stage2']['samples']:,} with questions, in {train['precision']}. Figures are `scenes-vqa`'s of "
            f"{asked} scenes of each kind, Wilson's interval; counts' chance is 25 %, that of yes and no 50 %. "
            f"{len(of_kind['questions'])} trainings, {hours['questions']:.1f} hours."
        )


def mean_curve(results: Iterable[Result], name: str) -> list[tuple[int, float]]:
    """(samples seen, mean over the seeds) of a held-out figure, where all seeds have it."""
    points: dict[int, list[float]] = {}
    count = 0
    for result in results:
        count += 1
        for row in result["meter"]:
            if isinstance(row.get(name), int | float):
                points.setdefault(row["samples_seen"], []).append(row[name])
    return [(seen, sum(values) / len(values)) for seen, values in sorted(points.items()) if len(values) == count]


def _by_arm(found: dict[int, dict[str, Result]]) -> dict[str, list[Result]]:
    drawn = [arm.name for arm in ARMS.values() if arm.kind == "encoder" and not arm.name.startswith("noise")]
    arms = {arm: [seed[arm] for seed in found.values() if arm in seed] for arm in drawn}
    return {arm: results for arm, results in arms.items() if results}


def _curve_tables(found: dict[int, dict[str, Result]]) -> list[str]:
    tables = []
    for name, title in CURVES.items():
        curves = {arm: dict(mean_curve(results, name)) for arm, results in _by_arm(found).items()}
        seen = sorted({samples for curve in curves.values() for samples in curve})
        rows = [
            (arm, *(f"{curve[at]:.4g}" if at in curve else "" for at in seen)) for arm, curve in curves.items() if curve
        ]
        if rows:
            tables.append(_table((f"{title}, after scenes", *(f"{at:,}" for at in seen)), rows))
    return tables


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def draw_curves(found: dict[int, dict[str, Result]], path: Path) -> bool:
    """Writes the held-out curves as one SVG, a panel each; every seed faint, the mean strong. False: there are none."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    arms = _by_arm(found)
    if not arms:
        return False
    with matplotlib.rc_context({"svg.hashsalt": "reproduction", "font.size": 9.0}):
        drawing = Figure(figsize=(10, 6), layout="constrained")
        panels = drawing.subplots(2, 3).flatten()
        for axes, (name, title) in zip(panels, CURVES.items(), strict=False):
            for arm, of_arm in arms.items():
                for result in of_arm:
                    _plot(axes, mean_curve([result], name), COLOURS[arm], linewidth=0.7, alpha=0.4)
                _plot(axes, mean_curve(of_arm, name), COLOURS[arm], linewidth=1.9, label=arm)
            axes.set_title(title)
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.grid(axis="y", linewidth=0.4)
        handles, labels = panels[0].get_legend_handles_labels()
        panels[-1].axis("off")
        panels[-1].legend(handles, labels, loc="center", frameon=False)
        with whole_file(path) as temporary:
            drawing.savefig(temporary, format="svg", metadata={"Date": None})
    return True


def _plot(axes: Any, curve: Sequence[tuple[int, float]], colour: str, **style: Any) -> None:
    if curve:
        axes.plot(*zip(*curve, strict=True), color=colour, **style)


def write_page(outcomes: Sequence[Outcome], found: dict[int, dict[str, Result]], path: Path, command: str) -> None:
    """Writes the page, and its curves beside it as NAME.svg."""
    picture = path.with_suffix(".svg")
    text = page(outcomes, found, command, picture.name if draw_curves(found, picture) else "")
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def chosen_claims(names: Sequence[str]) -> list[Claim]:
    """The claims of those names, in their own order; "all" is all of them."""
    return [claim for claim in CLAIMS.values() if "all" in names or claim.name in names]


def as_json(outcomes: Sequence[Outcome]) -> Mapping[str, Any]:
    """The outcomes as figures for --json."""
    return {
        outcome.claim.name: {
            "verdict": outcome.verdict,
            "seeds": outcome.seeds,
            "checks": [
                {"check": check.words, "side": check.side, "bound": check.bound, "votes": check.votes,
                 "mean": _finite(interval.mean), "values": list(map(_finite, interval.values)), "holds": holds,
                 "interval": [interval.low, interval.high] if math.isfinite(interval.low) else None}
                for check, interval, holds in outcome.checks
            ],
        }
        for outcome in outcomes
    }  # fmt: skip


def _finite(value: float) -> float | None:
    """JSON has no other numbers."""
    return value if math.isfinite(value) else None
