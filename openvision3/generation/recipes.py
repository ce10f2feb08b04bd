"""Named recipes of generators: functions that return a run's whole configuration (`ov3 generate train RECIPE`)."""

from collections.abc import Callable
from dataclasses import replace

from openvision3.config import DataConfig, OptimizerConfig, SceneConfig
from openvision3.generation.config import GeneratorConfig, StackConfig, named
from openvision3.generation.train_config import GeneratorTrainConfig

IMAGENET = 1_281_167  # pictures of an epoch


def demo_generator() -> GeneratorTrainConfig:
    """The embedded demo generator: one named thing a picture, from a caption, on the demo model's tokens."""
    scenes = SceneConfig(num_names=100, size_min=0.35, size_max=0.6, count_weights=(1.0, 0.0, 0.0, 0.0))
    return GeneratorTrainConfig(
        recipe="demo_generator",
        generator=GeneratorConfig(
            name="demo_generator",
            token_width=192,
            grid=(8, 8),
            backbone=StackConfig(192, 6, 3),
            head=StackConfig(256, 2, 4),
            condition="text",
            text_embed_dim=192,
            text_width=192,
            text_length=32,
        ),
        data=DataConfig(scenes=scenes),
        samples=60_000,
        draws=3,  # rendering and the frozen encoder take a fifth of a step otherwise
        batch_size=24,
        warmup_samples=1_200,
        decay_samples=12_000,
        peak_lr=4e-3,
        final_lr=1e-4,
        # after 60 steps of 64 the held-out loss is 1.009 with Muon at 5e-3, 1.150 at 2e-3, 1.213 with AdamW at 1e-3
        # without decay the backbone's weights grow until single samples near t = 1 blow up (a loss of 7,900 once)
        optimizer=OptimizerConfig(kind="muon", weight_decay=0.1),
        ema=0.997,
        statistics_samples=3_072,
        sheet_every=8_000,
        checkpoint_every=4_800,
    )


def _rae(size: str) -> GeneratorTrainConfig:
    """RAE's training of a DiT-DH on ImageNet's classes (arXiv 2510.11690, appendix): 800 epochs, batch 1024."""
    samples = 800 * IMAGENET
    return GeneratorTrainConfig(
        recipe=f"rae_{size.lower()}",
        generator=named(size),
        model="runs/paper_b16/model",  # with a decoder; `ov3 train attach_decoder` gives a released encoder one
        # tars with `jpg` and `cls`, a class number, as webdataset's ImageNet has them
        data=DataConfig(source="data/imagenet-train", caption_field=".cls", fast_decode=True, num_workers=8),
        samples=samples,
        batch_size=1024,
        decay_samples=samples - 40 * IMAGENET,
        statistics_samples=IMAGENET,
        compile=True,
        log_every=100,
        sheet_every=10 * IMAGENET,
        checkpoint_every=2 * IMAGENET,
        background_saves=True,
    )


def rae_s() -> GeneratorTrainConfig:
    """DiT-DH-S on ImageNet's classes: RAE's weak generator for autoguidance, 14 epochs."""
    base = _rae("S")
    return replace(base, samples=14 * IMAGENET, decay_samples=0)


def rae_b() -> GeneratorTrainConfig:
    """DiT-DH-B on ImageNet's classes, RAE's schedule."""
    return _rae("B")


def rae_xl() -> GeneratorTrainConfig:
    """DiT-DH-XL on ImageNet's classes, RAE's schedule: the paper's generation figures."""
    return _rae("XL")


GENERATOR_RECIPES: dict[str, Callable[[], GeneratorTrainConfig]] = {
    "demo_generator": demo_generator,
    "rae_s": rae_s,
    "rae_b": rae_b,
    "rae_xl": rae_xl,
}
