"""The training loop of a generator on a frozen model's tokens: one process or many, exact to resume.

The run's folder, its records, checkpoints, signals and processes are those of the encoder's training
(`training/loop.py`); so is the stream of samples, a function of (seed, samples seen).
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from openvision3.config import OpenVisionError
from openvision3.data import demo
from openvision3.data.batches import Batch
from openvision3.distributed import World
from openvision3.generation import gather
from openvision3.generation.conditions import conditions
from openvision3.generation.config import GeneratorConfig
from openvision3.generation.data import held_out, latents_of, open_batches
from openvision3.generation.dit import DiT
from openvision3.generation.folder import (
    Description,
    load_weights,
    read_description,
    save_generator,
    text_fingerprint,
)
from openvision3.generation.generator import generator_folder
from openvision3.generation.layers import DiTBlock
from openvision3.generation.objective import FlowObjective
from openvision3.generation.sample import SamplerConfig, sample
from openvision3.generation.space import PictureSpace
from openvision3.generation.statistics import Normalizer, TokenStatistics
from openvision3.generation.train_config import GeneratorTrainConfig, validate
from openvision3.hub.load import load
from openvision3.training.checkpoint import (
    Saver,
    checkpoint_step,
    checkpoint_tensors,
    latest_checkpoint,
    load_checkpoint,
    named_tensors,
    read_state,
)
from openvision3.training.ema import Average
from openvision3.training.loop import entered_run
from openvision3.training.monitor import Monitor, NoMonitor
from openvision3.training.optimizer import build_optimizer, clip_gradients, set_learning_rate, step_unless
from openvision3.training.parallel import Engine, Sharded, build_engine, compile_blocks, open_world, whole_tensor
from openvision3.training.precision import Precision, autocast, choose_precision
from openvision3.training.run_folder import RunInterrupted, StopRequest, record_environment, recorded_environment
from openvision3.training.watch import BadSamples, FiniteWatch, settle

SHEET = 8  # pictures
STATISTICS = "statistics.safetensors"
_TRIAL = 16  # samples, at most, of the step that is timed to choose the precision


@dataclass
class Run:
    """What goes on from step to step."""

    config: GeneratorTrainConfig
    folder: Path
    world: World
    space: PictureSpace
    dit: DiT
    normalizer: Normalizer
    engine: Engine
    average: Average | None
    optimizer: Optimizer
    precision: Precision
    monitor: Monitor | NoMonitor
    saver: Saver
    watch: FiniteWatch
    given: dict[str, str]  # what a resumed run must find as it was
    step: int
    bad: BadSamples

    @property
    def modules(self) -> dict[str, Any]:
        """What checkpoints hold, besides the optimizer's state."""
        return {"dit": self.dit} | ({} if self.average is None else {"average": self.average.values()})


def run_folder(config: GeneratorTrainConfig) -> Path:
    """Where a run lives: `config.out`, or runs/RECIPE."""
    return Path(config.out) if config.out else Path("runs") / config.recipe


def train(config: GeneratorTrainConfig, device: str = "auto") -> Path:
    """Trains a generator in its run folder, or resumes what is there; returns the folder, with `generator/` in it.

    Raises `OpenVisionError` where the run can't go on, and `RunInterrupted` after SIGINT, SIGTERM or SIGUSR1, with a
    checkpoint saved.
    """
    with open_world(device) as (world, place):
        world.agree(lambda: validate(config))
        if config.batch_size % world.size:
            raise OpenVisionError(f"batch_size {config.batch_size} can't be shared by {world.size} processes equally")
        space = open_space(config, place)
        config = settled(config, space)
        with (
            entered_run(run_folder(config), config, world) as folder,
            StopRequest() as stop,
        ):
            resume = world.agree(lambda: latest_checkpoint(folder / "checkpoints"))
            if resume and checkpoint_step(resume) == config.steps and (folder / "generator").exists():
                if world.rank == 0:
                    print(f"{folder} is complete: its generator is in {folder / 'generator'}")
                return folder
            run = begin(config, folder, world, space, resume)
            with run.monitor:
                if resume:
                    run.monitor.say(f"resuming {folder} after {run.step * config.batch_size:,} samples")
                try:
                    train_steps(run, stop)
                finally:
                    if world.size == 1:
                        run.saver.finish()
                run.saver.finish()
            keep(run)
            world.agree(lambda: None)  # the folder is there before any process ends
    return folder


def open_space(config: GeneratorTrainConfig, device: torch.device | str) -> PictureSpace:
    """The frozen model's space, fp32 weights."""
    model = load(config.model, device=device, dtype=torch.float32)
    return PictureSpace(model, config.space, config.resolution)


def settled(config: GeneratorTrainConfig, space: PictureSpace) -> GeneratorTrainConfig:
    """The config with the sizes that the frozen model decides."""
    sizes: dict[str, Any] = {"token_width": space.width, "grid": space.grid}
    tower = space.model.config.text_encoder
    if config.generator.condition == "text":
        if tower is None or space.model.tokenizer is None:
            raise OpenVisionError(
                f"model {config.model!r} has no text encoder with a tokenizer: use --generator.condition class"
            )
        sizes |= {"text_width": tower.transformer.width, "text_embed_dim": space.model.config.embed_dim}
        sizes |= {"text_length": tower.context_length}
    generator: GeneratorConfig = replace(config.generator, **sizes)
    return replace(config, generator=generator, resolution=space.resolution)


def begin(config: GeneratorTrainConfig, folder: Path, world: World, space: PictureSpace, resume: Path | None) -> Run:
    """Builds or loads what the run trains."""
    state = read_state(resume) if resume else {}
    device = space.model.device
    torch.manual_seed(config.seed)
    dit = DiT(config.generator).to(device).train()
    started = start_from(config.init, dit, space) if config.init else None
    normalizer = started or settle_statistics(config, folder, world, space)
    given = {"space": space.fingerprint, "latents": latents_of(config, space.model)[1]}
    given["statistics"] = normalizer.fingerprint()
    if config.generator.condition == "text":
        given["text"] = text_fingerprint(space.model)
    for name, value in given.items():
        if state.get(name, value) != value:
            raise OpenVisionError(f"{name}: not what it was when {folder} began; it can't be resumed")
    dit.checkpoint_blocks = config.checkpoint_blocks
    precision: Precision = world.agree(lambda: settle_precision(config, folder, space, dit, normalizer))
    if config.compile:
        compile_blocks(dit, (DiTBlock,))
    engine = build_engine(dit, config.parallel, world, device, blocks=(DiTBlock,))
    average = Average(dict(dit.named_parameters()), config.ema) if config.ema else None
    optimizer = build_optimizer(dit, config.optimizer)
    step = checkpoint_step(resume) if resume else 0
    monitor: Monitor | NoMonitor = NoMonitor()
    if world.rank == 0:
        total, seen = config.steps * config.batch_size, step * config.batch_size
        shown = ("total", "early", "late")
        monitor = Monitor(folder, total, samples_seen=seen, resume_step=step, shown=shown)
    saver = Saver(
        folder / "checkpoints",
        keep=config.keep_checkpoints,
        world=world,
        background=config.background_saves,
        device=device,
    )
    watch = FiniteWatch(folder, config.max_skipped, world, state.get("skipped_steps", 0))
    run = Run(
        config, folder, world, space, dit, normalizer, engine, average, optimizer, precision, monitor, saver, watch,
        given, step, BadSamples(world, monitor, state.get("bad_samples", 0)),
    )  # fmt: skip
    if resume:
        load_checkpoint(resume, run.modules, optimizer, world=saver.world)
    return run


def start_from(name: str, dit: DiT, space: PictureSpace) -> Normalizer:
    """Copies a generator's weights; returns its statistics. Raises `OpenVisionError` where it is another's."""
    folder = generator_folder(name)
    source, normalizer = load_weights(folder, read_description(folder), space)
    mine, theirs = dit.state_dict(), source.state_dict()
    shapes = [{key: tensor.shape for key, tensor in state.items()} for state in (mine, theirs)]
    for key, _ in sorted(shapes[0].items() ^ shapes[1].items()):
        raise OpenVisionError(f"init: {folder} and the recipe's generator differ in {key}")
    dit.load_state_dict(theirs)
    return normalizer


def settle_statistics(config: GeneratorTrainConfig, folder: Path, world: World, space: PictureSpace) -> Normalizer:
    """The tokens' mean and standard deviation: from `config.statistics`, the run's own file, or the data, at once."""
    path = Path(config.statistics).expanduser() if config.statistics else folder / STATISTICS
    there = world.agree(lambda: bool(config.statistics) or path.exists())
    if not there:
        if world.rank == 0:
            print(f"gathering the statistics of {config.statistics_samples:,} samples' tokens")
        total = gather.gather(space, statistics_batches(config, folder, world, space))
        parts = [TokenStatistics.from_state(state) for state in world.gather_objects(total.state())]
        if world.rank == 0:
            found = gather.merged(parts)
            gather.save_statistics(path, found, gather.describe(space, samples=int(found.count)))
        world.agree(lambda: None)
    statistics, record = gather.load_statistics(path)
    gather.check_fits(path, record, space)
    gather.enough(statistics, str(path))
    return Normalizer(statistics.mean, statistics.std).to(space.model.device)


def statistics_batches(config: GeneratorTrainConfig, folder: Path, world: World, space: PictureSpace) -> Any:
    """This process's share of the first samples of the run's own stream, as many as statistics are made of."""
    size = min(config.batch_size, 64 * world.size) // world.size * world.size
    count = max(size, min(config.statistics_samples, config.steps * config.batch_size) // size * size)
    return open_batches(
        config, space.model, folder, start=0, stop=count, batch_size=size, rank=world.rank, world_size=world.size
    )


def settle_precision(
    config: GeneratorTrainConfig, folder: Path, space: PictureSpace, dit: DiT, normalizer: Normalizer
) -> Precision:
    """As configured, or the faster by trial; recorded at the first start, kept at each resume."""
    recorded = recorded_environment(folder)
    if recorded is not None and recorded.get("precision") in ("bf16", "fp32"):
        return recorded["precision"]
    size = min(_TRIAL, config.batch_size)
    stream = open_batches(
        replace(config, data=replace(config.data, num_workers=0)), space.model, folder, start=0, stop=size,
        batch_size=size,
    )  # fmt: skip
    batch = next(iter(stream)) if config.precision == "auto" else None

    def run_step(precision: Precision) -> None:
        assert batch is not None
        FlowObjective(dit, normalizer, space, config, precision).backward(batch)
        dit.zero_grad()

    precision = choose_precision(config.precision, space.model.device, run_step)
    record_environment(folder, space.model.device, precision=precision)
    return precision


def train_steps(run: Run, stop: StopRequest) -> None:
    """What is left of the run: batch, loss and gradient, step, average, log, sheet, save."""
    config, monitor, size = run.config, run.monitor, run.config.batch_size
    objective = FlowObjective(run.dit, run.normalizer, run.space, config, run.precision, run.world, run.engine)
    total = config.steps * size
    stream = open_batches(
        config, run.space.model, run.folder, start=run.step * size, stop=total, rank=run.world.rank,
        world_size=run.world.size,
    )  # fmt: skip
    for batch in monitor.waiting(stream):
        run.step += 1
        seen, last = run.step * size, run.step == config.steps
        rate = config.learning_rate(seen - size / 2)
        set_learning_rate(run.optimizer, rate)
        losses = train_step(run, objective, batch)
        run.bad.waiting += batch.bad
        monitor.advance(seen)
        due = config.checkpoint_every and seen // config.checkpoint_every > (seen - size) // config.checkpoint_every
        log = run.step % config.log_every == 0 or run.step == 1 or last
        if log or due:
            settle(run.watch, monitor, run.saver)
        if log:
            run.bad.report(run.step, seen)
            row = {name: float(value) for name, value in losses.items()}
            monitor.log(run.step, seen, {**row, "learning_rate": rate, "skipped_steps": float(run.watch.skipped)})
        if last or (config.sheet_every and seen // config.sheet_every > (seen - size) // config.sheet_every):
            write_sheet(run)
        signal_number = run.world.largest(stop.signal_number)
        if (due and not run.watch.in_a_row) or last or signal_number:
            save(run, seen)
        if signal_number and not last:
            run.saver.finish()
            where = f"stopped after {seen:,} samples, saved in {run.folder}; the same command goes on from there"
            raise RunInterrupted(where, signal_number)


def train_step(run: Run, objective: FlowObjective, batch: Batch) -> dict[str, Tensor]:
    """One step, which leaves the weights as they were where loss or gradient are not finite; returns the losses."""
    losses = objective.backward(batch)
    losses["grad_norm"] = clip_gradients(run.dit, run.config.optimizer.clip_norm)
    settle(run.watch, run.monitor, run.saver)  # the step before
    skip = run.watch.see(run.step, batch, losses)
    step_unless(run.optimizer, skip)
    if run.average is not None:
        run.average.update(run.step, skip)
    run.optimizer.zero_grad()
    return losses


def write_sheet(run: Run) -> None:
    """Pictures from the averaged weights beside held-out ones with the same texts."""
    with run.monitor.paused(), averaged(run) as dit:
        if dit is not None:
            pixels, texts = held_out(run.config, run.space.model, run.folder, SHEET)
            condition = conditions(run.space.model, run.config.generator, texts, run.config.classes)
            sampler = SamplerConfig(steps=run.config.sheet_steps)
            with autocast(run.space.model.device, run.precision):
                x = sample(dit, run.normalizer, condition, list(range(len(texts))), run.config.seed, sampler)
                images = run.space.decode(x).float()
            run.monitor.save_pictures(f"step_{run.step}", [pixels / 127.5 - 1, images.cpu()])
        run.world.wait_for_first()


@contextmanager
def averaged(run: Run) -> Iterator[DiT | None]:
    """The generator with averaged weights, whole, in the first process; None in the others.

    The averages take the weights' place for as long as that, but for shards: those are put together in a copy, for
    which every process must ask.
    """
    if isinstance(run.engine, Sharded):
        yield _gathered(run)
    elif run.world.rank:
        yield None
    else:
        with nullcontext() if run.average is None else run.average.swapped():
            yield run.dit.eval()
        run.dit.train()


@torch.no_grad()
def _gathered(run: Run) -> DiT | None:
    target = DiT(run.config.generator).to(run.space.model.device).eval() if run.world.rank == 0 else None
    places = {} if target is None else named_tensors({"dit": target})
    averages = {} if run.average is None else run.average.values()
    for name, tensor in named_tensors({"dit": run.dit}).items():
        value = whole_tensor(averages.get(name.removeprefix("dit."), tensor))
        if target is not None:
            places[name].copy_(value)
    return target


def save(run: Run, samples_seen: int) -> None:
    """Saves a checkpoint, after the records that it counts on."""
    settle(run.watch, run.monitor, run.saver)
    run.bad.report(run.step, samples_seen)
    with run.monitor.paused():
        run.monitor.flush()
        state = {"samples_seen": samples_seen, "bad_samples": run.bad.count, "skipped_steps": run.watch.skipped}
        tensors = checkpoint_tensors(run.modules, run.optimizer)
        run.saver.save(run.step, tensors, {**state, **run.given})


def keep(run: Run) -> None:
    """Writes the finished generator's folder."""
    with averaged(run) as dit:
        if dit is None:
            return
        if not all(bool(weight.isfinite().all()) for weight in dit.parameters()):
            raise OpenVisionError(f"{run.folder} ended with weights that are not finite: lower peak_lr")
        save_generator(run.folder / "generator", dit, run.normalizer, describe(run.config, run.space))


def describe(config: GeneratorTrainConfig, space: PictureSpace) -> Description:
    """What the generator's folder says of it; a folder of the frozen model by its absolute path."""
    model = str(Path(config.model).resolve()) if Path(config.model).is_dir() else config.model
    text = text_fingerprint(space.model) if config.generator.condition == "text" else ""
    data = config.data
    return Description(
        config.generator,
        model,
        config.space,
        space.resolution,
        space.fingerprint,
        text,
        config.classes,
        names=tuple(demo.names(data.scenes.num_names)) if data.sources == ("demo",) else (),
    )
