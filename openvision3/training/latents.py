"""A run's caches of latents: one a stage, checked against the run before it starts."""

import hashlib
import json
from collections.abc import Sequence

from openvision3.config import OpenVisionError, TrainConfig, to_dict
from openvision3.data.latent_cache import LatentCache, describe_tars, describe_vae
from openvision3.data.store import Location, Store, expand
from openvision3.model.fingerprint import vae_fingerprint
from openvision3.training.stages import Stage
from openvision3.vae import FrozenVAE


def check_latents(config: TrainConfig, stages: Sequence[Stage], vae: FrozenVAE | None) -> str:
    """A hash (hex) of what the stages' caches were made with; empty where no stage has one.

    Raises `OpenVisionError` where a cache lacks shards, or was made otherwise than the run needs it.
    """
    caches = [cache for stage in stages if (cache := open_latents(config, stage)) is not None]
    if not caches:
        return ""
    assert vae is not None
    fingerprint = vae_fingerprint(vae)
    for cache in caches:
        made = cache.caching
        if made.vae != fingerprint:
            raise OpenVisionError(
                f"{cache.folder} holds latents of the VAE {made.vae_name} (fingerprint {made.vae[:12]}), but the run's "
                f"is {describe_vae(vae.config)} (fingerprint {fingerprint[:12]})"
            )
    return hashlib.sha256(json.dumps([_made_with(cache) for cache in caches]).encode()).hexdigest()


def _made_with(cache: LatentCache) -> dict[str, object]:
    made = to_dict(cache.caching)
    if not made["fast_decode"]:  # runs that began before there was the field have a hash without it
        del made["fast_decode"]
    return made


def latents_folder(config: TrainConfig, stage: Stage) -> str:
    """The folder of a stage's cache; empty: it has none."""
    return config.data.latents if stage.config.latents is None else stage.config.latents


def open_latents(config: TrainConfig, stage: Stage) -> LatentCache | None:
    """A stage's cache, or None where it has none.

    Raises `OpenVisionError` where its samples or crops are not the stage's, naming both values; `check_latents` looks
    at the VAE too.
    """
    folder, data = latents_folder(config, stage), config.data
    if not folder:
        return None
    if config.model.input != "latents" or config.model.external is not None:
        raise OpenVisionError(f"data.latents is {folder}, but the model {config.model.name!r} reads pixels")
    cache = LatentCache(folder)
    made = cache.caching
    wanted: list[tuple[str, object, object]] = [
        ("resolution", made.resolution, stage.config.resolution),
        ("source", made.source, _source(config)),
        ("crop_min_area", made.crop_min_area, data.crop_min_area),
    ]
    if made.source == "demo":
        wanted += [("seed", made.seed, data.seed), ("scenes", made.scenes, stage.config.scenes or data.scenes)]
    else:  # the order's seed may be any: the cache has all samples
        wanted += [("filter", made.filter, data.filter), ("image_key", made.image_key, data.image_key)]
        wanted += [("fast_decode", made.fast_decode, data.fast_decode)]
    for name, old, new in wanted:
        if old != new:
            raise OpenVisionError(f"{folder} holds latents with {name} {old!r}, but stage {stage.number} has {new!r}")
    first, last = made.first_scene, made.first_scene + made.samples
    if made.source == "demo" and not (first <= stage.first_sample and stage.last_sample <= last):
        raise OpenVisionError(
            f"{folder} holds the scenes {first} to {last - 1}, but stage {stage.number} sees "
            f"{stage.first_sample} to {stage.last_sample - 1}"
        )
    return cache


def _source(config: TrainConfig) -> str:
    """As `Caching.source` says it."""
    data = config.data
    if data.sources == ("demo",):
        return "demo"
    if "demo" in data.sources:
        raise OpenVisionError("data.latents: a mixture of rendered scenes and tars can't be cached: write tars of them")
    store = Store(data.store_attempts, data.store_timeout)
    tars: list[Location] = [tar for source in data.sources for tar in expand(source, store)]
    return describe_tars(tars)
