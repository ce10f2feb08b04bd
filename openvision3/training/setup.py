"""What a run needs before its first step: model, tokenizer, data, objective, precision."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from openvision3.config import ModelConfig, ModelPart, OpenVisionError, TrainConfig
from openvision3.data.batches import Batch, BatchStream
from openvision3.data.shards import open_source
from openvision3.data.tokenizer import CaptionTokenizer, bert_tokenizer, demo_tokenizer
from openvision3.distributed import ALONE, World
from openvision3.evaluation.perceptual import load_lpips
from openvision3.hub.encoders import load_external
from openvision3.model.external import ExternalEncoder
from openvision3.model.openvision3 import OpenVision3
from openvision3.training.attach import BERT_VOCABULARY, load_initial, trained_model
from openvision3.training.checkpoint import named_tensors
from openvision3.training.frozen import VAE, part_of, set_training
from openvision3.training.latents import latents_folder, open_latents
from openvision3.training.parallel import Engine
from openvision3.training.precision import Precision, choose_precision
from openvision3.training.run_folder import record_environment, recorded_environment
from openvision3.training.stages import Stage
from openvision3.training.step import Objective
from openvision3.vae import load_vae

TRIAL_SAMPLES = 64  # at most, in the steps that are timed to choose the precision
PICTURES = 8  # shown at each evaluation


def run_folder(config: TrainConfig) -> Path:
    """Where a run lives: `config.out`, or runs/RECIPE."""
    return Path(config.out) if config.out else Path("runs") / config.recipe


def build_tokenizer(config: ModelConfig) -> CaptionTokenizer | None:
    """The tokenizer whose vocabulary the model's text towers have; None for a model without any.

    Raises `OpenVisionError` where there is no such tokenizer.
    """
    sizes = {part.vocab_size for part in (config.text_encoder, config.text_decoder) if part is not None}
    if not sizes:
        return None
    if sizes == {BERT_VOCABULARY}:
        return bert_tokenizer()
    tokenizer = demo_tokenizer()
    if sizes != {tokenizer.vocab_size}:
        raise OpenVisionError(
            f"the text towers have vocab_size {' and '.join(map(str, sorted(sizes)))}: expected {tokenizer.vocab_size} "
            f"(the demo's tokenizer) or {BERT_VOCABULARY} (BERT uncased) in both"
        )
    return tokenizer


def build_model(config: TrainConfig, device: torch.device, random: bool = True) -> OpenVision3:
    """The model on its device, with its frozen VAE and tokenizer.

    Weights are a function of `config.seed`, or come from `config.init`; with `random` off, those that the run trains
    are yet to be loaded.
    """
    needed = random or config.attach or config.frozen
    source = load_initial(config) if config.init and needed else None
    vae = source.vae if source is not None else None
    if vae is None and config.model.input == "latents":
        vae = load_vae(config.model.vae)
    torch.manual_seed(config.seed)
    model = OpenVision3(trained_model(config), vae, choose_tokenizer(config, source))
    if source is not None:
        copy_weights(source, model, config.init, config.attach)
    if config.model.external is not None and isinstance(model.encoder, ExternalEncoder):
        kept = source.encoder if source is not None else None
        model.encoder.attach(
            kept.tower
            if isinstance(kept, ExternalEncoder)
            else load_external(config.model.external, "cpu", torch.float32)
        )
    model.set_checkpointing(config.checkpoint_blocks)
    model.to(device)
    set_training(model, config.frozen)
    return model


def choose_tokenizer(config: TrainConfig, source: OpenVision3 | None) -> CaptionTokenizer | None:
    """The tokenizer of the model that a text tower is kept from, else the one that fits the towers.

    Raises `OpenVisionError` where there is none.
    """
    towers: dict[ModelPart, object] = {
        "text_encoder": config.model.text_encoder,
        "text_decoder": config.model.text_decoder,
    }
    kept = any(part is not None and name not in config.attach for name, part in towers.items())
    if config.attach and kept and source is not None:
        if source.tokenizer is None:
            raise OpenVisionError(
                f"init: {config.init} has no tokenizer.json, which the text tower that is kept needs; put it there, "
                "or make both towers anew: --attach text_encoder text_decoder"
            )
        return source.tokenizer
    return build_tokenizer(config.model)


def copy_weights(source: OpenVision3, target: OpenVision3, name: str, attach: Collection[ModelPart] = ()) -> None:
    """Copies `source`'s weights, all but the VAE's and those of the parts in `attach`.

    Raises `OpenVisionError` for parts or shapes that differ.
    """

    def tensors(model: OpenVision3) -> dict[str, Tensor]:
        found = named_tensors({"model": model}, (VAE,))
        return {key: tensor for key, tensor in found.items() if part_of(key[6:]) not in attach}

    stored, wanted = tensors(source), tensors(target)
    for key in sorted(stored.keys() ^ wanted.keys()):
        verb = "lacks" if key in wanted else "has"
        raise OpenVisionError(f"init: {name} {verb} {key[6:]}, unlike the recipe's model {target.config.name!r}")
    with torch.no_grad():
        for key, tensor in wanted.items():
            if tensor.shape != stored[key].shape:
                shapes = f"{tuple(stored[key].shape)}, expected {tuple(tensor.shape)}"
                raise OpenVisionError(f"init: {name} has {key[6:]} of shape {shapes}")
            tensor.copy_(stored[key])


def build_objective(
    config: TrainConfig,
    stage: Stage,
    model: OpenVision3,
    precision: Precision,
    world: World = ALONE,
    engine: Engine | None = None,
) -> Objective:
    """Eq. 6 of a stage. LPIPS is loaded only where the stage's lambda is not 0."""
    weight = stage.config.lpips_weight
    perceptual = load_lpips(config.loss.lpips_net).to(model.device, model.logit_scale.dtype) if weight > 0 else None
    return Objective(
        model,
        config.loss,
        weight,
        perceptual,
        seed=config.seed,
        micro_batch=config.micro_batch,
        vae_batch=config.vae_batch,
        pack_text=config.pack_text,
        precision=precision,
        frozen=config.frozen,
        world=world,
        engine=engine,
    )


def settle_precision(config: TrainConfig, folder: Path, model: OpenVision3, stage: Stage) -> Precision:
    """The run's precision: as configured, or the faster by trial; recorded at the first start, kept at each resume."""
    recorded = recorded_environment(folder)
    if recorded is not None and recorded.get("precision") in ("bf16", "fp32", "fp64"):
        return recorded["precision"]
    trial = trial_batch(config, stage)

    def run_step(precision: Precision) -> None:
        build_objective(config, stage, model, precision).backward(trial)
        model.zero_grad()

    precision = choose_precision(config.precision, model.device, run_step)
    record_environment(folder, model.device, precision=precision)
    return precision


def trial_batch(config: TrainConfig, stage: Stage) -> Batch:
    """A batch of noise with full-length texts, for timing one forward pass of a stage."""
    side = stage.config.resolution
    size = min(stage.config.batch_size, config.micro_batch or TRIAL_SAMPLES, TRIAL_SAMPLES)
    generator = torch.Generator().manual_seed(0)

    def ids(length: int, vocab_size: int) -> Tensor:
        return torch.randint(1, vocab_size, (size, length), generator=generator)

    text, caption = config.model.text_encoder, config.model.text_decoder
    contrastive = (text.context_length, text.vocab_size) if text else (2, 2)
    images = torch.randint(0, 256, (size, 3, side, side), generator=generator, dtype=torch.uint8)
    latents = None
    if latents_folder(config, stage):
        images, vae = images[:: config.loss.pixel_stride], config.model.vae
        shape = (size, vae.channels, side // vae.factor, side // vae.factor)
        latents = torch.randn(shape, generator=generator).bfloat16()
    return Batch(
        list(range(size)),
        [""] * size,
        images,
        ids(*contrastive),
        ids(*contrastive),
        ids(caption.context_length, caption.vocab_size) if caption else ids(2, 2),
        captions=[""] * size,
        latents=latents,
    )


def index_folder(config: TrainConfig) -> Path:
    """Where a run keeps what it finds out about tars without an index."""
    return run_folder(config) / "index"


def open_stream(
    config: TrainConfig,
    stage: Stage,
    step: int,
    tokenizer: CaptionTokenizer | None,
    rank: int = 0,
    world_size: int = 1,
) -> BatchStream:
    """A rank's shares of the batches of a stage after `step` (see `data/batches.py`).

    Positions count over the whole run: stage 2 goes on where 1 stopped.
    """
    text, caption = config.model.text_encoder, config.model.text_decoder
    resolution = stage.config.resolution
    data = replace(config.data, scenes=stage.config.scenes or config.data.scenes)
    return BatchStream(
        open_source(data, "train", resolution, index_folder(config)),
        tokenizer,
        resolution,
        stage.config.batch_size,
        start=stage.samples_seen(step),
        stop=stage.last_sample,
        contrastive_length=text.context_length if text else 0,
        caption_length=caption.context_length if caption else 0,
        crop_min_area=config.data.crop_min_area,
        num_workers=config.data.num_workers,
        seed=config.data.seed,
        max_bad_fraction=config.data.max_bad_fraction,
        rank=rank,
        world_size=world_size,
        texts=(data.contrastive_text, data.second_text, data.caption_text),
        latents=open_latents(config, stage),
        pixel_stride=config.loss.pixel_stride,
        fast_decode=config.data.fast_decode,
    )


def held_out_batch(config: TrainConfig, resolution: int, samples: int, tokenizer: CaptionTokenizer | None) -> Batch:
    """Whole pictures with their texts: the first of the held-out split, or of the tars."""
    text, caption, data = config.model.text_encoder, config.model.text_decoder, config.data
    stream = BatchStream(
        open_source(data, "val", resolution, index_folder(config)),
        tokenizer,
        resolution,
        samples,
        start=0,
        stop=samples,
        contrastive_length=text.context_length if text else 0,
        caption_length=caption.context_length if caption else 0,
        max_bad_fraction=1.0,
        texts=(data.contrastive_text, data.second_text, data.caption_text),
    )
    return next(iter(stream))


def picture_pixels(config: TrainConfig, resolution: int) -> Tensor:
    """Whole pictures to look at, uint8 (8, 3, R, R): of the held-out split, or the first of the tars."""
    source = open_source(config.data, "val", resolution, index_folder(config))
    stream = BatchStream(
        source, None, resolution, PICTURES, start=0, stop=PICTURES, contrastive_length=0, caption_length=0
    )
    return next(iter(stream)).images
