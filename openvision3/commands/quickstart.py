"""`ov3 quickstart`: trains a small encoder on captioned scenes, measures it, and writes a page to look at."""

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openvision3.commands import common
from openvision3.config import OpenVisionError, StageConfig, TrainConfig, load_json

if TYPE_CHECKING:
    from openvision3.evaluation.samples import SampleSet
    from openvision3.model.openvision3 import OpenVision3

TRAINING_SECONDS = 480  # the most that training may take; fewer scenes where the machine would need more
GALLERY = 12  # pictures on the page
_TRIAL_STEPS = 4
_RENDERING = 1.2  # rendering shares the processors with the training, and its caches are cold in a trial


def quickstart(out: Path = Path("runs/quickstart"), device: str = "auto", samples: int = 0) -> int:
    """Trains, measures and shows a small unified encoder, in minutes on a laptop.

    out: folder of the run; the same command goes on where it stopped. samples: scenes to train on; 0: the recipe's
    number, or fewer where the machine would take more than six minutes.
    """
    from openvision3.evaluation.samples import scene_samples
    from openvision3.recipes import quickstart as recipe

    started = time.monotonic()
    config = dataclasses.replace(recipe(), out=str(out))
    held_out = scene_samples(config.eval_samples, config.model.image_size, config.data.scenes, "val", seed=0)
    print(f"first picture: {_first_picture(out, held_out)}")
    config = _fitted(config, out, device, samples)
    from openvision3.training.loop import train

    total = sum(stage.samples for stage in config.stages)
    print(f"training on {total:,} scenes of {config.data.scenes.num_names} named things; watch {out}/samples")
    folder = train(config, device)
    figures, report = _measure(folder, held_out, device, total)
    _print_summary(figures)
    print(f"report: {report}\nmodel:  {folder / 'model'}")
    print(f"took {(time.monotonic() - started) / 60:.1f} minutes; try:  ov3 caption PICTURE --model {folder / 'model'}")
    return 0


def _first_picture(out: Path, held_out: "SampleSet") -> Path:
    """A sheet of scenes above what the frozen VAE gives back, on disk before the training."""
    import itertools

    import torch

    from openvision3.training.monitor import save_picture_grid
    from openvision3.vae import load_vae

    vae = load_vae()
    pixels = torch.stack([torch.from_numpy(s.image) for s in itertools.islice(held_out, 8)]).permute(0, 3, 1, 2)
    images = pixels.float() / 127.5 - 1
    with torch.no_grad():
        decoded = vae.decode(vae.encode(images))
    path = out / "first_picture.png"
    # two rows: scenes, and the VAE's reconstructions
    save_picture_grid(path, [torch.stack(pair) for pair in zip(images, decoded, strict=True)])
    return path


def _fitted(config: TrainConfig, out: Path, device: str, samples: int) -> TrainConfig:
    """The config with as many scenes as fit; that of the run where there is one already."""
    stored = out / "config.json"
    if stored.exists():
        config = dataclasses.replace(load_json(TrainConfig, stored), out=str(out))
        print(f"going on with the run in {out}")
        return config
    total = config.stage1.samples + config.stage2.samples
    if samples < 0:
        raise OpenVisionError(f"samples is {samples}, but must be at least 0")
    if samples == 0:
        seconds = _seconds_per_sample(config, device)
        samples = min(total, int(TRAINING_SECONDS / seconds))
        if samples < total:
            print(f"note: this machine would take {total * seconds / 60:.0f} minutes for all {total:,} scenes")
    return dataclasses.replace(
        config,
        stage1=_scaled(config.stage1, samples / total),
        stage2=_scaled(config.stage2, samples / total),
    )


def _scaled(stage: StageConfig, factor: float) -> StageConfig:
    """The stage with its length scaled to whole batches, at least one."""
    batches = max(1, round(stage.samples * factor / stage.batch_size))
    return dataclasses.replace(
        stage, samples=batches * stage.batch_size, warmup_samples=int(stage.warmup_samples * min(1.0, factor))
    )


def _seconds_per_sample(config: TrainConfig, device: str) -> float:
    """Measured over a few steps of each stage on its first batch; a stage's own share of samples counts."""
    from openvision3.training.optimizer import build_optimizer
    from openvision3.training.precision import choose_precision, resolve_device, synchronize
    from openvision3.training.setup import build_model, build_objective, open_stream
    from openvision3.training.stages import plan

    model = build_model(config, resolve_device(device))
    seconds = []
    for stage in plan(config):
        first = next(iter(open_stream(config, stage, stage.first_step, model.tokenizer)))

        def run_step(precision: Any, first: Any = first, stage: Any = stage) -> None:
            build_objective(config, stage, model, precision).backward(first)

        precision = choose_precision(config.precision, model.device, run_step)
        objective = build_objective(config, stage, model, precision)
        optimizer = build_optimizer(model, config.optimizer)
        start = 0.0
        for step in range(_TRIAL_STEPS + 1):
            if step == 1:  # the first prepares kernels
                synchronize(model.device)
                start = time.perf_counter()
            objective.backward(first)
            optimizer.step()
            optimizer.zero_grad()
        synchronize(model.device)
        per_sample = _RENDERING * (time.perf_counter() - start) / (_TRIAL_STEPS * stage.config.batch_size)
        seconds.append(per_sample * stage.config.samples)
    return sum(seconds) / sum(stage.samples for stage in config.stages)


def _measure(folder: Path, held_out: "SampleSet", device: str, trained_on: int) -> tuple[dict[str, Any], Path]:
    """Evaluates the trained model on held-out scenes; writes evaluation.json and report.html."""
    import openvision3
    from openvision3.evaluation.evaluate import evaluate_all
    from openvision3.evaluation.gallery import gallery
    from openvision3.evaluation.report import report_of_run, write_report
    from openvision3.training.precision import resolve_device

    model: OpenVision3 = openvision3.load(folder / "model", device=resolve_device(device))
    with common.Progress(None, "held-out scenes measured") as progress:
        figures = evaluate_all(
            model, held_out, probe_per_label=8, progress=lambda done: progress.advance(done - progress.done)
        )
    common.write_json(folder / "evaluation.json", figures, overwrite=True)
    report = report_of_run(folder)
    report.title = "OpenVision 3 quickstart"
    report.summary = (
        "One small encoder, trained from random weights: the same tokens give the picture back, match it with text "
        "and describe it. All pictures and figures below are of scenes on landscapes that it never saw."
    )
    report.facts = {"trained on": f"{trained_on:,} scenes"}
    report.gallery = gallery(model, held_out, GALLERY)
    report.commands = ["ov3 quickstart"]
    return figures, write_report(report, folder / "report.html")


def _print_summary(figures: dict[str, Any]) -> None:
    """The figures that a newcomer looks for, beside what the VAE alone or chance would give."""
    r, c, z, t = (figures.get(part, {}) for part in ("reconstruction", "captioning", "zeroshot", "retrieval"))
    percent = "{:.1%}".format
    rows = [
        ("reconstruction, PSNR", f"{r['psnr']:.2f} dB", f"{r['vae_psnr']:.2f} dB, its VAE alone"),
        ("captions of one thing right", percent(c["one_set"]), ""),
        ("captions of several different things right", percent(c["different_set"]), ""),
        ("zero-shot top-1", percent(z["bare_top1"]), f"{percent(z['chance_top1'])} by chance"),
        ("picture to caption, R@1", percent(t["image_to_text_r1"]), f"{percent(t['ceiling_r1'])} at best"),
        ("caption to picture, R@1", percent(t["text_to_image_r1"]), f"{percent(t['ceiling_r1'])} at best"),
    ]
    common.print_table(f"{figures['data']['n']} held-out scenes", ("", "measured", "compare"), rows)
