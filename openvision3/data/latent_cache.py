"""VAE latents of training crops on disk, so that training neither decodes most pictures nor encodes any.

    FOLDER/cache.json                    what all shards share: see `Caching`
    FOLDER/latents-NNNNNN.safetensors    of tar N, or of the N-th 1,024 demo scenes, written whole

A shard holds `latents` (n, K, C, h, w), bf16: the scaled latents (posterior means) of K crops a sample, in the tar's
order; `boxes` (n, K, 4), int32: left, top, right, bottom of each crop in the sample's own pixels; and `valid` (n,),
bool: off where the picture can't be used. The box of view k is a function of (seed, tar's number, number within it, k);
which view a training takes, one of (its data.seed, position). Rows are read from the mapped file: memory does not grow
with the number of samples.
"""

import hashlib
import re
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from openvision3.config import OpenVisionError, SceneConfig, VAEConfig, load_json
from openvision3.data.samples import BadSample, Sample, Source
from openvision3.data.store import Location, name_of
from openvision3.data.transforms import Box, random_box

CACHE = "cache.json"
FORMAT_VERSION = 1
SCENES = 1024  # demo scenes of a shard
OPEN = 128  # shards kept open: two windows of the shuffled order
FINGERPRINT = "source_fingerprint"  # in a shard's header: of the index of its tar
_SHARD = re.compile(r"latents-(\d{6,})\.safetensors")


@dataclass(frozen=True)
class Caching:
    """What all shards of a cache have in common."""

    source: str  # "demo", or the tars: how many, the first and last name, a hash of all names in their order
    shards: int
    resolution: int  # pixels, each side of a crop
    views: int  # K, crops a sample
    crop_min_area: float
    seed: int  # of the crops, and of the scenes for "demo"
    vae: str  # fingerprint of its encoder: see model/fingerprint.py
    vae_name: str  # where it came from, and its latent convention
    latent_shape: tuple[int, int, int]  # C, h, w
    filter: str = ""  # tars: the samples that it keeps alone are numbered
    image_key: str = ""
    scenes: SceneConfig | None = None  # for "demo"
    first_scene: int = 0  # index of the first scene, for "demo"
    samples: int = 0  # scenes, for "demo"; of tars it is in each shard
    fast_decode: bool = False  # crops as `DataConfig.fast_decode` makes them
    format_version: int = FORMAT_VERSION

    def box(self, shard: int, number: int, view: int, size: tuple[int, int]) -> Box:
        """Where a view of a sample lies in its picture of `size` = (width, height)."""
        key = [zlib.crc32(b"cached crop"), self.seed, shard, number, view]
        rng = np.random.Generator(np.random.PCG64(key))
        return random_box(*size, self.crop_min_area, rng)


class Row(NamedTuple):
    """A view of a sample."""

    latents: Tensor  # (C, h, w), bf16
    box: Box


def describe_tars(tars: Sequence[Location]) -> str:
    """`Caching.source` of tars: by their names, so that they may move together."""
    names = [name_of(tar) for tar in tars]
    digest = hashlib.sha256("\n".join(names).encode("utf-8", "surrogatepass")).hexdigest()[:12]
    ends = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
    return f"{len(names)} tar{'s' * (len(names) > 1)}, {ends} ({digest})"


def describe_vae(config: VAEConfig) -> str:
    """`Caching.vae_name`."""
    return f"{config.source}, latent_scale {config.latent_scale:g}, latent_shift {config.latent_shift:g}"


def shard_path(folder: Path, number: int) -> Path:
    """The file of a shard."""
    return folder / f"latents-{number:06d}.safetensors"


def shards_there(folder: Path) -> set[int]:
    """Numbers of the shards that are written."""
    return {int(match[1]) for match in (_SHARD.fullmatch(path.name) for path in folder.iterdir()) if match}


def load_caching(folder: Path) -> Caching:
    """What a folder's `cache.json` says. Raises `OpenVisionError` where it is no cache, or of another format."""
    if not (folder / CACHE).is_file():
        raise OpenVisionError(f"{folder} is no cache of latents: it has no {CACHE} (ov3 data cache-latents makes one)")
    caching = load_json(Caching, folder / CACHE)
    if caching.format_version != FORMAT_VERSION:
        raise OpenVisionError(f"{folder} has format_version {caching.format_version}, expected {FORMAT_VERSION}")
    return caching


class LatentCache:
    """Reads a complete cache, lazily, for one source; goes into worker processes, forked or spawned.

    Raises `OpenVisionError` where the folder is no cache, or shards are missing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.caching = load_caching(self.folder)
        done = len(shards_there(self.folder) & set(range(self.caching.shards)))
        if done < self.caching.shards:
            raise OpenVisionError(
                f"{self.folder} has {done} of {self.caching.shards} shards: the same ov3 data cache-latents command "
                "makes the others"
            )
        self._open: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def read(self, source: Source, sample: Sample, view: int) -> Row:
        """A view of a sample of `source`.

        Raises `BadSample` where its picture can't be used, and `OpenVisionError` where the shard was made of other
        samples, or is broken.
        """
        shard, row = sample.shard, sample.number
        if self.caching.source == "demo":
            shard, row = divmod(row - self.caching.first_scene, SCENES)
        path = shard_path(self.folder, shard)
        try:
            file = self._file(source, sample, shard)
            if not bool(file.get_slice("valid")[row]):
                raise BadSample(sample.name, "had no usable picture when its latents were cached")
            left, top, right, bottom = file.get_slice("boxes")[row, view].tolist()
            return Row(file.get_slice("latents")[row, view], (left, top, right, bottom))
        except (SafetensorError, OSError) as error:
            raise OpenVisionError(f"{path} is no readable shard of latents ({error}): remove it, cache again") from None

    def _file(self, source: Source, sample: Sample, shard: int) -> Any:
        """A shard's open file; when it is opened, its tar must be the one that it was made of."""
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        path = shard_path(self.folder, shard)
        file = safe_open(path, "pt").__enter__()
        if (file.metadata() or {}).get(FINGERPRINT) != str(source.fingerprint(sample.shard)):
            raise OpenVisionError(
                f"{path} was made of other samples than {sample.tar or 'the scenes'} holds now: its index differs; "
                "remove the file and cache it again"
            )
        self._open[shard] = file
        if len(self._open) > OPEN:
            self._open.popitem(last=False)
        return file
