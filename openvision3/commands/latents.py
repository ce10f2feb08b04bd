"""`ov3 data cache-latents`: the latents of K crops of each sample, so that training encodes nothing."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from openvision3.commands import common
from openvision3.commands.batching import OutputOptions
from openvision3.commands.common import ModelOptions
from openvision3.commands.data import Paths
from openvision3.commands.encode import on_own_device, share_of_work
from openvision3.config import DataConfig, OpenVisionError, SceneConfig

if TYPE_CHECKING:
    from openvision3.data.latent_cache import Caching
    from openvision3.data.shards import DemoSource, TarSource
    from openvision3.vae import FrozenVAE

ANY_SCENES = SceneConfig()

Output = Annotated[OutputOptions, tyro.conf.arg(name=""), tyro.conf.FlagCreatePairsOff]


def cache_latents(
    source: Paths,
    out: Path,
    resolution: int,
    views: int = 1,
    crop_min_area: float = DataConfig.crop_min_area,
    vae: str = "tiny",
    latent_scale: float | None = None,
    latent_shift: float | None = None,
    seed: int = 0,
    samples: int = 0,
    first_scene: int = 0,
    scenes: SceneConfig = ANY_SCENES,
    filter: str = DataConfig.filter,
    image_key: str = DataConfig.image_key,
    fast_decode: bool = DataConfig.fast_decode,
    batch_size: int = 64,
    dtype: Literal["fp32", "bf16"] = "fp32",
    device: str = "auto",
    workers: int = 1,
    output: Output = OutputOptions(),
) -> int:
    """Writes the VAE latents (means, bf16) of K crops a sample with their boxes: `ov3 train --data.latents OUT`.

    The command may be stopped at any moment, and the same command goes on: tars that are done are left alone. It may
    run several times at once, on one machine or many that share the folder, or under torchrun: each tar is done by one
    process, and all return when every tar is done.

    Args:
        source: tars: files, URLs, brace lists, globs or folders, in the order of the training's; or demo
        out: folder of the cache, one file a tar
        resolution: pixels, each side of a crop: the training stage's
        views: crops a sample, each a function of (seed, sample, number of the view)
        crop_min_area: least area of a crop, as a fraction of the picture's: the training's; 1: the centre square
        vae: "tiny", or a folder or hub id of the autoencoder that the training uses
        latent_scale: the training's model.vae.latent_scale, where it is not the one that the VAE's own config states
        latent_shift: the training's model.vae.latent_shift, likewise (0 for OpenVision 3 on FLUX.1's VAE)
        seed: of the crops; for demo also of the scenes, as --data.seed
        samples: for demo: how many scenes
        first_scene: for demo: index of the first; a training's second stage begins where its first one ends
        scenes: for demo: their distribution, the training stage's
        filter: only the samples whose json fields meet it: the training's --data.filter
        image_key: the member that holds the picture: the training's --data.image-key
        fast_decode: decode JPEGs at a fraction of their size: the training's --data.fast-decode
        batch_size: crops encoded at once
        dtype: of the VAE's arithmetic
        workers: processes beside this one that read and crop pictures; 0: none
    """
    common.refuse_existing(output.json, output.overwrite)
    _, world = share_of_work()
    if world > 1 and output.json is not None:
        raise OpenVisionError("--json: each process would write it; leave it out under torchrun")
    _check(views, crop_min_area, batch_size, workers, seed)
    import torch

    from openvision3.data.latent_filling import begin_cache, fill_cache
    from openvision3.training.precision import resolve_device
    from openvision3.training.run_folder import RunInterrupted, StopRequest
    from openvision3.vae import load_vae

    loaded = load_vae(vae)
    convention = {"latent_scale": latent_scale, "latent_shift": latent_shift}
    loaded.config = replace(loaded.config, **{name: value for name, value in convention.items() if value is not None})
    place = resolve_device(on_own_device(ModelOptions(device=device), world).device)
    config = DataConfig(
        source=source[0], seed=seed, scenes=scenes, filter=filter, image_key=image_key, fast_decode=fast_decode
    )
    caching = _describe(source, config, loaded, resolution, views, crop_min_area, samples, first_scene)
    begin_cache(out, caching)
    pictures = _open(source, config, resolution, out)
    loaded.to(place, torch.bfloat16 if dtype == "bf16" else torch.float32)
    failed = 0

    def encode(crops: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            images = crops.to(place).to(next(loaded.parameters()).dtype) / 127.5 - 1  # as a training step does
            return loaded.encode(images)

    with StopRequest() as stop, common.Progress(_left(out, caching, pictures), "samples") as progress:

        def told(done: int, failures: list[str]) -> None:
            nonlocal failed
            failed += len(failures)
            for line in failures:
                common.fail(line)
            progress.advance(done)
            if stop:
                where = f"stopped; what is done is in {out}, and the same command goes on from there"
                raise RunInterrupted(where, stop.signal_number)

        fill_cache(out, caching, pictures, encode, batch_size, workers, told)
    stored = sum(path.stat().st_size for path in out.glob("latents-*.safetensors"))
    figures = {
        "samples": progress.done,
        "failed": failed,
        "samples_per_second": progress.rate,
        "shards": caching.shards,
        "bytes": stored,
    }
    print(
        f"{out}: {progress.done} samples of {caching.source} cached here, {failed} unusable, {progress.rate:.1f}/s; "
        f"{caching.shards} shards in {stored / 1e6:.1f} MB"
    )
    common.write_json(output.json, figures, output.overwrite)
    return 1 if failed else 0


def _check(views: int, crop_min_area: float, batch_size: int, workers: int, seed: int) -> None:
    if views < 1 or batch_size < 1 or workers < 0 or seed < 0:
        raise OpenVisionError("--views and --batch-size must be at least 1, --workers and --seed at least 0")
    if not 0 < crop_min_area <= 1:
        raise OpenVisionError(f"--crop-min-area is {crop_min_area}: expected more than 0 and at most 1")
    if views > 1 and crop_min_area == 1:
        raise OpenVisionError(
            f"--views {views} with --crop-min-area 1: the centre square is the only crop; take --views 1, or a "
            "--crop-min-area below 1"
        )


def _describe(
    paths: tuple[str, ...],
    config: DataConfig,
    vae: "FrozenVAE",
    resolution: int,
    views: int,
    crop_min_area: float,
    samples: int,
    first_scene: int,
) -> "Caching":
    from openvision3.data.latent_cache import SCENES, Caching, describe_tars, describe_vae
    from openvision3.data.store import expand
    from openvision3.model.fingerprint import vae_fingerprint

    factor = vae.config.factor
    if resolution < 1 or resolution % factor:
        raise OpenVisionError(f"--resolution is {resolution}: expected a multiple of the VAE's {factor} pixels")
    side = resolution // factor
    shape = (vae.config.channels, side, side)
    made = (resolution, views, crop_min_area, config.seed, vae_fingerprint(vae), describe_vae(vae.config), shape)
    if "demo" in paths:
        if paths != ("demo",):
            raise OpenVisionError("demo and tars can't share a cache: choose another --out for each")
        if samples < 1 or first_scene < 0 or config.filter or config.image_key or config.fast_decode:
            raise OpenVisionError(
                "demo needs --samples of at least 1, --first-scene of at least 0, and takes no --filter, --image-key "
                "or --fast-decode"
            )
        shards = -(-samples // SCENES)
        return Caching("demo", shards, *made, scenes=config.scenes, first_scene=first_scene, samples=samples)
    if samples or first_scene or config.scenes != ANY_SCENES:
        raise OpenVisionError("--samples, --first-scene and --scenes are for demo; of tars, every sample is cached")
    tars = expand(paths)
    return Caching(
        describe_tars(tars), len(tars), *made, config.filter, config.image_key, fast_decode=config.fast_decode
    )


def _open(paths: tuple[str, ...], config: DataConfig, resolution: int, out: Path) -> "DemoSource | TarSource":
    from openvision3.data.shards import DemoSource, TarSource

    if paths == ("demo",):
        return DemoSource(config, "train", resolution)
    # a tar without an index is gone through when it is reached, by whichever process that is
    return TarSource(paths, config, shuffle=False, cache=out / "index")


def _left(out: Path, caching: "Caching", source: "DemoSource | TarSource") -> int | None:
    """Samples of the shards that are not there yet; None where they are not counted."""
    from openvision3.data.latent_cache import SCENES, shards_there
    from openvision3.data.shards import DemoSource

    missing = sorted(set(range(caching.shards)) - shards_there(out))
    if isinstance(source, DemoSource):
        counts = [min(SCENES, caching.samples - number * SCENES) for number in missing]
    else:
        counts = [int(source.library.counts[number]) for number in missing]
    return sum(counts) if all(count >= 0 for count in counts) else None
