"""How fast one machine makes batches of training samples, where the time goes, and how many cores feed one device.

Cores are counted by processor time: samples over the seconds that all processes computed, as a core on which other
work runs is no measure of the wall's clock.
"""

import io
import itertools
import json
import os
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from openvision3.bench.timing import Spread
from openvision3.config import DataConfig, OpenVisionError, TextDecoderConfig, TextEncoderConfig, TrainConfig
from openvision3.data import demo, grammar
from openvision3.data.batches import BatchStream
from openvision3.data.samples import Boxes, Sample, Source
from openvision3.data.shards import open_source
from openvision3.data.tar_index import save_index, scan
from openvision3.data.tokenizer import CaptionTokenizer
from openvision3.data.transforms import Box, random_box
from openvision3.model.flops import vae_flops
from openvision3.training.attach import trained_model
from openvision3.training.dryrun import training_flops
from openvision3.vae_diffusers import flux_shell

BATCH = 64
SIDES = (512, 1024)  # pixels, of the pictures that are made here
QUALITY = 90  # of their JPEGs, with halved colour as cameras and web sites have it
H100_PEAK = 989e12  # dense bf16 FLOP/s
UTILISATION = 0.4  # of it, that training is taken to reach
FLUX_SOURCE = "black-forest-labs/FLUX.1"


@dataclass(frozen=True)
class Rate:
    """Samples of a stream with some number of worker processes."""

    workers: int
    per_second: Spread  # of the wall's clock, from opening the workers to the last batch
    per_core: Spread  # a second of processor time, of all processes


@dataclass(frozen=True)
class Parts:
    """Milliseconds of processor time a sample."""

    read: Spread  # members and texts of a tar, or thinking up a scene and its texts
    decode: Spread  # or rendering a scene
    crop: Spread  # cutting and resizing
    text: Spread  # to tokens


def make_pictures(folder: Path, count: int, seed: int = 0) -> Path:
    """Writes a tar of photographs of random sides within `SIDES`, as JPEGs with two texts; returns its path.

    The photographs are the demo's landscapes side by side at their own size, so that they are as detailed as
    photographs are, and described as a scene of the demo is.
    """
    path = folder / "000000.tar"
    stems = demo.landscapes(held_out=False)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(count):
            rng = np.random.Generator(np.random.PCG64([seed, number]))
            width, height = (SIDES[0] + int(rng.random() * (SIDES[1] - SIDES[0] + 1)) for _ in range(2))
            picture = Image.new("RGB", (width, height))
            for top in range(0, height, 288):
                for left in range(0, width, 576):
                    picture.paste(demo.landscape(stems[int(rng.random() * len(stems))]), (left, top))
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=QUALITY)
            texts = grammar.captions(demo.scene(DataConfig().scenes, "train", seed, number))
            members = {
                "jpg": buffer.getvalue(),
                "txt": texts.alt.encode(),
                "json": json.dumps({"caption": texts.caption, "width": width, "height": height}).encode(),
            }
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{number:06d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    save_index(scan(path))
    return path


@dataclass(frozen=True)
class Feed:
    """What a training would read: samples of `data` at a resolution, with texts of these lengths."""

    data: DataConfig
    resolution: int
    tokenizer: CaptionTokenizer
    contrastive_length: int = TextEncoderConfig.context_length
    caption_length: int = TextDecoderConfig.context_length

    def open(self) -> Source:
        """Its samples."""
        return open_source(self.data, "train", self.resolution)

    def stream(self, source: Source, start: int, samples: int, workers: int) -> BatchStream:
        """As the training opens it."""
        return BatchStream(
            source,
            self.tokenizer,
            self.resolution,
            BATCH,
            start,
            start + samples,
            contrastive_length=self.contrastive_length,
            caption_length=self.caption_length,
            crop_min_area=self.data.crop_min_area,
            num_workers=workers,
            fast_decode=self.data.fast_decode,
        )


def stream_rates(feed: Feed, workers: Sequence[int], samples: int, rounds: int) -> list[Rate]:
    """Rates with each number of workers in turns, every round on the samples after the last one's."""
    source = feed.open()
    for _ in feed.stream(source, 0, BATCH, 0):  # what is read once, and is in memory in the midst of a training
        pass
    walls: dict[int, list[float]] = {count: [] for count in workers}
    cores: dict[int, list[float]] = {count: [] for count in workers}
    for number in range(rounds):
        for count in workers:
            wall, core = time.perf_counter(), processor_seconds()
            seen = sum(len(batch.positions) for batch in feed.stream(source, number * samples, samples, count))
            walls[count].append(seen / (time.perf_counter() - wall))
            cores[count].append(seen / (processor_seconds() - core))
    return [Rate(count, Spread.of(walls[count]), Spread.of(cores[count])) for count in workers]


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    now = os.times()
    return now.user + now.system + now.children_user + now.children_system


def sample_parts(feed: Feed, samples: int, rounds: int) -> Parts:
    """Where the time of a sample goes, in this process alone.

    Decoding and cropping are one call; a second crop of the same place costs a crop alone, which tells them apart.
    """
    source, rendered = feed.open(), feed.data.source == "demo"
    figures: dict[str, list[float]] = {"read": [], "decode": [], "crop": [], "text": []}
    for number in range(-1, rounds):  # the first one warms up
        positions = range(max(number, 0) * samples, (max(number, 0) + 1) * samples)
        clock = [time.process_time()]
        found = [source.read_texts(p) if rendered else source.read_encoded(p) for p in positions]
        clock.append(time.process_time())
        if rendered:
            found = [source.read(p) for p in positions]
        clock.append(time.process_time())
        for times in (1, 2):
            for sample in found:
                sample.crops(feed.resolution, _same_box(feed.data.crop_min_area, times), feed.data.fast_decode)
            clock.append(time.process_time())
        _tokenize(feed, found)
        clock.append(time.process_time())
        read, drawn, once, twice, text = (after - before for before, after in itertools.pairwise(clock))
        crop = max(0.0, twice - once)
        seconds = {"read": read, "decode": drawn - read if rendered else once - crop, "crop": crop, "text": text}
        if number >= 0:
            for name, value in seconds.items():
                figures[name].append(1e3 * value / samples)
    return Parts(**{name: Spread.of(values) for name, values in figures.items()})


def _same_box(min_area: float, times: int) -> Boxes:
    def boxes(width: int, height: int) -> list[Box]:
        rng = np.random.Generator(np.random.PCG64([width, height]))
        return [random_box(width, height, min_area, rng)] * times

    return boxes


def _tokenize(feed: Feed, samples: Sequence[Sample]) -> None:
    """What a batch does of the texts."""
    for i in range(0, len(samples), BATCH):
        alts = [sample.alt for sample in samples[i : i + BATCH]]
        for _ in range(2):
            feed.tokenizer.encode_contrastive(alts, feed.contrastive_length)
        feed.tokenizer.encode_caption([sample.caption for sample in samples[i : i + BATCH]], feed.caption_length)


@dataclass(frozen=True)
class Demand:
    """Samples a second that one device trains on."""

    rate: float
    flops: float | None  # a sample; None: the rate was given


def device_demand(config: TrainConfig, resolution: int, peak: float = H100_PEAK) -> Demand:
    """The rate at which a device trains a recipe, by counted FLOPs at `UTILISATION` of its `peak` FLOP/s.

    FLUX.1's VAE is counted on its shapes. Raises `OpenVisionError` for a recipe with another VAE that has no weights
    here.
    """
    import torch

    from openvision3.model.openvision3 import OpenVision3
    from openvision3.vae import load_vae

    with torch.device("meta"):
        forward = OpenVision3(trained_model(config)).flops(resolution)
    if config.model.input == "latents":
        flux = config.model.vae.source.startswith(FLUX_SOURCE)
        forward |= vae_flops(flux_shell() if flux else load_vae(config.model.vae), resolution)
    batch = max((stage.batch_size for stage in config.stages), default=1)
    flops = training_flops(config, forward, 0 < config.micro_batch < batch)
    if flops <= 0:
        raise OpenVisionError(f"the recipe {config.recipe} trains nothing")
    return Demand(UTILISATION * peak / flops, flops)
