"""A fast front against the VAE encoder that it stands for: tokens, figures of the whole model, cost and speed."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openvision3.bench.timing import machine, ratio, time_in_turns
from openvision3.config import OpenVisionError
from openvision3.evaluation.evaluate import evaluate_all
from openvision3.evaluation.samples import SampleSet, encode_batches, evaluating, mean
from openvision3.model.flops import vae_flops
from openvision3.model.openvision3 import OpenVision3
from openvision3.vae import FrozenVAE
from openvision3.vae_distilled import DistilledVAE

PARTS = ("zeroshot", "reconstruction")
COMPARED: Mapping[str, tuple[str, str]] = {  # name -> part and figure of `evaluate_all`
    "zero-shot top-1": ("zeroshot", "bare_top1"),
    "PSNR, dB": ("reconstruction", "psnr"),
    "SSIM": ("reconstruction", "ssim"),
    "LPIPS": ("reconstruction", "lpips"),
    "PSNR of the VAE alone, dB": ("reconstruction", "vae_psnr"),
}


def agreement(
    model: OpenVision3,
    front: Callable[[Tensor], Tensor],
    data: SampleSet,
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """How near a fast encoder's latents and tokens are to those of the model with its own VAE; means over pictures.

    `front`: images to scaled latents. Returns `token_cosine` (mean over tokens), `embedding_cosine`, `latent_l1` and
    `latent_error` (mean square, as a fraction of the latents' variance).
    """
    found: dict[str, list[float]] = {"token_cosine": [], "embedding_cosine": [], "latent_l1": []}
    squares, spread = 0.0, 0.0
    assert model.vae is not None
    with evaluating(model):
        for batch in encode_batches(model, data, batch_size, progress):
            target, latents = model.vae.encode(batch.images), front(batch.images)
            tokens = model.encode_latents(latents)
            cosine = F.cosine_similarity(tokens.double(), batch.tokens.double(), dim=-1).mean(1)
            pooled = (model.pool(tokens).double() * model.pool(batch.tokens).double()).sum(-1)
            difference = (latents - target).double()
            found["token_cosine"] += cosine.tolist()
            found["embedding_cosine"] += pooled.tolist()
            found["latent_l1"] += difference.abs().mean((1, 2, 3)).tolist()
            squares += float(difference.square().sum())
            centre = target.double().mean((0, 2, 3), keepdim=True)
            spread += float((target.double() - centre).square().sum())
    return {name: mean(values) for name, values in found.items()} | {"latent_error": squares / max(spread, 1e-12)}


def compare_front(
    model: OpenVision3,
    data: SampleSet,
    batch_size: int = 32,
    rounds: int = 5,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Measures a model with its fast front and with the VAE behind that.

    Returns "agreement", "original" and "front" (zero-shot and reconstruction; parts that model or data lack are left
    out), "speed" and "machine". Raises `OpenVisionError` where the model has no fast front.
    """
    front = model.vae
    if not isinstance(front, DistilledVAE):
        raise OpenVisionError(f"{model.config.name} was loaded without a fast front: give its folder as --vae")
    figures: dict[str, Any] = {}
    with _attached(model, front.original):
        figures["agreement"] = agreement(model, front.encode, data, batch_size, progress)
        figures["original"] = _figures(model, data, batch_size)
    figures["front"] = _figures(model, data, batch_size)
    figures["speed"] = speed(model, front, data.size, batch_size, rounds)
    return figures | {"protocol": data.protocol, "machine": machine(model.device)}


def speed(model: OpenVision3, front: DistilledVAE, size: int, batch_size: int, rounds: int = 5) -> dict[str, Any]:
    """GFLOPs of a picture, pictures a second, and how many times as fast the front is, alone and through the model."""
    weight = next(model.parameters())
    images = torch.rand(batch_size, 3, size, size, device=weight.device, dtype=weight.dtype) * 2 - 1
    calls = {
        "original": lambda: front.original.encode(images),
        "front": lambda: front.encode(images),
        "original to tokens": lambda: model.encode_latents(front.original.encode(images)),
        "front to tokens": lambda: model.encode_latents(front.encode(images)),
    }
    with evaluating(model):
        seconds = time_in_turns(calls, model.device, rounds)
    encoder = model.flops(size)["encoder"]
    flops = {"original": vae_flops(front.original, size)["vae_encoder"], "front": vae_flops(front, size)["vae_encoder"]}
    return {
        "size": size,
        "batch_size": batch_size,
        "gflops": {name: count / 1e9 for name, count in flops.items()} | {"encoder": encoder / 1e9},
        "pictures_per_second": {name: batch_size / spread.median for name, spread in seconds.items()},
        "latents_speedup": vars(ratio(seconds["original"], seconds["front"])),
        "tokens_speedup": vars(ratio(seconds["original to tokens"], seconds["front to tokens"])),
    }


def _figures(model: OpenVision3, data: SampleSet, batch_size: int) -> dict[str, Any]:
    try:
        figures = evaluate_all(model, data, PARTS, batch_size=batch_size, landscapes=False)
    except OpenVisionError as error:  # an encoder alone has no figures
        return {"left_out": str(error)}
    return {part: figures[part] for part in (*PARTS, "left_out") if part in figures}


@contextmanager
def _attached(model: OpenVision3, vae: FrozenVAE) -> Iterator[None]:
    before = model.vae
    model.attach_vae(vae)
    try:
        yield
    finally:
        model.vae = before
