"""A generator ready to draw pictures: the DiT, its tokens' statistics, and the frozen model that decodes them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from openvision3.config import OpenVisionError
from openvision3.generation.conditions import conditions
from openvision3.generation.dit import DiT
from openvision3.generation.folder import Description, load_weights, read_description
from openvision3.generation.sample import SamplerConfig, sample
from openvision3.generation.space import PictureSpace
from openvision3.generation.statistics import Normalizer
from openvision3.hub.load import load
from openvision3.training.precision import Precision, autocast

DEMO_GENERATOR = Path(__file__).parents[1] / "weights" / "demo_generator"


@dataclass(frozen=True)
class Generator:
    """What `load_generator` gives."""

    description: Description
    dit: DiT
    normalizer: Normalizer
    space: PictureSpace
    weak: DiT | None = None  # a weaker generator of the same tokens, for autoguidance

    def sampler(self) -> SamplerConfig:
        """The steps and guidance that its folder names."""
        return SamplerConfig(steps=self.description.steps, guidance=self.description.guidance)

    @torch.no_grad()
    def tokens(
        self,
        texts: Sequence[str],
        indices: Sequence[int],
        seed: int,
        sampler: SamplerConfig | None = None,
        precision: Precision = "fp32",
    ) -> Tensor:
        """Tokens (B, N, D), fp32, of prompts or class names; `indices` choose the noise within `seed`."""
        condition = conditions(self.space.model, self.description.generator, texts, self.description.classes)
        with autocast(self.space.model.device, precision):
            return sample(self.dit, self.normalizer, condition, indices, seed, sampler or self.sampler(), self.weak)

    @torch.no_grad()
    def images(
        self,
        texts: Sequence[str],
        indices: Sequence[int],
        seed: int,
        sampler: SamplerConfig | None = None,
        precision: Precision = "fp32",
    ) -> Tensor:
        """Pictures (B, 3, R, R), about [-1, 1], not clamped; see `tokens`."""
        x = self.tokens(texts, indices, seed, sampler, precision)
        with autocast(self.space.model.device, precision):
            return self.space.decode(x).float()


def generator_folder(name: str | Path) -> Path:
    """The folder that a name means: "demo", itself, or a run's."""
    if str(name) == "demo" and not Path(name).is_dir():
        if not DEMO_GENERATOR.is_dir():
            raise OpenVisionError(
                "this copy of openvision3 embeds no demo generator; `ov3 generate train demo_generator` makes one"
            )
        return DEMO_GENERATOR
    path = Path(name)
    if not path.is_dir():
        raise OpenVisionError(f"{name} is no generator folder (ov3 generate train makes one)")
    return path / "generator" if (path / "generator").is_dir() else path


def load_generator(
    name: str | Path = "demo",
    model: str = "",
    autoguidance: str | Path = "",
    device: torch.device | str = "auto",
) -> Generator:
    """Loads a generator, fp32, with the frozen model that it names, or `model`: a folder, or a hub id.

    `autoguidance`: the folder of a weaker generator of the same tokens. Raises `OpenVisionError` with one line where
    something is missing, broken, or made for other tokens.
    """
    folder = generator_folder(name)
    description = read_description(folder)
    frozen = load(model or description.model, device=device, dtype=torch.float32)
    space = PictureSpace(frozen, description.space, description.resolution)
    dit, normalizer = load_weights(folder, description, space)
    weak = None
    if autoguidance:
        other = generator_folder(autoguidance)
        told = read_description(other)
        if (told.classes, told.generator.condition) != (description.classes, description.generator.condition):
            raise OpenVisionError(f"{other} takes other conditions than {folder}: it can't guide it")
        weak, weak_normalizer = load_weights(other, told, space)
        if not torch.allclose(weak_normalizer.mean, normalizer.mean) or not torch.allclose(
            weak_normalizer.std, normalizer.std
        ):
            raise OpenVisionError(f"{other} has other token statistics than {folder}: it can't guide it")
    return Generator(description, dit, normalizer, space, weak)
