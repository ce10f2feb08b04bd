"""What a recipe would do, without doing it: sizes, FLOPs, memory, steps, peak rates, and what is missing."""

import json
from collections.abc import Collection, Iterator
from pathlib import Path

import torch

from openvision3 import assets
from openvision3.config import (
    DistillConfig,
    ModelPart,
    OpenVisionError,
    RunConfig,
    TrainConfig,
    VAETrainConfig,
    to_dict,
)
from openvision3.data.latent_cache import CACHE
from openvision3.data.store import expand
from openvision3.hub.encoders import load_external
from openvision3.model.external import ExternalEncoder
from openvision3.model.flops import counted_flops, vae_flops
from openvision3.model.openvision3 import OpenVision3
from openvision3.training.attach import is_run, trained_model
from openvision3.training.checkpoint import checkpoint_step, checkpoints
from openvision3.training.decoded import pictures_at_once
from openvision3.training.distill import teacher
from openvision3.training.frozen import LOSSES, part_of, trained_losses
from openvision3.training.latents import latents_folder
from openvision3.training.memory import STATE_BYTES, activation_bytes
from openvision3.training.precision import Precision, resolve_device
from openvision3.training.setup import BERT_VOCABULARY, run_folder
from openvision3.training.stages import Stage, plan, validate
from openvision3.vae import TINY_FOLDER, FrozenVAE, load_vae
from openvision3.vae_distilled import FastEncoder


def dry_run(config: RunConfig, device: str = "auto") -> str:
    """The text that `ov3 train RECIPE --dry-run` prints. Nothing is written or trained.

    Nothing is fetched but the model that `config.init` names, where that is a hub id: it settles the sizes.
    Raises `OpenVisionError` for a recipe that can't run whatever is there.
    """
    place = resolve_device(device)
    lines = [json.dumps(to_dict(config), indent=2), ""]
    if isinstance(config, VAETrainConfig):
        return "\n".join([*lines, *_vae_lines(config)])
    if isinstance(config, DistillConfig):
        return "\n".join([*lines, *_distill_lines(config)])
    validate(config)
    missing = list(missing_parts(config))
    vae = _vae_on_disk(config)
    with torch.device("meta"):
        model = OpenVision3(trained_model(config))
    if config.model.external is not None and isinstance(model.encoder, ExternalEncoder):
        model.encoder.attach(load_external(config.model.external, "cpu", torch.float32))
    stages = plan(config)
    lines += [f"recipe {config.recipe}, in {run_folder(config)}, on {place}", ""]
    lines += _part_lines(config, model, vae, stages)
    for stage in stages:
        lines += ["", *_stage_lines(config, stage, model, vae, place)]
    saved = checkpoints(run_folder(config) / "checkpoints")
    if saved:
        lines += ["", f"would resume after step {checkpoint_step(saved[-1]):,}"]
    lines += ["", *[f"missing: {line}" for line in missing]] if missing else ["", "nothing is missing"]
    return "\n".join(lines)


def missing_parts(config: TrainConfig) -> Iterator[str]:
    """One line for each thing that the run needs and that is not on this machine, and where it would come from."""
    for source in config.data.sources:
        if line := _source_missing(source):
            yield f"data: {line}"
    for stage in plan(config):
        if (folder := latents_folder(config, stage)) and not (Path(folder) / CACHE).is_file():
            yield f"latents: {folder} is no cache of latents; `ov3 data cache-latents` makes one"
    if (
        config.init
        and not config.attach
        and not ((Path(config.init) / "config.json").is_file() or is_run(Path(config.init)))
    ):
        yield f"init: {config.init} is neither a model folder nor a run"
    if config.model.input == "latents":
        yield from _missing_vae(config)
    texts = (config.model.text_encoder, config.model.text_decoder)
    if any(part is not None and part.vocab_size == BERT_VOCABULARY for part in texts):
        yield from _missing_asset("bert-vocab", "the tokenizer's vocabulary")
    if any(stage.lpips_weight > 0 for stage in config.stages):
        yield from _missing_asset(f"lpips-{config.loss.lpips_net}", "LPIPS weights")


def _source_missing(source: str) -> str:
    if source == "demo" or "://" in source:  # a dry run asks no store
        return ""
    try:
        expand(source)
    except OpenVisionError as error:
        return str(error)
    return ""


def _missing_asset(name: str, what: str) -> Iterator[str]:
    if not assets.cached_path(name).is_file():
        yield f"{what}: asset {name} is not in the cache; the run fetches it (or `ov3 assets fetch {name}`)"


def _missing_vae(config: TrainConfig) -> Iterator[str]:
    vae = config.model.vae
    if vae.kind == "tiny":
        folder = TINY_FOLDER if vae.source == "embedded" else Path(vae.source)
        if not (folder / "model.safetensors").is_file():
            yield f"VAE: {folder} holds no tiny VAE; `ov3 train demo_vae` makes one"
    elif not Path(vae.source).is_dir() and not _in_hub_cache(vae.source):
        yield f"VAE: {vae.source} is neither a folder nor in the hub's cache; the run fetches it from the hub"


def _in_hub_cache(source: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    try:
        return any(isinstance(try_to_load_from_cache(source, f"{sub}config.json"), str) for sub in ("", "vae/"))
    except ValueError:  # not a hub id
        return False


def _vae_on_disk(config: TrainConfig) -> FrozenVAE | None:
    if config.model.input == "pixels" or any(_missing_vae(config)):
        return None
    try:
        return load_vae(config.model.vae)
    except OpenVisionError:
        return None


def _part_lines(config: TrainConfig, model: OpenVision3, vae: FrozenVAE | None, stages: list[Stage]) -> list[str]:
    """A table: part, parameters, forward GFLOPs of a sample at each stage's resolution."""
    if vae is not None:
        model.attach_vae(vae)
    parameters = model.num_parameters()
    flops = [model.flops(stage.config.resolution) for stage in stages]
    lines = [f"{'part':<14}{'parameters':>14}" + "".join(f"{_at(stage):>20}" for stage in stages)]
    for name in dict.fromkeys([*parameters, *flops[0]]):
        count = f"{parameters[name]:,}" if name in parameters else ""
        cells = (f"{found[name] / 1e9:,.2f}" if name in found else "" for found in flops)
        lines.append(f"{name:<14}{count:>14}" + "".join(f"{cell:>20}" for cell in cells))
    return [*lines, f"{'trained':<14}{trained_parameters(config, model):>14,}"]


def trained_parameters(config: TrainConfig, model: OpenVision3) -> int:
    """Number of the parameters that the run changes."""
    named = ((part_of(name), parameter.numel()) for name, parameter in model.named_parameters())
    return sum(count for part, count in named if part is not None and part not in config.frozen)


def _at(stage: Stage) -> str:
    return f"GFLOPs at {stage.config.resolution} px"


def _stage_lines(
    config: TrainConfig, stage: Stage, model: OpenVision3, vae: FrozenVAE | None, device: torch.device
) -> list[str]:
    settings = stage.config
    samples = stage.steps * settings.batch_size
    micro = min(config.micro_batch or settings.batch_size, settings.batch_size)
    forward = model.flops(settings.resolution)
    if latents_folder(config, stage):
        forward["vae_encoder"] = 0.0  # it ran when the latents were cached
    work = training_flops(config, forward, micro < settings.batch_size, trained_losses(config.model, config.frozen))
    precision: Precision = "bf16" if config.precision == "auto" else config.precision
    kept = activation_bytes(config, settings.resolution, device, precision, vae)
    trained = trained_parameters(config, model)
    others = sum(count for name, count in model.num_parameters().items() if name != "vae") - trained
    weights = trained * STATE_BYTES + others * 4  # frozen ones in fp32
    picture = kept.pop("vae_decoder", 0.0)  # absent for a model of pixels
    decoded = 0.0
    if vae is not None and picture:
        at_once = pictures_at_once(vae, device, settings.resolution, config.vae_batch)
        decoded = picture * min(at_once, -(-micro // config.loss.pixel_stride))
    pictures = f", {_bytes(decoded)} of the VAE's decoder" if picture else ""
    sample = sum(kept.values())
    by_part = ", ".join(f"{name} {_bytes(count)}" for name, count in kept.items())
    without = "" if vae is not None or config.model.input == "pixels" else ", without the VAE, which is not here"
    return [
        f"stage {stage.number}: {settings.resolution} px, {stage.steps:,} steps of {settings.batch_size:,} samples "
        f"({micro:,} at a time), {samples:,} samples",
        f"  peak rate {settings.peak_lr:.3g} (base {settings.base_lr:.3g} x {settings.batch_size:,} / 256), "
        f"warm-up over {settings.warmup_samples:,} samples, cosine to 0; lambda {settings.lpips_weight:g}",
        f"  training FLOPs: about {work / 1e9:,.1f} G a sample, {work * samples:.3g} in the stage{without}",
        f"  memory a sample: about {_bytes(sample)} in {precision} ({by_part})",
        f"  memory of the step: about {_bytes(weights + sample * micro + decoded)} ({_bytes(weights)} weights and "
        f"optimizer, {_bytes(sample * micro)} activations{pictures}){without}",
    ]


def training_flops(
    config: TrainConfig, forward: dict[str, float], two_passes: bool, trained: Collection[str] = LOSSES
) -> float:
    """FLOPs of one training sample from those of the forward passes; LPIPS, norms and activations are not counted.

    A backward pass costs twice its forward; through the frozen VAE decoder, whose weights take no gradient, once, as
    through another frozen part. `trained`: the losses that the run has.
    """
    first_pass = float(two_passes)  # the features for the contrastive loss
    encoder_trained = "encoder" not in config.frozen

    def passes(part: ModelPart) -> float:  # forward, backward, and the blocks again
        return 1 + config.checkpoint_blocks + (1 if part in config.frozen else 2)

    weights = {
        "encoder": (passes("encoder") if encoder_trained else 1.0) + first_pass,
        "decoder": passes("decoder") * ("reconstruction" in trained),
        "text_encoder": 2 * (passes("text_encoder") + first_pass) * ("contrastive" in trained),  # two texts an image
        "text_decoder": passes("text_decoder") * ("caption" in trained),
        "vae_encoder": 1.0,
        "vae_decoder": 2.0 / config.loss.pixel_stride * ("reconstruction" in trained),
    }
    return sum(weights[name] * flops for name, flops in forward.items())


def _vae_lines(config: VAETrainConfig) -> list[str]:
    steps = config.samples // config.batch_size
    lines = [
        f"recipe {config.recipe}: {steps:,} steps of {config.batch_size:,} samples at {config.resolution} px",
        f"peak rate {config.peak_lr:.3g}, warm-up over {config.warmup_samples:,} samples, cosine to 0",
    ]
    missing = _missing_asset("lpips-alex", "LPIPS weights") if config.lpips_weight else ()
    return [*lines, *(f"missing: {line}" for line in missing)]


def _distill_lines(config: DistillConfig) -> list[str]:
    model = teacher(config)
    original, size = model.vae, config.resolution or model.config.image_size
    assert original is not None
    with torch.device("meta"):
        front = FastEncoder(config.encoder, original.config.channels, original.config.factor).requires_grad_(False)
    parameters = sum(parameter.numel() for parameter in front.parameters())
    fast, slow = counted_flops(front, (3, size, size)), vae_flops(original, size)["vae_encoder"]
    steps = config.samples // config.batch_size
    missing = map(_source_missing, config.data.sources)
    return [
        f"recipe {config.recipe}, for {config.init}: {steps:,} steps of {config.batch_size:,} samples at {size} px",
        f"peak rate {config.peak_lr:.3g}, warm-up over {config.warmup_samples:,} samples, cosine to 0",
        f"fast encoder: {parameters:,} parameters, {fast / 1e9:,.3g} GFLOPs at {size} px; the VAE's encoder has "
        f"{slow / 1e9:,.3g}, {slow / fast:.1f} times as many",
        *(f"missing: data: {line}" for line in missing if line),
    ]


def _bytes(count: float) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
