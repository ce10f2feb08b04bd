"""The batches that a generator learns from."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from openvision3.config import StageConfig, TrainConfig
from openvision3.data.batches import BatchStream
from openvision3.data.latent_cache import LatentCache
from openvision3.data.shards import open_source
from openvision3.generation.train_config import GeneratorTrainConfig
from openvision3.model.openvision3 import OpenVision3
from openvision3.training.latents import check_latents, open_latents
from openvision3.training.stages import plan


def open_batches(
    config: GeneratorTrainConfig,
    model: OpenVision3,
    folder: Path,
    *,
    start: int,
    stop: int,
    batch_size: int = 0,
    split: str = "train",
    rank: int = 0,
    world_size: int = 1,
) -> BatchStream:
    """A rank's shares of the batches of positions `start` to `stop`; texts as `DataConfig.caption_text` chooses them.

    Pictures are never flipped. `folder`: for the indexes of tars that have none. With `data.latents`, batches have
    cached latents and no pictures.
    """
    data = config.data
    length = 0
    if config.generator.condition == "text":
        assert model.text_encoder is not None
        length = model.text_encoder.config.context_length
    cache = latents_of(config, model)[0] if split == "train" else None
    return BatchStream(
        open_source(data, split, config.resolution, folder / "index"),
        model.tokenizer,
        config.resolution,
        batch_size or config.batch_size,
        start=start,
        stop=stop,
        contrastive_length=length,
        caption_length=0,
        crop_min_area=data.crop_min_area if split == "train" else 1.0,
        num_workers=data.num_workers,
        seed=data.seed,
        max_bad_fraction=data.max_bad_fraction,
        rank=rank,
        world_size=world_size,
        texts=(data.caption_text, data.caption_text, data.caption_text),
        latents=cache,
        pixel_stride=2**31 if cache is not None else 1,  # no picture but the first of a batch need be read
        fast_decode=data.fast_decode,
    )


def latents_of(config: GeneratorTrainConfig, model: OpenVision3) -> tuple[LatentCache | None, str]:
    """The cache of latents that `config.data` names and a hash of what it was made with; None and empty without one.

    Raises `OpenVisionError` where it has other samples, crops or another VAE than the run.
    """
    stage = StageConfig(config.resolution, config.steps * config.batch_size, 0, config.batch_size)
    as_encoder = TrainConfig(config.recipe, model=model.config, data=config.data, stage1=stage)
    stages = plan(as_encoder)
    return open_latents(as_encoder, stages[0]), check_latents(as_encoder, stages, model.vae)


def held_out(config: GeneratorTrainConfig, model: OpenVision3, folder: Path, count: int) -> tuple[Tensor, list[str]]:
    """Pictures to compare sheets with, uint8 (B, 3, R, R), and their texts: held-out scenes, or the first of tars."""
    data = replace(config.data, num_workers=0, latents="")
    stream = open_batches(replace(config, data=data), model, folder, start=0, stop=count, batch_size=count, split="val")
    batch = next(iter(stream))
    return torch.as_tensor(batch.images), batch.captions
