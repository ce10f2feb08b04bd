"""Whether two forms of a model compute the same: seeded random inputs, and the largest difference of each output."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from openvision3.config import ModelConfig, OpenVisionError, TextDecoderConfig, TextEncoderConfig
from openvision3.model.encoder import VisionEncoder
from openvision3.model.openvision3 import OpenVision3

Outputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """The largest absolute difference found, in which output, and how much was allowed there."""

    value: float
    output: str
    bound: float
    through: str  # what computed the converted side

    def __str__(self) -> str:
        return f"largest difference {self.value:.2g} ({self.output}), bound {self.bound:.2g}, through {self.through}"


def own_encoder(model: OpenVision3) -> VisionEncoder:
    """The model's encoder; raises `OpenVisionError` where that is another library's, which has no other form here."""
    if not isinstance(model.encoder, VisionEncoder):
        source = model.config.external.source if model.config.external is not None else "another library"
        raise OpenVisionError(
            f"model {model.config.name!r} reads the tokens of {source}, another library's encoder: "
            "it has no encoder of its own to convert"
        )
    return model.encoder


def random_inputs(config: ModelConfig, grid: tuple[int, int], batch: int, images: bool = False) -> Tensor:
    """Seeded latents of unit variance, or pictures in [-1, 1] (`images`, and encoders of pixels), of a token grid."""
    rng = torch.Generator().manual_seed(0)
    if images or config.input == "pixels":
        height, width = (count * config.downsampling for count in grid)
        return torch.rand(batch, 3, height, width, generator=rng) * 2 - 1
    height, width = (count * config.patch_size for count in grid)
    return torch.randn(batch, config.in_channels, height, width, generator=rng)


def random_ids(config: TextEncoderConfig | TextDecoderConfig | None) -> Tensor:
    """Seeded ids (2, L) of a text tower's full length; padding in the second row's latter half, but for the last."""
    assert config is not None
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (2, config.context_length), generator=rng)
    ids = torch.where(ids == config.pad_id, (config.pad_id + 1) % config.vocab_size, ids)
    ids[1, config.context_length // 2 : -1] = config.pad_id
    return ids


def native_grid(config: ModelConfig) -> tuple[int, int]:
    """Token grid of a square picture of the model's own size."""
    side = config.image_size // config.downsampling
    return side, side


@torch.no_grad()
def encoder_outputs(model: OpenVision3, inputs: Tensor, through_vae: bool = False) -> dict[str, Tensor]:
    """Tokens and the pooled embedding (not normalised) of the encoder's inputs, or of images by way of the VAE."""
    tokens = model.encode(inputs) if through_vae else model.encoder(inputs)
    return {"tokens": tokens, "pooled": model.encoder.pool(tokens)}


@torch.no_grad()
def all_outputs(model: OpenVision3) -> dict[str, Tensor]:
    """What every part that the model has gives for seeded inputs of its own size, and the scalars beside the parts."""
    config, grid = model.config, native_grid(model.config)
    found = encoder_outputs(model, random_inputs(config, grid, batch=2))
    if model.decoder is not None:
        found |= {"decoder": model.decoder(found["tokens"], grid), "token rms": model.token_rms}
    if model.text_encoder is not None:
        found["text encoder"] = model.text_encoder(random_ids(config.text_encoder))
        found["temperature"] = model.temperature()
    if model.text_decoder is not None:
        found["text decoder"] = model.text_decoder(found["tokens"], random_ids(config.text_decoder))
    if model.vae is not None:
        latents = model.vae.encode(random_inputs(config, grid, batch=1, images=True))
        found |= {"VAE latents": latents, "VAE pictures": model.vae.decode(latents)}
    return found


def compare(expected: Outputs, found: Outputs, tolerance: float, through: str) -> Difference:
    """The largest absolute difference; raises `OpenVisionError` above the bound, or where a number is not finite.

    The bound is `tolerance`, times the largest absolute value of that output where it is above 1: fp32 has relative
    precision. Outputs have the same names on both sides.
    """
    assert expected.keys() == found.keys(), (list(expected), list(found))
    worst = Difference(0.0, next(iter(expected)), tolerance, through)
    for name, reference in expected.items():
        if not torch.isfinite(reference).all():
            raise OpenVisionError(f"the source gives numbers that are not finite ({name}): its weights are damaged")
        if reference.shape != found[name].shape:
            raise OpenVisionError(
                f"the converted model gives {name} of shape {tuple(found[name].shape)}, the source "
                f"{tuple(reference.shape)}: nothing was written"
            )
        value = float((reference.float() - found[name].float()).abs().max())
        difference = Difference(value, name, tolerance * max(1.0, float(reference.abs().max())), through)
        if not value <= difference.bound:  # also where it is NaN
            raise OpenVisionError(f"the converted model and its source differ, so nothing was written: {difference}")
        if value / difference.bound >= worst.value / worst.bound:
            worst = difference
    return worst


def compare_each(
    cases: list[Tensor],
    source: Callable[[Tensor], Outputs],
    converted: Callable[[Tensor], Outputs],
    tolerance: float,
    through: str,
) -> Difference:
    """`compare` over several inputs: the worst of them."""
    found = [compare(source(inputs), converted(inputs), tolerance, through) for inputs in cases]
    return max(found, key=lambda difference: difference.value / difference.bound)
