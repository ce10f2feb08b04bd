"""The training loop of the unified encoder (OpenVision 3, section 3): both stages in one run, exact to resume."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.optim import Optimizer

from openvision3.config import OpenVisionError, TrainConfig
from openvision3.model.openvision3 import OpenVision3
from openvision3.training.checkpoint import (
    checkpoint_step,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    write_folder,
)
from openvision3.training.frozen import fingerprint, set_training, unsaved
from openvision3.training.latents import check_latents
from openvision3.training.monitor import Monitor
from openvision3.training.optimizer import build_optimizer, clip_gradients, set_learning_rate
from openvision3.training.pictures import picture_columns
from openvision3.training.precision import Precision, resolve_device
from openvision3.training.run_folder import RunInterrupted, StopRequest, open_run
from openvision3.training.setup import (
    build_model,
    build_objective,
    open_stream,
    picture_pixels,
    run_folder,
    settle_precision,
)
from openvision3.training.stages import Stage, plan, validate
from openvision3.training.watch import FiniteWatch

Evaluate = Callable[[OpenVision3, int], Mapping[str, float]]
SHOWN = ("total", "latent_l1", "pixel_l1", "lpips", "caption", "contrastive")  # on the console


@dataclass
class Run:
    """What goes on from stage to stage."""

    config: TrainConfig
    folder: Path
    model: OpenVision3
    precision: Precision
    monitor: Monitor
    stop: StopRequest
    evaluate: Evaluate | None
    resume: Path | None  # checkpoint that this process goes on from
    step: int  # optimizer steps done
    bad_samples: int  # unusable ones met so far
    unsaved: tuple[str, ...]  # names of the tensors that checkpoints leave out
    frozen_sha256: str  # of the frozen parts, which come from `config.init`, and the VAE; empty: there are none


def train(config: TrainConfig, device: str = "auto", evaluate: Evaluate | None = None) -> Path:
    """Trains a recipe in its run folder, or resumes what is there; returns the folder, with the weights in `model/`.

    `evaluate(model, step)` gives figures to record at the times that the config sets. Raises `OpenVisionError` for an
    impossible recipe, a changed config, unusable data or a loss that is not finite, and `RunInterrupted` after SIGINT
    or SIGTERM, with a checkpoint saved.
    """
    validate(config)
    folder, stages = run_folder(config), plan(config)
    with open_run(folder, config, say=print), StopRequest() as stop:
        resume = latest_checkpoint(folder / "checkpoints")
        if resume and checkpoint_step(resume) == stages[-1].last_step and (folder / "model").exists():
            print(f"{folder} is complete: its weights are in {folder / 'model'}")
            return folder
        model = build_model(config, resolve_device(device), random=resume is None)
        check_latents(config, stages, model.vae)
        left_out = unsaved(model, config.frozen)
        state = load_checkpoint(resume, {"model": model}, ignore=left_out) if resume else {}
        frozen_sha256 = fingerprint(model, config.frozen)
        if state.get("frozen_sha256", frozen_sha256) != frozen_sha256:
            raise OpenVisionError(
                f"{config.init} or the VAE has other weights than when {folder} began; it can't be resumed"
            )
        precision = settle_precision(config, folder, model, stages[0])
        step, seen = (checkpoint_step(resume), state["samples_seen"]) if resume else (0, 0)
        total = stages[-1].last_sample
        with Monitor(folder, total, samples_seen=seen, resume_step=step, shown=SHOWN) as monitor:
            if resume:
                monitor.say(f"resuming {folder} after {seen:,} of {total:,} samples")
            bad_samples = state.get("bad_samples", 0)
            at = (resume, step, bad_samples, left_out, frozen_sha256)
            run = Run(config, folder, model, precision, monitor, stop, evaluate, *at)
            for stage in stages:
                if run.step < stage.last_step:
                    train_stage(run, stage)
        write_folder(folder / "model", lambda path: model.save(path, overwrite=True))
    return folder


def train_stage(run: Run, stage: Stage) -> None:
    """Trains what is left of a stage: batch, losses and gradients, step, log, evaluate, save."""
    config, model, monitor = run.config, run.model, run.monitor
    optimizer = build_optimizer(model, config.optimizer)  # fresh in each stage
    if run.resume and run.step > stage.first_step:
        load_checkpoint(run.resume, {"model": model}, optimizer, ignore=run.unsaved)
    objective = build_objective(config, stage, model, run.precision)
    watch = FiniteWatch(run.folder)
    stream = open_stream(config, stage, run.step, model.tokenizer)
    reported = 0  # of the stream's unusable samples

    for batch in stream:
        run.step += 1
        learning_rate = stage.learning_rate(run.step)
        set_learning_rate(optimizer, learning_rate)
        losses = objective.backward(batch)
        losses["grad_norm"] = clip_gradients(model, config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        model.clamp_logit_scale()
        watch.add(run.step, batch, losses)

        seen, last = stage.samples_seen(run.step), run.step == stage.last_step
        monitor.advance(seen)
        reported = report_bad(run, seen, stream.bad, reported)
        log = run.step % config.log_every == 0 or run.step == 1 or last
        evaluate = stage.due(run.step, config.eval_every)
        save = stage.due(run.step, config.checkpoint_every)
        if model.device.type == "cpu" or log or evaluate or save or run.stop:
            watch.check()  # waits for the device
        if log:
            monitor.log(run.step, seen, log_row(run, learning_rate, losses))
        if evaluate:
            evaluate_now(run, stage, seen)
        stopping = bool(run.stop)  # read once: a signal may come at any moment
        if save or stopping:
            watch.check()
            save_now(run, optimizer, seen)
        if stopping and not last:
            where = f"stopped after {seen:,} samples, saved in {run.folder}; the same command goes on from there"
            raise RunInterrupted(where, run.stop.signal_number)
    assert run.step == stage.last_step, (run.step, stage.last_step)


def log_row(run: Run, learning_rate: float, losses: dict[str, Tensor]) -> dict[str, float]:
    """One step's numbers: every loss of Eq. 6 by part, and the state of the optimization."""
    row = {name: float(value) for name, value in losses.items()}
    clip = run.config.optimizer.clip_norm
    clipped = float(0 < clip < row["grad_norm"])
    return {**row, "clipped": clipped, "learning_rate": learning_rate, "bad_samples": float(run.bad_samples)}


def report_bad(run: Run, samples_seen: int, bad: Sequence[tuple[int, str, str]], reported: int) -> int:
    """Counts and records the unusable samples after the first `reported`; returns how many there are now."""
    for position, key, reason in bad[reported:]:
        run.bad_samples += 1
        run.monitor.record("bad_sample", run.step, samples_seen, {"position": position, "key": key, "reason": reason})
    return len(bad)


def evaluate_now(run: Run, stage: Stage, samples_seen: int) -> None:
    """Writes sample pictures and records the figures of `run.evaluate`, outside of the training rate."""
    with run.monitor.paused():
        run.model.eval()
        pixels = picture_pixels(run.config, stage.config.resolution)
        run.monitor.save_pictures(f"step_{run.step}", picture_columns(run.model, pixels))
        if run.evaluate is not None:
            run.monitor.record("eval", run.step, samples_seen, run.evaluate(run.model, run.step))
        set_training(run.model, run.config.frozen)


def save_now(run: Run, optimizer: Optimizer, samples_seen: int) -> None:
    """Saves a checkpoint, after the records that it counts on."""
    with run.monitor.paused():
        run.monitor.flush()
        state = {"samples_seen": samples_seen, "bad_samples": run.bad_samples}
        state |= {"frozen_sha256": run.frozen_sha256} if run.frozen_sha256 else {}
        save_checkpoint(
            run.folder / "checkpoints",
            run.step,
            {"model": run.model},
            optimizer,
            state,
            keep=run.config.keep_checkpoints,
            ignore=run.unsaved,
        )
