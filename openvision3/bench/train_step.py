"""The training step of the unified encoder against the peer's (`bench/peer.py`), side by side in processes.

Ours is the training loop's own code: what `setup` builds from a recipe, `Objective.backward`, the clipping and the
optimizer. All sides start from the same weights and see the same batch, noise included; their losses and gradient norms
must agree, or there is no ratio.
"""

import copy
import ctypes
import gc
import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from openvision3.bench import timing
from openvision3.config import OpenVisionError, TrainConfig
from openvision3.data.batches import Batch
from openvision3.evaluation.perceptual import load_lpips
from openvision3.model.flops import counted_flops, forward_flops
from openvision3.model.openvision3 import OpenVision3
from openvision3.training.optimizer import build_optimizer, clip_gradients, set_learning_rate
from openvision3.training.parallel import compile_blocks
from openvision3.training.precision import autocast, resolve_device, synchronize
from openvision3.training.setup import build_model, build_objective
from openvision3.training.stages import Stage
from openvision3.vae import load_vae

Texts = Literal["recap", "full"]
COMPARED = ("pixel_l1", "latent_l1", "lpips", "contrastive", "caption", "total", "grad_norm")
TOLERANCE = {"bf16": 0.02, "fp32": 1e-4}  # relative difference of each between sides
# Tokens, mean and standard deviation, of alt text, a sentence of the caption, and the caption: Recap-DataComp-1B has 10
# words an alt text and 49 a caption of its own (arXiv 2406.08478), WordPiece a fifth more pieces than words.
RECAP_TOKENS = {"alt": (12, 4), "sentence": (25, 8), "caption": (60, 15)}


@dataclass(frozen=True)
class Case:
    """What all sides of a comparison share."""

    config: TrainConfig  # its VAE can be had; batch_size, resolution and precision are below
    resolution: int
    batch_size: int
    pixel_stride: int  # of the sides with the speed options, which have cached latents too
    texts: Texts
    precision: Literal["bf16", "fp32"]
    device: str

    def stage(self) -> Stage:
        """The recipe's stage of this resolution, or its first one at another."""
        config = self.config
        same = [stage for stage in config.stages if stage.resolution == self.resolution]
        stage = same[0] if same else config.stages[0]
        stage = replace(stage, resolution=self.resolution, batch_size=self.batch_size, latents=None)
        return Stage(1, stage, 0, 0)


@dataclass(frozen=True)
class SideKind:
    """One side of a comparison."""

    name: str
    peer: bool
    compiled: bool = False  # the peer's parts; ours is compiled where the recipe says so
    fast: bool = False  # cached latents, pixels of a sub-batch


PEER = SideKind("peer", True)
PEER_COMPILED = SideKind("peer, compiled", True, compiled=True)
OURS = SideKind("ours, same mathematics", False)
OURS_FAST = SideKind("ours, speed options", False, fast=True)


def with_speed_options(peer: SideKind) -> SideKind:
    """The peer with cached latents and the same sub-batch."""
    return replace(peer, name=f"{peer.name}, cached latents and sub-batch", fast=True)


def make_case(
    recipe: TrainConfig,
    resolution: int,
    batch_size: int,
    *,
    vae: Path | None = None,
    pixel_stride: int = 8,
    texts: Texts = "recap",
    precision: Literal["bf16", "fp32"] = "bf16",
    device: str = "auto",
    seed: int = 0,
) -> Case:
    """A recipe as both sides can run it: AdamW, the whole batch at once, blocks kept; the autoencoder at `vae`.

    Raises `OpenVisionError` for a resolution or a batch size that does not fit.
    """
    step = recipe.model.downsampling
    if resolution < step or resolution % step:
        raise OpenVisionError(f"--resolution {resolution}: expected a multiple of {step}")
    if batch_size < 1 or pixel_stride < 1:
        raise OpenVisionError("--batch-size and --pixel-stride must be at least 1")
    model = recipe.model
    if vae is not None:
        model = replace(model, vae=replace(model.vae, source=str(vae), sha256=""))
    config = replace(
        recipe,
        model=model,
        loss=replace(recipe.loss, pixel_stride=1),
        optimizer=replace(recipe.optimizer, kind="adamw"),
        micro_batch=0,
        checkpoint_blocks=False,
        seed=seed,
    )
    return Case(config, resolution, batch_size, pixel_stride, texts, precision, str(resolve_device(device)))


def save_random_vae(folder: Path, seed: int) -> None:
    """An autoencoder of FLUX.1's architecture with random weights, as diffusers saves it (336 MB)."""
    diffusers: Any = importlib.import_module("diffusers")
    torch.manual_seed(seed)
    diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).save_pretrained(folder)


def make_batch(case: Case) -> Batch:
    """Noise for pictures, and texts of random words whose lengths are as `case.texts` says; a function of the seed."""
    model, size = case.config.model, case.batch_size
    text, captions = model.text_encoder, model.text_decoder
    assert text is not None and captions is not None
    generator = torch.Generator().manual_seed(case.config.seed)

    def ids(kind: str, length: int, vocab_size: int, pad_id: int) -> Tensor:
        words = torch.randint(0, vocab_size - 1, (size, length), generator=generator)
        words += words >= pad_id
        if case.texts == "full":
            return words
        mean, spread = RECAP_TOKENS[kind]
        used = (mean + spread * torch.randn(size, generator=generator)).round().clamp(3, length)
        return words.where(torch.arange(length) < used[:, None], pad_id)

    def contrastive(kind: str) -> Tensor:  # ends with [cls], after the padding
        found = ids(kind, text.context_length, text.vocab_size, text.pad_id)
        found[:, -1] = (text.pad_id + 1) % text.vocab_size
        return found

    shape = (size, 3, case.resolution, case.resolution)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    caption_ids = ids("caption", captions.context_length, captions.vocab_size, captions.pad_id)
    names = [""] * size
    return Batch(list(range(size)), names, images, contrastive("alt"), contrastive("sentence"), caption_ids, names)


def with_latents(case: Case) -> Batch:
    """The case's batch as a cache of latents gives it: bf16 latents, and the pictures that are compared.

    The latents are noise: making them here would leave its memory in a side's process.
    """
    batch, vae = make_batch(case), case.config.model.vae
    generator = torch.Generator().manual_seed(case.config.seed)
    side = case.resolution // vae.factor
    latents = torch.randn(case.batch_size, vae.channels, side, side, generator=generator).bfloat16()
    return replace(batch, images=batch.images[:: case.pixel_stride], latents=latents)


def step_flops(case: Case, fast: bool) -> dict[str, float]:
    """FLOPs of a step's mathematics by part, counted on shapes alone; what a side computes beyond them is its own loss.

    A backward pass is twice its forward pass, through frozen parts once. Texts count as far as any row of the batch
    is no padding.
    """
    config, batch = case.config, make_batch(case)
    text, captions = config.model.text_encoder, config.model.text_decoder
    assert text is not None and captions is not None
    words = torch.cat([batch.alt_ids, batch.caption_text_ids]) != text.pad_id
    used = (int(words.any(dim=0).sum()), int((batch.caption_ids != captions.pad_id).any(dim=0).sum()))
    model = replace(
        config.model,
        text_encoder=replace(text, context_length=used[0]),
        text_decoder=replace(captions, context_length=used[1]),
    )
    size, compared = case.batch_size, len(range(0, case.batch_size, case.pixel_stride if fast else 1))
    forward = forward_flops(model, case.resolution, load_vae(config.model.vae))
    passes = {
        "encoder": 3 * size,
        "decoder": 3 * size,
        "text_encoder": 3 * 2 * size,
        "text_decoder": 3 * size,
        "vae_encoder": 0 if fast else size,
        "vae_decoder": 2 * compared,
    }
    found = {name: passes[name] * count for name, count in forward.items()}
    if case.stage().config.lpips_weight > 0:
        shell: Any = copy.deepcopy(load_lpips(config.loss.lpips_net)).to("meta")
        once = counted_flops(shell.features, (3, case.resolution, case.resolution))
        found["lpips"] = 3 * compared * once  # of the picture, of its reconstruction, and back
    return found


Step = Callable[[Batch], dict[str, Tensor]]


class TrainingSide:
    """One side in this process: `turn` is one step, and its time and memory."""

    def __init__(self, case: Case, kind: SideKind) -> None:
        self.device = torch.device(case.device)
        # libraries count as the process at rest
        importlib.import_module("openvision3.bench.peer" if kind.peer else "diffusers")
        self.at_rest = held_bytes(self.device)
        model = build_model(case.config, self.device)
        self.batch = with_latents(case) if kind.fast else make_batch(case)
        self.step, self.trained, frozen = (peer_step if kind.peer else our_step)(case, kind, model)
        parameters = sum(parameter.nbytes for parameter in self.trained)
        self.static = {  # AdamW keeps two moments
            "parameters": parameters,
            "gradients": parameters,
            "optimizer": 2 * parameters,
            "frozen": frozen,
        }

    def turn(self) -> dict[str, Any]:
        """Seconds of a step and of processors, its losses, and bytes: at most above the process at rest, static."""
        gc.collect()
        give_back_memory()
        synchronize(self.device)
        reset_peak(self.device)
        start, busy = time.perf_counter(), time.process_time()
        losses = self.step(self.batch)
        synchronize(self.device)
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        peak = peak_bytes(self.device)
        values = {name: float(losses[name]) for name in COMPARED if name in losses}
        above = None if peak is None or self.at_rest is None else peak - self.at_rest
        return {"seconds": seconds, "processor": busy, "losses": values, "peak": above, "static": self.static}


def our_step(case: Case, kind: SideKind, model: OpenVision3) -> tuple[Step, list[nn.Parameter], int]:
    """The training loop's step, its trained parameters, and the bytes of the frozen ones."""
    config, stage = case.config, case.stage()
    if kind.fast:
        config = replace(config, loss=replace(config.loss, pixel_stride=case.pixel_stride))
    if config.compile:
        compile_blocks(model)
    optimizer = build_optimizer(model, config.optimizer)
    set_learning_rate(optimizer, stage.config.peak_lr)
    objective = build_objective(config, stage, model, case.precision)

    def step(batch: Batch) -> dict[str, Tensor]:
        losses = objective.backward(batch)
        losses["grad_norm"] = clip_gradients(model, config.optimizer.clip_norm)
        optimizer.step()
        model.clamp_logit_scale()
        optimizer.zero_grad()
        return losses

    return step, *split_parameters(model, objective.perceptual)


def peer_step(case: Case, kind: SideKind, model: OpenVision3) -> tuple[Step, list[nn.Parameter], int]:
    """As `our_step`, of the peer with `model`'s weights; plain code, as one would write it."""
    from openvision3.bench.peer import Peer, adamw

    config, stage = case.config, case.stage()
    device, loss, weight = model.device, config.loss, stage.config.lpips_weight
    perceptual = load_lpips(loss.lpips_net) if weight > 0 else None
    peer = Peer(model, case.resolution, perceptual)
    del model
    if kind.compiled:
        peer.compile_parts()
    optimizer = adamw(peer, config.optimizer)
    set_learning_rate(optimizer, stage.config.peak_lr)
    trained, frozen = split_parameters(peer)

    def step(batch: Batch) -> dict[str, Tensor]:
        on_device = to_device(batch, device)
        with autocast(device, case.precision):
            found = peer.losses(on_device, config.seed, case.pixel_stride if kind.fast else 1)
        reconstruction = found["pixel_l1"] + loss.beta * found["latent_l1"]
        if "lpips" in found:
            reconstruction = reconstruction + weight * found["lpips"]
        understanding = found["caption"] + loss.alpha * found["contrastive"]
        total = loss.omega_rec * reconstruction + loss.omega_und * understanding
        total.backward()
        clip_norm = config.optimizer.clip_norm or float("inf")
        found |= {"total": total, "grad_norm": nn.utils.clip_grad_norm_(trained, clip_norm)}
        optimizer.step()
        optimizer.zero_grad()
        return {name: value.detach() for name, value in found.items()}

    return step, trained, frozen


def split_parameters(*modules: nn.Module | None) -> tuple[list[nn.Parameter], int]:
    """The trained parameters of modules, and the bytes of the others."""
    every = [parameter for module in modules if module is not None for parameter in module.parameters()]
    trained = [parameter for parameter in every if parameter.requires_grad]
    return trained, sum(parameter.nbytes for parameter in every if not parameter.requires_grad)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch's tensors on a device."""
    moved = {name: value.to(device) for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return replace(batch, **moved)


def held_bytes(device: torch.device) -> int | None:
    """Memory that this process holds: CUDA's tensors, or resident (Linux); None where it can't be known."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return timing.resident_bytes() if _counts_resident(device) else None


def reset_peak(device: torch.device) -> None:
    """Starts `peak_bytes` anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _counts_resident(device):
        timing.reset_peak()


def peak_bytes(device: torch.device) -> int | None:
    """The most that `held_bytes` was since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return timing.peak_resident_bytes() if _counts_resident(device) else None


def give_back_memory() -> None:
    """Returns to the system what was freed before, which would count as held (glibc)."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def _counts_resident(device: torch.device) -> bool:
    return device.type == "cpu" and Path("/proc/self/clear_refs").exists()
