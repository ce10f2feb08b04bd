"""The trainings that claims compare: one recipe, each changed in one place, and the same scenes for all."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from openvision3.config import Detached, OpenVisionError, SceneConfig, StageConfig, TrainConfig
from openvision3.recipes import demo

RESOLUTION, BATCH = 64, 64  # pixels; samples
NAMES = 30  # things: few enough that their names are learned within minutes
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Length:
    """How much an arm sees, and how often and on how much it is measured."""

    samples: int = 6_016  # scenes, whole batches
    points: int = 6  # of the curves, after the one at the first step
    meter_samples: int = 192  # held-out scenes of the curves
    eval_samples: int = 500  # scenes of `scenes-v1` with the arms' own distribution, at the end

    def __post_init__(self) -> None:
        if self.samples < 2 * BATCH:
            raise OpenVisionError(f"samples is {self.samples}: an arm needs at least {2 * BATCH}, two batches")


QUICK = Length(samples=192, points=2, meter_samples=32, eval_samples=48)


@dataclass(frozen=True)
class Arm:
    """One training: what is different in it."""

    name: str
    words: str
    change: Callable[[TrainConfig], TrainConfig]


def _probing(detach: Detached) -> Callable[[TrainConfig], TrainConfig]:
    return lambda config: replace(config, loss=replace(config.loss, detach=detach))


def _noise(tau: float) -> Callable[[TrainConfig], TrainConfig]:
    return lambda config: replace(config, model=replace(config.model, noise_tau=tau))


def _pixels(config: TrainConfig) -> TrainConfig:
    return replace(config, model=replace(config.model, input="pixels", patch_size=16, in_channels=3))


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("unified", "all losses train the encoder (noise tau 0.1)", lambda config: config),
        Arm("understanding", "L_und alone trains the encoder; the decoder is a probe", _probing("reconstruction")),
        Arm("reconstruction", "L_rec alone trains the encoder; head and text towers are probes",
            _probing("understanding")),
        Arm("untrained", "nothing trains the encoder; all else are probes (a control, not in the paper)",
            _probing("both")),
        Arm("pixels", "as unified, on RGB patches of 16 in place of latents", _pixels),
        *(Arm(f"noise-{tau:g}", f"as unified, with noise tau {tau:g}", _noise(tau)) for tau in (0.0, 0.3, 0.8)),
    )
}  # fmt: skip


def arm_config(arm: str, seed: int, length: Length, out: Path, precision: Precision = "fp32") -> TrainConfig:
    """The arm's recipe: `demo`'s first stage, shortened, on fewer things. `seed`: of weights, noise and scenes."""
    base = demo()
    scenes = SceneConfig(num_names=NAMES, size_min=0.4, size_max=0.8, count_weights=(0.8, 0.2, 0.0, 0.0))
    batches = length.samples // BATCH
    stage = replace(
        base.stage1,
        resolution=RESOLUTION,
        samples=batches * BATCH,
        warmup_samples=min(base.stage1.warmup_samples, batches * BATCH // 10),
        batch_size=BATCH,
        scenes=None,
    )
    config = replace(
        base,
        recipe=f"reproduce-{arm}",
        data=replace(base.data, scenes=scenes, seed=seed, num_workers=0),
        stage1=stage,
        stage2=StageConfig(samples=0),
        seed=seed,
        precision=precision,
        out=str(out),
        eval_every=max(1, stage.samples // length.points),
        eval_samples=length.eval_samples,
        meter_samples=length.meter_samples,
        checkpoint_every=max(BATCH, stage.samples // 4),
        keep_checkpoints=1,
    )
    return ARMS[arm].change(config)
