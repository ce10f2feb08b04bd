"""The loop of recipes that learn from pictures alone, in one process: the tiny VAE, and fast encoders for any VAE."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from openvision3.config import DistillConfig, OpenVisionError, VAETrainConfig
from openvision3.training import optimizer as optim
from openvision3.training.checkpoint import checkpoint_tensors, latest_checkpoint, load_checkpoint, save_checkpoint
from openvision3.training.monitor import Monitor
from openvision3.training.precision import Precision, choose_precision
from openvision3.training.run_folder import RunInterrupted, StopRequest, record_environment, recorded_environment

# images (B, 3, R, R) in [-1, 1], step (from 1; 0 in the trial that chooses the precision) and precision -> losses by
# name, with their "total"
Losses = Callable[[Tensor, int, Precision], dict[str, Tensor]]


@dataclass(frozen=True)
class PictureTask:
    """What a recipe learns from its pictures."""

    name: str  # of the module in checkpoints
    module: nn.Module  # is trained; on its device
    resolution: int  # pixels
    losses: Losses
    batches: Callable[[int], Iterable[Tensor]]  # step -> the uint8 batches (B, 3, R, R) after it, to the run's end
    evaluate: Callable[[nn.Module], Mapping[str, float]]  # figures of the averaged module
    shown: Sequence[str]  # losses on the console
    given: Mapping[str, str] = field(default_factory=dict)  # what a resume must find as it was: name -> fingerprint


def train_on_pictures(
    config: VAETrainConfig | DistillConfig, task: PictureTask, folder: Path, device: torch.device
) -> nn.Module:
    """Trains a module in an open run folder, from its newest checkpoint where it has one; returns the average.

    Raises `RunInterrupted` after a signal, and `OpenVisionError` where a loss is not finite.
    """
    module, size = task.module, config.batch_size
    steps = config.samples // size
    average = copy.deepcopy(module)
    o = config.optimizer
    optimizer = optim.adamw(module, o.beta1, o.beta2, o.eps, o.weight_decay)
    modules = {task.name: module, "average": average}
    resume = latest_checkpoint(folder / "checkpoints")
    step = load_checkpoint(resume, modules, optimizer)["step"] if resume else 0
    precision = _settle_precision(config, task, folder, device)

    with (
        StopRequest() as stop,
        Monitor(folder, steps * size, samples_seen=step * size, resume_step=step, shown=task.shown) as monitor,
    ):
        for batch in task.batches(step):
            step += 1
            seen = step * size
            rate = config.peak_lr * optim.warmup_cosine(seen - size / 2, config.warmup_samples, config.samples)
            optim.set_learning_rate(optimizer, rate)
            losses = task.losses(to_images(batch, device), step, precision)
            losses["total"].backward()
            norm = optim.clip_gradients(module, o.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            update_average(average, module, min(config.ema, step / (step + 10)))
            monitor.advance(seen)

            if step % config.log_every == 0 or step == steps:
                values = {name: value.item() for name, value in losses.items()}
                if not all(map(math.isfinite, values.values())):
                    raise OpenVisionError(f"{folder}: a loss is not finite at step {step}: {values}")
                monitor.log(step, seen, {**values, "grad_norm": float(norm), "lr": rate})
            if _due(seen, size, config.eval_every) or step == steps:
                with monitor.paused():
                    figures = task.evaluate(average)
                    monitor.record("eval", step, seen, figures)
                    monitor.say("  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
            if _due(seen, size, config.checkpoint_every) or step == steps or stop:
                monitor.flush()
                tensors = checkpoint_tensors(modules, optimizer)
                save_checkpoint(folder / "checkpoints", step, tensors, {"step": step}, keep=config.keep_checkpoints)
            if stop and step < steps:
                raise RunInterrupted(f"stopped at {seen:,} samples; the same command resumes it", stop.signal_number)
    return average


def _settle_precision(
    config: VAETrainConfig | DistillConfig, task: PictureTask, folder: Path, device: torch.device
) -> Precision:
    """As configured, or the faster by trial; recorded at the first start, kept at each resume."""
    recorded = recorded_environment(folder)
    if recorded is not None:
        for name, value in task.given.items():
            if recorded.get(name) != value:
                raise OpenVisionError(f"{folder} began with another {name}; choose another folder (--out)")
        return recorded["precision"]
    shape = (config.batch_size, 3, task.resolution, task.resolution)
    noise = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = to_images(noise, device)
    precision = choose_precision(config.precision, device, lambda p: task.losses(images, 0, p)["total"].backward())
    task.module.zero_grad()
    record_environment(folder, device, precision=precision, **task.given)
    return precision


def to_images(batch: Tensor, device: torch.device) -> Tensor:
    """uint8 pictures (B, 3, R, R) to images in [-1, 1] on the device, channels last."""
    return (batch.to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def update_average(average: nn.Module, online: nn.Module, decay: float) -> None:
    """Moves the averaged weights towards the online ones: `average = decay * average + (1 - decay) * online`."""
    for mine, theirs in zip(average.parameters(), online.parameters(), strict=True):
        mine.lerp_(theirs, 1 - decay)


def _due(seen: int, batch_size: int, every: int) -> bool:
    return every > 0 and seen // every > (seen - batch_size) // every
