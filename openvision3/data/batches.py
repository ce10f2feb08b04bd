"""Batches in an order that is a pure function of the configuration: the stream can start at any position.

Positions count samples since the start of the training. What a position holds depends on (source, seed, position)
alone: not on the number of workers or ranks, nor on where the stream was begun. So a resumed run sees exactly what an
unbroken one sees.

Ranks. Every rank of a distributed run opens the same stream, with its `rank` and the `world_size` as plain integers and
the global `batch_size`: nothing here knows of process groups. Batch i holds, on rank r of W, the contiguous share
`start + i * batch_size + [r * batch_size / W, (r + 1) * batch_size / W)` of the positions; the shares of all ranks, in
the order of the ranks, are the batch of one process. `Batch.positions` says which positions a batch has (what noise and
other draws are keyed by). A global batch that W does not divide is refused. Each rank counts and replaces the unusable
samples of its own share, and raises by its own count: a rank that raises must end the others too.
"""

import logging
import math
import os
import random
import re
import signal
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from openvision3.config import OpenVisionError, TextRule
from openvision3.data.latent_cache import LatentCache, Row
from openvision3.data.samples import BadSample, Sample, Source
from openvision3.data.tokenizer import CaptionTokenizer
from openvision3.data.transforms import Box, random_box

log = logging.getLogger(__name__)

FEWEST_SAMPLES = (
    100  # the allowed fraction is taken of at least so many: one bad sample in a small tar is no reason to stop
)
SUBSTITUTES = 16  # tried for one position; the data are unusable where they all fail
CHUNK = 64  # positions whose samples are fetched together
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")

Bad = tuple[int, str, str]  # position, key, reason


TEXTS: tuple[TextRule, TextRule, TextRule] = ("alt", "sentence", "caption")


@dataclass
class Batch:
    """Samples of consecutive positions, with their texts as the rules say (by default as said here).

    Text ids are int64 and of length 0 where a length of 0 was asked for.
    """

    positions: list[int]
    keys: list[str]
    images: Tensor  # uint8 (B, 3, R, R); with latents, of every `pixel_stride`-th sample of the global batch alone
    alt_ids: Tensor  # (B, contrastive_length): the alt text, laid out for the text encoder
    caption_text_ids: (
        Tensor  # (B, contrastive_length): a random sentence of the caption, for the second contrastive loss
    )
    caption_ids: Tensor  # (B, caption_length): the whole caption, laid out for the caption decoder
    captions: list[str]
    bad: list[Bad] = field(default_factory=list)  # what could not be used and was replaced
    latents: Tensor | None = None  # bf16 (B, C, h, w), of the crops that `images` shows; None: not cached
    standing_in: int = 0  # samples with one text where the training asks for two


@dataclass
class _Failure:
    """An error of a worker, carried over as a value so that users see its one line and no traceback."""

    message: str


class BatchStream:
    """Iterates over a rank's shares of the batches of the positions from `start` to `stop`.

    The last batch may be smaller, in a world of one rank alone.

    A sample that can't be used is replaced by another, drawn by (seed, position), and added to `bad`, which gathers
    (position, key, reason) of all iterations. Iterating raises `OpenVisionError` once more than `max_bad_fraction` of
    the samples are bad, or where no substitute can be found; so does a batch size that the ranks do not divide.

    With `latents`, which must be of this source, batches have cached latents, and crops by their boxes; the view is a
    function of (seed, position). Pictures are then read and decoded only where pixels are compared: at every
    `pixel_stride`-th sample of the global batch.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: CaptionTokenizer | None,
        resolution: int,
        batch_size: int,  # global
        start: int,
        stop: int,
        *,
        contrastive_length: int,  # tokens of alt_ids and caption_text_ids; 0: none
        caption_length: int,  # tokens of caption_ids; 0: none
        crop_min_area: float = 1.0,
        num_workers: int = 0,  # processes beside this one; 0: this one does the work
        seed: int = 0,  # of crops, sentences and substitutes
        max_bad_fraction: float = 0.01,
        rank: int = 0,
        world_size: int = 1,
        texts: tuple[TextRule, TextRule, TextRule] = TEXTS,  # of alt_ids, caption_text_ids and caption_ids
        latents: LatentCache | None = None,
        pixel_stride: int = 1,
        fast_decode: bool = False,  # JPEGs at a fraction of their size where crops are far larger: see `decode_crops`
    ):
        if batch_size < 1 or start < 0:
            raise ValueError(f"batch_size {batch_size} must be at least 1, and start {start} at least 0")
        if tokenizer is None and (contrastive_length or caption_length):
            raise ValueError("texts were asked for, but there is no tokenizer")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}: expected 0 to {world_size - 1}, for a world size of {world_size}")
        if batch_size % world_size or (world_size > 1 and (stop - start) % batch_size):
            raise OpenVisionError(
                f"a global batch of {batch_size} samples, and {stop - start} samples in all, can't be divided among "
                f"{world_size} processes: choose a number of processes that divides the batch"
            )
        self.batches = _Batches(
            source,
            tokenizer,
            resolution,
            batch_size,
            start,
            stop,
            contrastive_length,
            caption_length,
            crop_min_area,
            seed,
            rank * (batch_size // world_size),
            batch_size // world_size,
            texts,
            latents,
            pixel_stride,
            fast_decode,
        )
        self.num_workers = num_workers
        self.max_bad_fraction = max_bad_fraction
        self.bad: list[Bad] = []
        self.seen = 0
        self._bad_keys: set[str] = set()
        self._told = False

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        loader = DataLoader(
            self.batches,
            batch_size=None,
            num_workers=min(self.num_workers, len(self.batches)),
            worker_init_fn=begin_worker,
            generator=torch.Generator(),  # else the loader would draw from the global one, and change what follows
        )
        for batch in loader:
            if isinstance(batch, _Failure):
                raise OpenVisionError(batch.message)
            self._count(batch)
            yield batch

    def _count(self, batch: Batch) -> None:
        """Logs what could not be used, and stops where it is too much.

        What counts is how many different samples are bad: too many of all that there are, or so many of those seen that
        it is no accident (three standard deviations). One is never too many, however small the data and long the run.
        """
        self.seen += len(batch.positions)
        if not self._told and 2 * batch.standing_in > len(batch.positions):
            self._told = True
            log.warning(
                "%d of a batch's %d samples lack the text that data.caption_field or data.alt_key names, and the other "
                "stands in: `ov3 data check` with the same names counts them",
                batch.standing_in,
                len(batch.positions),
            )
        self.bad += batch.bad
        for position, key, reason in batch.bad:
            log.warning("position %d: sample %s skipped: %s", position, key, reason)
            self._bad_keys.add(key)
        bad, total = len(self._bad_keys), self.batches.source.size
        whole = self.seen if total is None else total
        seen = max(min(self.seen, whole), FEWEST_SAMPLES)
        whole = max(whole, FEWEST_SAMPLES)
        surely_bad = bad - 3 * math.sqrt(bad)
        if (total is not None and bad > self.max_bad_fraction * whole) or surely_bad > self.max_bad_fraction * seen:
            _, key, reason = self.bad[0]
            of = f"{self.seen} samples" if total is None or self.seen < total else f"all {total} samples"
            raise OpenVisionError(
                f"{bad} of {of} can't be used, more than max_bad_fraction = {self.max_bad_fraction:.2%} allows; the "
                f"first is {key}: {reason} (`ov3 data check` lists them all)"
            )


def _draw(what: str, below: int) -> int:
    """A number from 0 to `below` - 1, a function of `what`."""
    return int(random.Random(what).random() * below)


def begin_worker(worker: int) -> None:
    """One thread a worker process; a signal to the whole group is the training's to answer, not the workers'.

    Only where the training itself tells a worker to end, it does so at once, in the middle of whatever it waits for.
    """
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # before there is another thread, which inherits it
        threading.Thread(target=_end_when_told, args=(os.getppid(),), daemon=True).start()


def _end_when_told(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


class _Batches(Dataset[Batch | _Failure]):
    """Item i: the i-th batch."""

    def __init__(
        self,
        source: Source,
        tokenizer: CaptionTokenizer | None,
        resolution: int,
        batch_size: int,
        start: int,
        stop: int,
        contrastive_length: int,
        caption_length: int,
        crop_min_area: float,
        seed: int,
        share_start: int,
        share: int,
        texts: tuple[TextRule, TextRule, TextRule],
        latents: LatentCache | None,
        pixel_stride: int,
        fast_decode: bool,
    ):
        self.source = source
        self.tokenizer = tokenizer
        self.resolution = resolution
        self.batch_size = batch_size
        self.start = start
        self.stop = stop
        self.contrastive_length = contrastive_length
        self.caption_length = caption_length
        self.crop_min_area = crop_min_area
        self.seed = seed
        self.share_start, self.share = share_start, share  # of a batch: what this rank has of it
        self.texts = texts
        self.latents, self.pixel_stride = latents, pixel_stride
        self.fast_decode = fast_decode

    def __len__(self) -> int:
        return max(0, -(-(self.stop - self.start) // self.batch_size))

    def __getitem__(self, index: int) -> Batch | _Failure:
        begin = self.start + index * self.batch_size  # of the global batch
        first = begin + self.share_start
        positions = list(range(first, min(first + self.share, self.stop)))
        chunks = [positions[i : i + CHUNK] for i in range(0, len(positions), CHUNK)]
        unseen = {p for p in positions if self.latents is not None and (p - begin) % self.pixel_stride}
        keys: list[str] = []
        images: list[np.ndarray] = []
        latents: list[Tensor] = []
        texts: tuple[list[str], ...] = ([], [], [])
        bad: list[Bad] = []
        standing_in = 0
        try:
            self._prepare(chunks[0], unseen)
            for number, chunk in enumerate(chunks, start=1):
                if number < len(chunks):
                    self._prepare(chunks[number], unseen)  # on its way while this chunk is decoded
                for position in chunk:
                    sample, row, image = self._sample(position, position not in unseen, bad)
                    keys.append(sample.key)
                    standing_in += self._lacks(sample)
                    if image is not None:
                        images.append(image)
                    if row is not None:
                        latents.append(row.latents)
                    for role, (rule, column) in enumerate(zip(self.texts, texts, strict=True)):
                        column.append(self._text(sample, rule, role, position))
        except (OpenVisionError, OSError) as error:
            return _Failure(str(error))
        return Batch(
            positions,
            keys,
            self._pixels(images),
            self._ids(texts[0], self.contrastive_length, contrastive=True),
            self._ids(texts[1], self.contrastive_length, contrastive=True),
            self._ids(texts[2], self.caption_length, contrastive=False),
            texts[2],
            bad,
            torch.stack(latents) if latents else None,
            standing_in,
        )

    def _lacks(self, sample: Sample) -> bool:
        """Whether a tower is given one text of the sample in place of the other."""
        lengths = (self.contrastive_length, self.contrastive_length, self.caption_length)
        rules = {rule for rule, length in zip(self.texts, lengths, strict=True) if length}
        return sample.missing == "alt" and "alt" in rules or sample.missing == "caption" and bool(rules - {"alt"})

    def _prepare(self, positions: list[int], unseen: set[int]) -> None:
        if self.latents is None:
            self.source.prepare(positions)
        else:
            self.source.prepare(positions, unseen)

    def _sample(self, position: int, seen: bool, bad: list[Bad]) -> tuple[Sample, Row | None, np.ndarray | None]:
        """The sample of a position, or a substitute that is a function of (seed, position) too; cached view, and crop.

        The picture of one that is not `seen` need not be read, and has no crop.
        """
        for attempt in range(1 + SUBSTITUTES):
            try:
                if not attempt:
                    sample = self.source.read_encoded(position) if seen else self.source.read_texts(position)
                else:
                    draw = random.Random(f"substitute {self.seed} {position} {attempt}").random()
                    sample = self.source.substitute(position, draw)
                row = None
                if self.latents is not None:
                    view = _draw(f"view {self.seed} {position}", self.latents.caching.views)
                    row = self.latents.read(self.source, sample, view)
                return sample, row, self._crop(sample, position, row) if seen else None
            except BadSample as error:
                bad.append((position, error.key, error.reason))
        raise OpenVisionError(
            f"position {position} and {SUBSTITUTES} substitutes can't be used; the last is {bad[-1][1]}: {bad[-1][2]}"
        )

    def _crop(self, sample: Sample, position: int, row: Row | None) -> np.ndarray:
        """A training crop, uint8 (R, R, 3), never flipped."""

        def boxes(width: int, height: int) -> tuple[Box]:
            if row is not None:
                return (row.box,)
            # one generator a position, so that neither the batch size nor a bad neighbour changes a crop
            rng = np.random.Generator(np.random.PCG64([zlib.crc32(b"crop"), self.seed, position]))
            return (random_box(width, height, self.crop_min_area, rng),)

        return sample.crops(self.resolution, boxes, self.fast_decode)[0]

    def _pixels(self, images: list[np.ndarray]) -> Tensor:
        """uint8 (n, 3, R, R), n may be 0."""
        if not images:
            return torch.zeros(0, 3, self.resolution, self.resolution, dtype=torch.uint8)
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()

    def _text(self, sample: Sample, rule: TextRule, role: int, position: int) -> str:
        """A sample's text by its rule. Two roles that take a sentence draw each their own."""
        if rule != "sentence":
            return sample.alt if rule == "alt" else sample.caption
        sentences = _SENTENCE_END.split(sample.caption)
        name = ("first sentence", "sentence", "caption sentence")[role]
        return sentences[_draw(f"{name} {self.seed} {position}", len(sentences))]

    def _ids(self, texts: list[str], length: int, contrastive: bool) -> Tensor:
        if not length or self.tokenizer is None:
            return torch.zeros(len(texts), 0, dtype=torch.long)
        encode = self.tokenizer.encode_contrastive if contrastive else self.tokenizer.encode_caption
        return encode(texts, length)
