"""What the claims compare: encoders, each a recipe changed in one place (`clip`: in two), and what is made of them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from openvision3.config import Detached, OpenVisionError, SceneConfig, StageConfig, TrainConfig
from openvision3.data import demo as scenes
from openvision3.data.grammar import noun_phrase
from openvision3.evaluation.samples import one_thing
from openvision3.generation import recipes as generators
from openvision3.generation.sample import SamplerConfig
from openvision3.generation.train_config import GeneratorTrainConfig, Space
from openvision3.recipes import demo
from openvision3.vlm import recipes as vlms
from openvision3.vlm.config import VLMTrainConfig

RESOLUTION, BATCH = 64, 64  # pixels; samples
NAMES = 30  # things: few enough that their names are learned within minutes
SCENES = SceneConfig(num_names=NAMES, size_min=0.4, size_max=0.8, count_weights=(0.8, 0.2, 0.0, 0.0))
CLASSIFIER = "classifier"  # the arm that judges generated pictures
Precision = Literal["fp32", "bf16"]
# an encoder; a generator of its tokens; a language model that looks through it; a classifier of pixels
Kind = Literal["encoder", "generation", "questions", "classifier"]


@dataclass(frozen=True)
class Length:
    """How much the arms see, and how often and on how much they are measured."""

    samples: int = 6_016  # scenes, whole batches
    points: int = 6  # of the curves, after the one at the first step
    meter_samples: int = 192  # held-out scenes of the curves
    eval_samples: int = 500  # scenes of `scenes-v1` with the arms' own distribution, at the end
    generator_samples: int = 24_000  # scenes of a generator, each with several times and noises
    generated: int = 300  # pictures of each of the sampler's seeds, and held-out scenes to compare them with
    sampler_seeds: int = 3
    classifier_samples: int = 40_000
    words: int = 4_000  # captions that a projector learns words from
    captions: int = 192  # scenes of a language model's first stage
    questions: int = 2_400  # scenes of its second
    asked: int = 100  # held-out scenes of each kind of question

    def __post_init__(self) -> None:
        if self.samples < 2 * BATCH:
            raise OpenVisionError(f"samples is {self.samples}: an arm needs at least {2 * BATCH}, two batches")
        for name, least in (("generator_samples", BATCH), ("questions", 16)):
            if (value := getattr(self, name)) < least:
                raise OpenVisionError(f"{name} is {value}: expected at least {least}")


QUICK = Length(
    samples=192, points=2, meter_samples=32, eval_samples=48, generator_samples=96, generated=16, sampler_seeds=1,
    classifier_samples=128, words=256, captions=16, questions=16, asked=4,
)  # fmt: skip


@dataclass(frozen=True)
class ClassifierRecipe:
    """Training of the classifier that judges generated pictures, by pixels alone."""

    names: tuple[str, ...]
    samples: int
    out: str
    seed: int = 0
    held_out: int = 1000  # scenes that it is tested on


@dataclass(frozen=True)
class GenerationRecipe:
    """Training of a generator on a finished encoder, and how what it draws is measured."""

    train: GeneratorTrainConfig
    pictures: int
    sampler: SamplerConfig
    sampler_seeds: int
    classifier: str  # folder

    @property
    def out(self) -> str:
        return self.train.out


@dataclass(frozen=True)
class QuestionsRecipe:
    """Training of a language model that looks through a finished encoder, and what it is asked."""

    train: VLMTrainConfig
    scenes: SceneConfig  # that it is asked about
    asked: int

    @property
    def out(self) -> str:
        return self.train.out


Recipe = TrainConfig | GenerationRecipe | QuestionsRecipe | ClassifierRecipe
RECIPES: dict[Kind, type[Recipe]] = {
    "encoder": TrainConfig,
    "generation": GenerationRecipe,
    "questions": QuestionsRecipe,
    CLASSIFIER: ClassifierRecipe,
}


@dataclass(frozen=True)
class Arm:
    """One training: what is different in it, or which encoder it takes."""

    name: str
    words: str
    kind: Kind = "encoder"
    change: Callable[[TrainConfig], TrainConfig] = lambda config: config  # an encoder's
    of: str = ""  # the arm whose encoder it takes
    space: Space = "tokens"  # that a generator draws

    @property
    def needs(self) -> tuple[str, ...]:
        """The arms that must be finished before it begins."""
        return tuple(name for name in (self.of, CLASSIFIER if self.kind == "generation" else "") if name)


def _probing(detach: Detached) -> Callable[[TrainConfig], TrainConfig]:
    return lambda config: replace(config, loss=replace(config.loss, detach=detach))


def _noise(tau: float) -> Callable[[TrainConfig], TrainConfig]:
    return lambda config: replace(config, model=replace(config.model, noise_tau=tau))


def _pixels(config: TrainConfig) -> TrainConfig:
    return replace(config, model=replace(config.model, input="pixels", patch_size=16, in_channels=3))


def _generation(of: str) -> Arm:
    return Arm(f"generation-{of}", f"a generator of the tokens of `{of}`", "generation", of=of)


def _questions(of: str) -> Arm:
    return Arm(f"questions-{of}", f"a language model that sees the tokens of `{of}`", "questions", of=of)


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("unified", "all losses train the encoder (noise tau 0.1)"),
        Arm("understanding", "L_und alone trains the encoder; the decoder is a probe",
            change=_probing("reconstruction")),
        Arm("reconstruction", "L_rec alone trains the encoder; head and text towers are probes",
            change=_probing("understanding")),
        Arm("untrained", "nothing trains the encoder; all else are probes (a control, not in the paper)",
            change=_probing("both")),
        Arm("pixels", "as unified, on RGB patches of 16 in place of latents", change=_pixels),
        Arm("clip", "CLIP's way: RGB patches of 16, L_und alone trains the encoder; the decoder is a probe",
            change=lambda config: _probing("reconstruction")(_pixels(config))),
        *(Arm(f"noise-{tau:g}", f"as unified, with noise tau {tau:g}", change=_noise(tau)) for tau in (0.0, 0.3, 0.8)),
        Arm(CLASSIFIER, "a small network on pixels, which knows no encoder", CLASSIFIER),
        *(_generation(of) for of in ("unified", "understanding", "pixels", "clip")),
        Arm("generation-latents", "the same generator of the VAE's latents", "generation", of="unified",
            space="latents"),
        *(_generation(f"noise-{tau:g}") for tau in (0.0, 0.3, 0.8)),
        *(_questions(of) for of in ("unified", "reconstruction", "clip")),
    )
}  # fmt: skip


def recipe(
    arm: str, seed: int, length: Length, out: Path, precision: Precision = "fp32", uses: Precision = "fp32"
) -> Recipe:
    """What an arm runs, in a folder of its own below `out`. `precision`: of encoders, `uses` of what is made of them.

    `seed`: of weights, noise and scenes; arms of one seed see the same.
    """
    kind, folder = ARMS[arm].kind, folder_of(out, arm, seed)
    if kind == "encoder":
        return arm_config(arm, seed, length, folder, precision)
    if kind == "classifier":
        return ClassifierRecipe(tuple(scenes.names(NAMES)), length.classifier_samples, str(folder))
    model = str(folder_of(out, ARMS[arm].of, seed) / "model")
    if kind == "generation":
        return _generation_recipe(arm, seed, length, out, model, uses)
    return _questions_recipe(seed, length, folder, model, uses)


def folder_of(out: Path, arm: str, seed: int) -> Path:
    """Where an arm of a seed lives; the classifier is one for all seeds."""
    return out / (arm if arm == CLASSIFIER else f"{arm}-seed{seed}")


def arm_config(arm: str, seed: int, length: Length, out: Path, precision: Precision = "fp32") -> TrainConfig:
    """An encoder's recipe: `demo`'s first stage, shortened, on fewer things, in the folder `out`."""
    base = demo()
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
        data=replace(base.data, scenes=SCENES, seed=seed, num_workers=0),
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


def _generation_recipe(
    arm: str, seed: int, length: Length, out: Path, model: str, precision: Precision
) -> GenerationRecipe:
    """The embedded generator's network and rates, by class in place of captions, so that no text tower has a say."""
    base = generators.demo_generator()
    side, batch = RESOLUTION // 16, 24
    samples = -(-length.generator_samples // batch) * batch
    train = replace(
        base,
        recipe="reproduce-generation",
        generator=replace(
            base.generator, grid=(side, side), condition="class", num_classes=NAMES, text_embed_dim=0, text_width=0,
            text_length=0,
        ),
        model=model,
        space=ARMS[arm].space,
        classes=tuple(noun_phrase(name) for name in scenes.names(NAMES)),
        data=replace(base.data, scenes=one_thing(SCENES), caption_text="alt", seed=seed, num_workers=0),
        resolution=RESOLUTION,
        samples=samples,
        batch_size=batch,
        draws=6,  # rendering and the frozen encoder take a quarter of a step with three
        warmup_samples=samples // 20,
        decay_samples=samples // 3,
        statistics_samples=min(base.statistics_samples, samples),
        seed=seed,
        precision=precision,
        out=str(folder_of(out, arm, seed)),
        sheet_every=0,
        checkpoint_every=samples // 4,
        keep_checkpoints=1,
    )  # fmt: skip
    classifier = str(folder_of(out, CLASSIFIER, seed))
    sampler = SamplerConfig(steps=15, guidance=4.0)
    return GenerationRecipe(train, length.generated, sampler, length.sampler_seeds, classifier)


def _questions_recipe(seed: int, length: Length, folder: Path, model: str, precision: Precision) -> QuestionsRecipe:
    """The embedded vision-language model's recipe, shortened, on the encoders' things."""
    base = vlms.demo()
    fewer = {"num_names": NAMES, "size_min": SCENES.size_min, "size_max": SCENES.size_max}
    first, second = (
        replace(stage.data, scenes=replace(stage.data.scenes, **fewer), num_workers=0)
        for stage in (base.stage1, base.stage2)
    )
    train = replace(
        base,
        recipe="reproduce-questions",
        tower=model,
        resolution=RESOLUTION,
        words=replace(base.words, samples=length.words),
        stage1=replace(base.stage1, data=first, samples=length.captions),
        stage2=replace(base.stage2, data=second, samples=length.questions),
        seed=seed,
        precision=precision,
        out=str(folder),
        checkpoint_every=max(16, length.questions // 4),
    )
    return QuestionsRecipe(train, first.scenes, length.asked)
