"""The training loop of the unified encoder (OpenVision 3, section 3): both stages in one run, exact to resume.

It runs in one process, or in many that share each batch (`training/parallel.py`). All of them go through the same
steps; the first one alone keeps the run's folder, evaluates and prints.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from openvision3.config import OpenVisionError, TrainConfig
from openvision3.data.batches import Batch
from openvision3.distributed import World
from openvision3.model.external import ExternalEncoder
from openvision3.model.openvision3 import OpenVision3
from openvision3.training.checkpoint import (
    Saver,
    checkpoint_step,
    checkpoint_tensors,
    latest_checkpoint,
    load_checkpoint,
    named_tensors,
    read_state,
    write_folder,
)
from openvision3.training.ema import Average
from openvision3.training.frozen import (
    VAE,
    fingerprint,
    part_of,
    set_training,
    trained_losses,
    trained_parameters,
    unsaved,
)
from openvision3.training.latents import check_latents
from openvision3.training.monitor import Monitor, NoMonitor
from openvision3.training.optimizer import build_optimizer, clip_gradients, set_learning_rate, step_unless
from openvision3.training.parallel import Engine, Sharded, build_engine, compile_blocks, open_world, whole_tensor
from openvision3.training.pictures import picture_columns
from openvision3.training.precision import Precision
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
from openvision3.training.synergy import measure_synergy
from openvision3.training.watch import BadSamples, FiniteWatch, settle

Evaluate = Callable[[OpenVision3, int], Mapping[str, float]]
SHOWN = ("total", "latent_l1", "pixel_l1", "lpips", "caption", "contrastive")  # on the console
LOCK_WAIT = 120.0  # seconds for the processes of a run that was broken off to end, before others take its folder


@dataclass
class Run:
    """What goes on from stage to stage."""

    config: TrainConfig
    folder: Path
    world: World
    model: OpenVision3
    engine: Engine
    average: Average | None
    precision: Precision
    monitor: Monitor | NoMonitor
    stop: StopRequest
    saver: Saver
    watch: FiniteWatch
    evaluate: Evaluate | None
    resume: Path | None  # checkpoint that this process goes on from
    step: int  # optimizer steps done, or skipped
    bad: BadSamples
    unsaved: tuple[str, ...]  # names of the tensors that checkpoints leave out
    given: dict[str, str]  # hashes of what checkpoints leave out, and a resumed run must find as it was
    saved_samples: int  # seen at the last checkpoint

    @property
    def modules(self) -> dict[str, Any]:
        """What checkpoints hold, besides the optimizer's state."""
        return {"model": self.model} | ({} if self.average is None else {"average": self.average.values()})


def train(config: TrainConfig, device: str = "auto", evaluate: Evaluate | None = None) -> Path:
    """Trains a recipe in its run folder, or resumes what is there; returns the folder, with the weights in `model/`.

    `evaluate(model, step)` gives figures to record at the times that the config sets. Raises `OpenVisionError` for an
    impossible recipe, a changed config, unusable data or losses that stay not finite, and `RunInterrupted` after
    SIGINT, SIGTERM or SIGUSR1, with a checkpoint saved.
    """
    with open_world(device) as (world, place):
        world.agree(lambda: (validate(config), refuse_unequal_shares(config, world)))
        with entered_run(run_folder(config), config, world) as folder, StopRequest() as stop:
            stages = plan(config)
            resume, complete = world.agree(lambda: found_in(folder, stages))
            if complete:
                if world.rank == 0:
                    print(f"{folder} is complete: its weights are in {folder / 'model'}")
                return folder
            run = begin(config, folder, world, place, resume, stop, evaluate)
            with run.monitor:
                if resume:
                    seen = samples_seen(stages, run.step)
                    run.monitor.say(f"resuming {folder} after {seen:,} of {stages[-1].last_sample:,} samples")
                try:
                    for stage in stages:
                        if run.step < stage.last_step:
                            train_stage(run, stage)
                finally:
                    if world.size == 1:  # others may be gone, and this process would wait for them
                        run.saver.finish()
                run.saver.finish()
            final = whole_model(run)
            if final is not None:
                if not all(bool(weight.isfinite().all()) for weight in final.parameters()):
                    raise OpenVisionError(f"{folder} ended with weights that are not finite: lower the learning rate")
                write_folder(folder / "model", lambda path: final.save(path, overwrite=True))
            world.agree(lambda: None)  # the folder is there before any process ends
    return folder


def found_in(folder: Path, stages: list[Stage]) -> tuple[Path | None, bool]:
    """The newest checkpoint of a run's folder, and whether the run is complete."""
    found = latest_checkpoint(folder / "checkpoints")
    ended = found is not None and checkpoint_step(found) == stages[-1].last_step
    return found, ended and (folder / "model").exists()


def refuse_unequal_shares(config: TrainConfig, world: World) -> None:
    """Raises `OpenVisionError` where a batch can't be divided among the processes."""
    for number, stage in enumerate((config.stage1, config.stage2), start=1):
        if stage.samples and stage.batch_size % world.size:
            raise OpenVisionError(
                f"stage{number}.batch_size is {stage.batch_size}, which {world.size} processes can't share equally: "
                "choose a number of processes that divides it"
            )


@contextmanager
def entered_run(folder: Path, config: Any, world: World) -> Iterator[Path]:
    """The run's folder, held by the first process for all of them."""
    held = open_run(folder, config, say=print, wait=LOCK_WAIT if world.size > 1 else 0.0)
    world.agree(lambda: held.__enter__())
    try:
        yield folder
    finally:
        if world.rank == 0:
            held.__exit__(None, None, None)


def begin(
    config: TrainConfig,
    folder: Path,
    world: World,
    device: torch.device,
    resume: Path | None,
    stop: StopRequest,
    evaluate: Evaluate | None,
) -> Run:
    """Builds or loads what the run trains."""
    stages = plan(config)
    model = build_model(config, device, random=resume is None)
    left_out, state = unsaved(model, config.frozen), read_state(resume) if resume else {}
    given = {
        "frozen_sha256": fingerprint(model, config.frozen),
        "latents_sha256": check_latents(config, stages, model.vae),
    }
    for name, what in (
        ("frozen_sha256", f"{config.init} or the VAE has other weights"),
        ("latents_sha256", "the cached latents are others"),
    ):
        if state.get(name, given[name]) != given[name]:
            raise OpenVisionError(f"{what} than when {folder} began; it can't be resumed")
    precision: Precision = world.agree(lambda: settle_precision(config, folder, model, stages[0]))
    if precision == "fp64":
        model.double()
    if config.compile:
        compile_blocks(model)
    heads = "contrastive" in trained_losses(model.config, config.frozen)
    engine = build_engine(
        model, config.parallel, world, device, unused=lambda name: part_of(name) == "head" and not heads
    )
    average = Average(trained_parameters(model, config.frozen), config.ema) if config.ema else None
    step = checkpoint_step(resume) if resume else 0
    if world.rank == 0:
        total, seen = stages[-1].last_sample, samples_seen(stages, step)
        monitor = Monitor(folder, total, samples_seen=seen, resume_step=step, shown=SHOWN)
    else:
        monitor = NoMonitor()
    run = Run(
        config,
        folder,
        world,
        model,
        engine,
        average,
        precision,
        monitor,
        stop,
        Saver(
            folder / "checkpoints",
            keep=config.keep_checkpoints,
            world=world,
            background=config.background_saves,
            device=device,
        ),
        FiniteWatch(folder, config.max_skipped, world, state.get("skipped_steps", 0)),
        evaluate,
        resume,
        step,
        BadSamples(world, monitor, state.get("bad_samples", 0)),
        left_out,
        given,
        samples_seen(stages, step),
    )
    within = any(stage.first_step < step < stage.last_step for stage in stages)
    if resume and not within:  # else it is read with the optimizer's state
        load_checkpoint(resume, run.modules, ignore=left_out, world=run.saver.world)
    return run


def samples_seen(stages: list[Stage], step: int) -> int:
    """Samples of a run after `step`."""
    return next(stage.samples_seen(step) for stage in stages if step <= stage.last_step)


def train_stage(run: Run, stage: Stage) -> None:
    """Trains what is left of a stage: batch, losses and gradients, step, log, evaluate, save."""
    config, model, monitor, world = run.config, run.model, run.monitor, run.world
    optimizer = build_optimizer(model, config.optimizer)  # fresh in each stage
    if run.resume and run.step > stage.first_step:
        load_checkpoint(run.resume, run.modules, optimizer, ignore=run.unsaved, world=run.saver.world)
    objective = build_objective(config, stage, model, run.precision, world, run.engine)
    stream = open_stream(config, stage, run.step, model.tokenizer, world.rank, world.size)
    save = False  # a checkpoint is due

    for batch in monitor.waiting(stream):
        run.step += 1
        learning_rate = stage.learning_rate(run.step)
        set_learning_rate(optimizer, learning_rate)
        seen, last = stage.samples_seen(run.step), run.step == stage.last_step
        losses = train_step(run, objective.backward, batch, optimizer)
        run.bad.waiting += batch.bad
        monitor.advance(seen)
        log = run.step % config.log_every == 0 or run.step == 1 or last
        evaluate = stage.due(run.step, config.eval_every)
        save = save or stage.due(run.step, config.checkpoint_every)
        if log or evaluate or save:
            settle(run.watch, monitor, run.saver)
        if log:
            run.bad.report(run.step, seen)
            monitor.log(run.step, seen, log_row(run, learning_rate, losses))
        if evaluate:
            evaluate_now(run, stage, seen)
        if evaluate or run.step == 1:
            measure_now(run, stage, seen)
        signal_number = world.largest(run.stop.signal_number)  # asked once: a signal may come at any moment
        if (save and not run.watch.in_a_row) or last or signal_number:
            save_now(run, optimizer, seen)
            save = False
        if signal_number and not last:
            run.saver.finish()
            where = f"stopped after {seen:,} samples, saved in {run.folder}; the same command goes on from there"
            raise RunInterrupted(where, signal_number)
    assert run.step == stage.last_step, (run.step, stage.last_step)


def train_step(
    run: Run, backward: Callable[[Batch], dict[str, Tensor]], batch: Batch, optimizer: Optimizer
) -> dict[str, Tensor]:
    """One step, which leaves everything as it was where losses or gradient are not finite; returns the losses.

    With AdamW nothing waits for what the device does in it: only the step before is waited for, and by then the device
    has this one's losses and gradient to work on.
    """
    model, rms = run.model, run.model.token_rms.clone()
    losses = backward(batch)
    losses["grad_norm"] = clip_gradients(model, run.config.optimizer.clip_norm)
    settle(run.watch, run.monitor, run.saver)  # the step before
    skip = run.watch.see(run.step, batch, losses)
    model.token_rms.copy_(torch.where(skip > 0, rms, model.token_rms))
    step_unless(optimizer, skip)
    model.clamp_logit_scale()
    if run.average is not None:
        run.average.update(run.step, skip)
    optimizer.zero_grad()
    return losses


def log_row(run: Run, learning_rate: float, losses: dict[str, Tensor]) -> dict[str, float]:
    """One step's numbers: every loss of Eq. 6 by part, and the state of the optimization."""
    row = {name: float(value) for name, value in losses.items()}
    clip = run.config.optimizer.clip_norm
    clipped = float(0 < clip < row["grad_norm"])
    counts = {"bad_samples": float(run.bad.count), "skipped_steps": float(run.watch.skipped)}
    return {**row, "clipped": clipped, "learning_rate": learning_rate, **counts}


def evaluate_now(run: Run, stage: Stage, samples_seen: int) -> None:
    """Writes sample pictures and records the figures of `run.evaluate`, outside of the training rate."""
    with run.monitor.paused():
        model = whole_model(run)
        if model is not None:
            model.eval()
            pixels = picture_pixels(run.config, stage.config.resolution)
            run.monitor.save_pictures(f"step_{run.step}", picture_columns(model, pixels))
            if run.evaluate is not None:
                run.monitor.record("eval", run.step, samples_seen, run.evaluate(model, run.step))
        run.world.wait_for_first()
        set_training(run.model, run.config.frozen)


def measure_now(run: Run, stage: Stage, samples_seen: int) -> None:
    """Records the synergy meter's figures, outside of the training rate; without a trained encoder there are none."""
    if not run.config.meter_samples or "encoder" in run.config.frozen:
        return
    with run.monitor.paused():
        model = whole_model(run)
        if model is not None:
            model.eval()
            run.monitor.record("meter", run.step, samples_seen, measure_synergy(run.config, stage, model))
        run.world.wait_for_first()
        set_training(run.model, run.config.frozen)


@torch.no_grad()
def whole_model(run: Run) -> OpenVision3 | None:
    """The model to evaluate or keep, in the first process; None in the others, which help to put it together.

    It is the run's own model, or where that is sharded or averaged, or in fp64, a copy, of the averages if there are.
    """
    model = run.model
    if run.average is None and run.precision != "fp64" and not isinstance(run.engine, Sharded):
        return model if run.world.rank == 0 else None
    target = None
    if run.world.rank == 0:
        target = OpenVision3(model.config, None, model.tokenizer).to(model.device)
        if model.vae is not None:
            target.attach_vae(copy.deepcopy(model.vae).float() if run.precision == "fp64" else model.vae)
        if isinstance(target.encoder, ExternalEncoder) and isinstance(model.encoder, ExternalEncoder):
            target.encoder.attach(model.encoder.tower)
    averages = {} if run.average is None else run.average.values()
    places = {} if target is None else named_tensors({"model": target}, (VAE,))
    for name, tensor in named_tensors({"model": model}, (VAE,)).items():
        value = whole_tensor(averages.get(name.removeprefix("model."), tensor))
        if target is not None:
            places[name].copy_(value)
    return target


def save_now(run: Run, optimizer: Optimizer, samples_seen: int) -> None:
    """Saves a checkpoint, after the records that it counts on."""
    settle(run.watch, run.monitor, run.saver)
    run.bad.report(run.step, samples_seen)
    with run.monitor.paused():
        run.monitor.flush()
        state = {"samples_seen": samples_seen, "bad_samples": run.bad.count, "skipped_steps": run.watch.skipped}
        state |= {name: value for name, value in run.given.items() if value}
        tensors = checkpoint_tensors(run.modules, optimizer, run.unsaved)
        every = run.config.keep_every
        lasting = every > 0 and samples_seen // every > run.saved_samples // every
        run.saver.save(run.step, tensors, state, lasting)
        run.saved_samples = samples_seen
