"""The plan of a run: what each optimizer step trains on, counted in samples, and when something is due."""

import math
from dataclasses import dataclass

from openvision3.config import OpenVisionError, StageConfig, TrainConfig
from openvision3.training.frozen import trained_losses
from openvision3.training.optimizer import warmup_cosine

SMALLEST_LPIPS_SIDE = {"alex": 31, "vgg": 16}  # pixels


@dataclass(frozen=True)
class Stage:
    """A stage's place in the run. Steps count from 1 over the whole run; so do sample positions, from 0."""

    number: int  # 1 or 2
    config: StageConfig
    first_step: int  # steps before this stage
    first_sample: int  # samples before this stage

    @property
    def steps(self) -> int:
        """Whole batches that hold at least `config.samples`."""
        return math.ceil(self.config.samples / self.config.batch_size)

    @property
    def last_step(self) -> int:
        return self.first_step + self.steps

    @property
    def last_sample(self) -> int:
        return self.samples_seen(self.last_step)

    def samples_seen(self, step: int) -> int:
        """Samples seen by the run after `step`."""
        return self.first_sample + (step - self.first_step) * self.config.batch_size

    def learning_rate(self, step: int) -> float:
        """Peak rate times warm-up and cosine, at the middle of the step's samples (so it is never 0 in a step)."""
        batch_size = self.config.batch_size
        middle = (step - self.first_step - 0.5) * batch_size
        return self.config.peak_lr * warmup_cosine(middle, self.config.warmup_samples, self.steps * batch_size)

    def due(self, step: int, every: int) -> bool:
        """Whether `step` is the stage's last or crosses a multiple of `every` samples (0: the last only)."""
        if step == self.last_step:
            return True
        return every > 0 and self.samples_seen(step) // every > self.samples_seen(step - 1) // every


def plan(config: TrainConfig) -> list[Stage]:
    """The stages of a run in order, those of 0 samples left out."""
    stages: list[Stage] = []
    for number, stage in enumerate((config.stage1, config.stage2), start=1):
        if stage.samples > 0:
            before = stages[-1] if stages else None
            first = (before.last_step, before.last_sample) if before else (0, 0)
            stages.append(Stage(number, stage, *first))
    return stages


def validate(config: TrainConfig) -> None:
    """Checks what a recipe must hold to run; raises `OpenVisionError` that names the field, its value and its range."""
    _require(bool(config.stages), "stage1.samples and stage2.samples are both 0: nothing to train")
    for name, stage in (("stage1", config.stage1), ("stage2", config.stage2)):
        if stage.samples == 0:
            continue
        side, multiple = stage.resolution, config.model.downsampling
        _require(stage.samples > 0, f"{name}.samples is {stage.samples}: expected at least 0")
        _require(stage.batch_size > 0, f"{name}.batch_size is {stage.batch_size}: expected at least 1")
        _require(side > 0 and side % multiple == 0, f"{name}.resolution is {side}: expected a multiple of {multiple}")
        _require(
            stage.warmup_samples < stage.samples,
            f"{name}.warmup_samples is {stage.warmup_samples}: expected fewer than {name}.samples = {stage.samples}",
        )
        if stage.lpips_weight > 0:
            smallest = SMALLEST_LPIPS_SIDE[config.loss.lpips_net]
            _require(config.model.decoder is not None, f"{name}.lpips_weight is set, but model.decoder is None")
            _require(side >= smallest, f"{name}.resolution is {side}: LPIPS needs at least {smallest}")
    model = config.model
    _require(
        any(part is not None for part in (model.decoder, model.text_encoder, model.text_decoder)),
        "the model has no decoder, text encoder or text decoder: no loss to train on",
    )
    _validate_parts(config)
    text = model.text_encoder is not None or model.text_decoder is not None
    left = {"none": True, "both": True, "reconstruction": text, "understanding": model.decoder is not None}
    _require(left[config.loss.detach], f"loss.detach is {config.loss.detach}: no other loss would train the encoder")
    _require(0 <= config.ema < 1, f"ema is {config.ema:g}: expected at least 0 and less than 1")
    for name, value, least in (
        ("loss.pixel_stride", config.loss.pixel_stride, 1),
        ("micro_batch", config.micro_batch, 0),
        ("vae_batch", config.vae_batch, 0),
        ("log_every", config.log_every, 1),
        ("keep_checkpoints", config.keep_checkpoints, 1),
        ("eval_every", config.eval_every, 0),
        ("meter_samples", config.meter_samples, 0),
        ("checkpoint_every", config.checkpoint_every, 0),
        ("keep_every", config.keep_every, 0),
        ("max_skipped", config.max_skipped, 1),
    ):
        _require(value >= least, f"{name} is {value}: expected at least {least}")


def _validate_parts(config: TrainConfig) -> None:
    """What is new, what is frozen, and that something is left to train."""
    model, frozen = config.model, config.frozen
    _require(bool(config.init) or not (config.attach or frozen), "attach and freeze need a model to start from: --init")
    for part in config.attach:
        there = part in ("encoder", "head") or getattr(model, part) is not None
        _require(there, f"attach names {part}, but model.{part} is None")
    parts = ", ".join(frozen)
    _require(bool(trained_losses(model, frozen)), f"all that the losses need is frozen ({parts}): nothing to train")
    text = "text_encoder" in config.attach or "text_decoder" in config.attach
    _require(text or config.vocabulary == "demo", "vocabulary is of attached text towers, and none is attached")
    if model.external is not None:
        _require("encoder" in frozen, "model.external is another library's encoder: freeze must name 'encoder'")
        for stage in config.stages:
            side = model.image_size
            _require(stage.resolution == side, f"resolution is {stage.resolution}: the encoder reads {side} alone")


def _require(right: bool, message: str) -> None:
    if not right:
        raise OpenVisionError(message)
