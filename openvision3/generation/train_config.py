"""Everything that defines the training of a generator."""

from dataclasses import dataclass
from typing import Literal

from openvision3.config import DataConfig, OpenVisionError, OptimizerConfig, ParallelKind, resumable
from openvision3.generation.config import GeneratorConfig

# what is generated: the model's unified tokens, or its VAE's latents in patches of the same grid (for comparison)
Space = Literal["tokens", "latents"]


@dataclass(frozen=True)
class GeneratorTrainConfig:
    """Training of a DiT-DH on a frozen model's tokens (RAE, arXiv 2510.11690; docs/GENERATION.md).

    Token width, grid, and sizes of the text's features are the model's: what the recipe says of them is replaced.
    """

    recipe: str
    generator: GeneratorConfig
    model: str = "demo"  # the frozen encoder and decoder: folder, or hub id
    init: str = ""  # generator folder, or run, to start from: its weights and statistics; empty: random weights
    space: Space = "tokens"
    classes: tuple[str, ...] = ()  # names of the classes; empty: the texts are their numbers
    data: DataConfig = DataConfig()
    resolution: int = 0  # pixels; 0: the model's own
    samples: int = 1_000_000
    batch_size: int = 1024  # global
    warmup_samples: int = 0
    decay_samples: int = 0  # at the end: the rate goes linearly from peak to final
    peak_lr: float = 2e-4
    final_lr: float = 2e-5
    optimizer: OptimizerConfig = OptimizerConfig(weight_decay=0.0)
    ema: float = 0.9995  # per step
    statistics: str = ""  # file of `ov3 generate stats`; empty: made at the start, of the first `statistics_samples`
    statistics_samples: int = 50_000
    draws: int = 1  # times and noises for each encoded sample
    seed: int = 0  # of initial weights, times and noise
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # "auto": the faster, timed at the start, then kept
    micro_batch: int = resumable(0)  # samples a forward pass; 0: all of a process
    checkpoint_blocks: bool = resumable(False)  # recompute blocks in the backward pass
    compile: bool = resumable(False)  # compile each block
    parallel: ParallelKind = resumable("ddp")
    max_skipped: int = resumable(10)  # steps in a row that are not finite, before the run stops
    out: str = resumable("")  # run folder; empty: runs/RECIPE
    log_every: int = resumable(10)  # steps
    sheet_every: int = resumable(0)  # samples between sheets of generated pictures; 0: at the end only
    sheet_steps: int = resumable(25)  # of the sampler, for sheets
    checkpoint_every: int = resumable(0)  # samples; 0: at the end only
    keep_checkpoints: int = resumable(2)
    background_saves: bool = resumable(False)

    @property
    def steps(self) -> int:
        """Whole batches that hold at least `samples`."""
        return -(-self.samples // self.batch_size)

    def learning_rate(self, samples_seen: float) -> float:
        """Linear warm-up, then constant, then linear to `final_lr` at the end (RAE, appendix)."""
        if samples_seen < self.warmup_samples:
            return self.peak_lr * samples_seen / self.warmup_samples
        left = self.steps * self.batch_size - samples_seen
        share = min(1.0, max(0.0, left / self.decay_samples)) if self.decay_samples else 1.0
        return self.final_lr + (self.peak_lr - self.final_lr) * share


def validate(config: GeneratorTrainConfig) -> None:
    """Raises `OpenVisionError` that names the field, its value and its range."""
    least = {
        "samples": 1, "batch_size": 1, "warmup_samples": 0, "decay_samples": 0, "statistics_samples": 2, "draws": 1,
        "micro_batch": 0, "log_every": 1, "keep_checkpoints": 1, "checkpoint_every": 0, "sheet_every": 0,
        "sheet_steps": 1, "max_skipped": 1, "resolution": 0,
    }  # fmt: skip
    for name, lowest in least.items():
        if (value := getattr(config, name)) < lowest:
            raise OpenVisionError(f"{name} is {value}: expected at least {lowest}")
    if not 0 <= config.ema < 1:
        raise OpenVisionError(f"ema is {config.ema:g}: expected at least 0 and less than 1")
    if config.classes and config.generator.condition == "class" and len(config.classes) != config.generator.num_classes:
        raise OpenVisionError(
            f"classes has {len(config.classes)} names, generator.num_classes is {config.generator.num_classes}"
        )
    if config.warmup_samples + config.decay_samples > config.steps * config.batch_size:
        raise OpenVisionError("warmup_samples and decay_samples together are more than samples")
