"""Batches by position: the same whatever the workers, start and batch size; bad samples replaced and counted."""

import contextlib
import io
import logging
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openvision3.config import DataConfig, OpenVisionError
from openvision3.data import grammar
from openvision3.data.batches import Batch, BatchStream
from openvision3.data.samples import BadSample, Sample, Source
from openvision3.data.shards import DemoSource, TarSource
from openvision3.data.tokenizer import demo_tokenizer
from openvision3.data.transforms import crop, random_box
from openvision3.data.writing import write_shards

SIZE = 16


def stream(source: Any, start: int = 0, stop: int = 24, **options: Any) -> BatchStream:
    options = {"batch_size": 6, "contrastive_length": 32, "caption_length": 32, **options}
    return BatchStream(source, demo_tokenizer(), options.pop("resolution", SIZE), start=start, stop=stop, **options)


def rows(batches: Sequence[Batch]) -> dict[int, tuple[Any, ...]]:
    """Everything that each position holds."""
    found: dict[int, tuple[Any, ...]] = {}
    for b in batches:
        for i, position in enumerate(b.positions):
            tensors = (b.images[i], b.alt_ids[i], b.caption_text_ids[i], b.caption_ids[i])
            found[position] = (b.keys[i], b.captions[i], *(t.numpy().tobytes() for t in tensors))
    return found


def tar(path: Path, count: int, bad: dict[int, bytes | None]) -> Path:
    """A tar of `count` small pictures with several sentences; those in `bad` have that text (None: none)."""
    with tarfile.open(path, "w") as archive:
        for i in range(count):
            buffer = io.BytesIO()
            pixels = np.random.Generator(np.random.PCG64(i)).random((20, 24, 3)) * 255
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
            text = bad.get(i, f"One of {i}. Two of {i}. Three of {i}!".encode())
            for ending, content in (("png", buffer.getvalue()), ("txt", text)):
                if content is not None:
                    info = tarfile.TarInfo(f"s{i:04d}.{ending}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 samples, three of them bad: without caption, not UTF-8, 10,001 letters."""
    path = tmp_path_factory.mktemp("tars") / "a.tar"
    return tar(path, 400, {5: None, 150: b"\xff", 333: b"x" * 10_001})


def test_a_batch_holds_what_it_should() -> None:
    source, tokenizer = DemoSource(DataConfig(), "train", SIZE), demo_tokenizer()
    (batch,) = stream(source, 3, 5, contrastive_length=20, caption_length=24)
    samples = [source.read(3), source.read(4)]
    assert batch.positions == [3, 4] and batch.keys == [sample.key for sample in samples]
    assert batch.images.dtype == torch.uint8 and batch.images.is_contiguous()
    assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), np.stack([sample.image for sample in samples]))
    captions = [sample.caption for sample in samples]
    assert torch.equal(batch.alt_ids, tokenizer.encode_contrastive([sample.alt for sample in samples], 20))
    assert torch.equal(batch.caption_text_ids, tokenizer.encode_contrastive(captions, 20))
    assert torch.equal(batch.caption_ids, tokenizer.encode_caption(captions, 24))
    assert batch.captions == captions and batch.bad == []


def test_positions_do_not_depend_on_workers_start_or_batch_size(tmp_path: Path) -> None:
    """The heart of exact resume, on tars with bad samples, random crops and random sentences."""
    source = TarSource(tar(tmp_path / "a.tar", 100, {i: None for i in range(0, 100, 7)}), DataConfig(seed=3))

    def held(start: int, batch_size: int, num_workers: int, seed: int = 9) -> dict[int, tuple[Any, ...]]:
        options: dict[str, Any] = {"crop_min_area": 0.4, "max_bad_fraction": 1.0}
        return rows(
            list(stream(source, start, 120, batch_size=batch_size, num_workers=num_workers, seed=seed, **options))
        )

    whole = held(0, 6, 0)
    assert sorted(whole) == list(range(120))
    assert held(0, 6, 2) == whole
    assert held(0, 40, 1) == whole
    assert held(54, 6, 2) == {position: row for position, row in whole.items() if position >= 54}
    other = held(0, 6, 0, seed=10)
    assert not any(other[i] == whole[i] for i in whole)


def test_rendering_and_tars_train_alike(tmp_path: Path) -> None:
    """On the fly and from tars of the same seed and range: the same batches, crops included."""
    rendered = DemoSource(DataConfig(seed=2), "train", SIZE)
    write_shards((rendered.read(i) for i in range(24)), tmp_path / "out", samples_per_shard=7)
    tars = TarSource(tmp_path / "out", shuffle=False)
    for area in (1.0, 0.5):
        assert rows(list(stream(tars, crop_min_area=area))) == rows(list(stream(rendered, crop_min_area=area)))


def test_epochs_go_on_in_new_orders(mixed: Path) -> None:
    """A stream longer than the data goes on, each turn with every sample but the bad ones in its own place."""
    source = TarSource(mixed)
    keys = [key for batch in stream(source, 0, 800, batch_size=100) for key in batch.keys]
    first, second = keys[:400], keys[400:]
    assert first != second and len(set(first)) == len(set(second)) == 397


def test_last_batch_is_smaller() -> None:
    source = DemoSource(DataConfig(), "train", SIZE)
    batches = stream(source, 0, 8, batch_size=6)
    assert len(batches) == 2 and [batch.positions for batch in batches] == [[0, 1, 2, 3, 4, 5], [6, 7]]
    assert list(stream(source, 8, 8)) == []


def test_bad_samples_are_replaced_counted_and_logged(mixed: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = TarSource(mixed, DataConfig(caption_field=""), shuffle=False)
    batches = stream(source, 0, 400, batch_size=50, num_workers=2)
    with caplog.at_level(logging.WARNING):
        held = rows(list(batches))
    assert [(position, key) for position, key, _ in batches.bad] == [
        (5, "a.tar/s0005"),
        (150, "a.tar/s0150"),
        (333, "a.tar/s0333"),
    ]
    assert [reason for _, _, reason in batches.bad] == [
        "has no caption", "its txt is not UTF-8", "its txt has 10001 letters, more than 10000",
    ]  # fmt: skip
    assert [record.getMessage() for record in caplog.records] == [
        f"position {position}: sample {key} skipped: {reason}" for position, key, reason in batches.bad
    ]
    good = {f"s{i:04d}" for i in range(400)} - {"s0005", "s0150", "s0333"}
    assert {row[0] for row in held.values()} == good
    assert all(held[i][0] == f"s{i:04d}" for i in range(400) if i not in (5, 150, 333))


def test_texts_that_are_not_where_they_are_looked_for_are_said_once(
    mixed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        batches = list(stream(TarSource(mixed, shuffle=False), 10, 34))
        assert [batch.standing_in for batch in batches] == [6] * 4
        assert len(caplog.messages) == 1 and "6 of a batch's 6 samples lack the text" in caplog.messages[0]
        caplog.clear()
        assert not any(batch.standing_in for batch in stream(TarSource(mixed, shuffle=False), 10, 34,
                                                             contrastive_length=0, caption_length=0))  # fmt: skip
        list(stream(TarSource(mixed, DataConfig(caption_field=""), shuffle=False), 10, 34))
    assert not caplog.messages


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_bad_samples_stop_the_run(tmp_path: Path, num_workers: int) -> None:
    """3 of 200 are more than 1 %: the third one ends the run, with an error of one line."""
    source = TarSource(tar(tmp_path / "a.tar", 200, {3: b"", 60: b"\xff", 110: None}), shuffle=False)
    seen = []
    with pytest.raises(OpenVisionError) as caught:
        for batch in stream(source, 0, 200, batch_size=20, num_workers=num_workers):
            seen.append(batch.positions[0])
    assert seen == [0, 20, 40, 60, 80]
    message = str(caught.value)
    assert message.startswith(
        "3 of 120 samples can't be used, more than max_bad_fraction = 1.00% allows; the first is a.tar/s0003: "
    )
    assert "\n" not in message
    assert len(rows(list(stream(source, 0, 200, max_bad_fraction=0.05)))) == 200


def test_one_percent_is_not_too_much(tmp_path: Path) -> None:
    """Neither in one turn nor in many, nor where the bad ones come first."""
    source = TarSource(tar(tmp_path / "a.tar", 200, {0: b"", 1: b"\xff"}), shuffle=False)
    assert len(rows(list(stream(source, 0, 1000, batch_size=100)))) == 1000


def test_one_bad_sample_in_a_small_tar_is_not_too_much(tmp_path: Path) -> None:
    source = TarSource(tar(tmp_path / "a.tar", 20, {3: b""}))
    assert len(rows(list(stream(source, 0, 600, batch_size=20)))) == 600
    with pytest.raises(OpenVisionError, match="^2 of"):
        list(stream(TarSource(tar(tmp_path / "b.tar", 20, {3: b"", 4: b""})), 0, 600))


def test_large_data_stop_when_it_is_no_accident() -> None:
    """5 % of a million: stopped after some hundreds, long before a hundredth of all is found bad."""

    class Large(Source):
        size = 1_000_000

        def read(self, position: int) -> Sample:
            if position % 20 == 0:
                raise BadSample(str(position), "bad")
            return Sample(str(position), np.zeros((8, 8, 3), np.uint8), "a", "a")

    batches = stream(Large(), 0, 10_000, batch_size=20, resolution=8)
    with pytest.raises(OpenVisionError, match="can't be used"):
        list(batches)
    assert 100 < batches.seen < 800


@pytest.mark.parametrize("num_workers", [0, 1])
def test_data_without_a_good_sample_stop_at_once(tmp_path: Path, num_workers: int) -> None:
    source = TarSource(tar(tmp_path / "a.tar", 30, {i: None for i in range(30)}))
    with pytest.raises(OpenVisionError, match=r"^position 0 and 16 substitutes can't be used; .*has no caption$"):
        list(stream(source, num_workers=num_workers))


def test_sentences_are_drawn_from_the_caption(mixed: Path) -> None:
    """The contrastive text is one sentence, each of them some time; the caption target is the whole."""
    tokenizer, source = demo_tokenizer(), TarSource(mixed, shuffle=False)
    drawn = set()
    for batch in stream(source, 10, 110, contrastive_length=40, caption_length=60):
        for i, position in enumerate(batch.positions):
            sentence = tokenizer.decode(batch.caption_text_ids[i, :-1])
            word, rest = sentence.split(" ", 1)
            drawn.add(word)
            assert rest in (f"of {position}.", f"of {position}!")
            whole = f"one of {position}. two of {position}. three of {position}!"
            assert tokenizer.decode(batch.caption_ids[i]) == tokenizer.decode(batch.alt_ids[i, :-1]) == whole
    assert drawn == {"one", "two", "three"}


def test_crops_are_keyed_by_seed_and_position(mixed: Path) -> None:
    class Ramp(Source):
        size = None

        def read(self, position: int) -> Sample:
            image = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (64, 64, 3)).copy()
            return Sample("ramp", image, "a", "a")

    images = torch.cat([batch.images for batch in stream(Ramp(), crop_min_area=0.4)])
    assert len({image.numpy().tobytes() for image in images}) > 20
    whole = next(iter(stream(Ramp(), 0, 1))).images[0]
    image = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (64, 64, 3)).copy()
    rng = np.random.Generator(np.random.PCG64(0))
    assert np.array_equal(whole.permute(1, 2, 0).numpy(), crop(image, SIZE, random_box(64, 64, 1.0, rng)))


def test_streams_leave_the_global_generator_alone() -> None:
    """Else what a run draws after a resume would depend on how often it was resumed."""
    source = DemoSource(DataConfig(), "train", SIZE)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(stream(source, 0, 12, num_workers=1))
    list(stream(source, 0, 12))
    assert torch.equal(torch.rand(3), expected)


def test_a_stream_can_be_left_early_and_begun_again() -> None:
    source = DemoSource(DataConfig(), "train", SIZE)
    batches = stream(source, 0, 60, num_workers=2)
    first = next(iter(batches))
    again = next(iter(batches))
    assert rows([first]) == rows([again])


def test_models_without_text_towers_need_no_tokenizer() -> None:
    source = DemoSource(DataConfig(), "train", SIZE)
    (batch,) = BatchStream(source, None, SIZE, 4, 0, 4, contrastive_length=0, caption_length=0)
    assert batch.alt_ids.shape == batch.caption_text_ids.shape == batch.caption_ids.shape == (4, 0)
    with pytest.raises(ValueError, match="no tokenizer"):
        BatchStream(source, None, SIZE, 4, 0, 4, contrastive_length=8, caption_length=0)


def test_demo_batches_are_what_the_grammar_says() -> None:
    for batch in stream(DemoSource(DataConfig(), "train", SIZE), 0, 12):
        for i, caption in enumerate(batch.captions):
            assert demo_tokenizer().decode(batch.caption_ids[i]) == caption
            assert grammar.parse(caption).valid


def test_bad_sample_survives_the_way_from_a_worker() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(BadSample("k", "r")))
    assert (error.key, error.reason, str(error)) == ("k", "r", "k: r")


@pytest.mark.parametrize("world_size", [2, 3, 4, 12])
def test_the_ranks_shares_make_the_batch_of_one_process(mixed: Path, world_size: int) -> None:
    """Every rank has its contiguous share of each batch, bad samples and all, whatever the number of its workers."""
    source = TarSource(mixed, DataConfig(seed=2))
    options: dict[str, Any] = {"batch_size": 12, "crop_min_area": 0.5, "seed": 4, "max_bad_fraction": 0.1}
    alone = stream(source, 12, 420, **options)
    whole = list(alone)
    shares = [
        stream(source, 12, 420, rank=rank, world_size=world_size, num_workers=rank % 2, **options)
        for rank in range(world_size)
    ]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert [p for part in parts for p in part.positions] == batch.positions
        assert {len(part.positions) for part in parts} == {12 // world_size}
        assert rows([batch]) == rows(parts)
    assert sorted(bad for share in shares for bad in share.bad) == sorted(alone.bad) != []


def test_ranks_that_do_not_divide_the_batch_are_refused() -> None:
    source = DemoSource(DataConfig(), "train", SIZE)
    with pytest.raises(OpenVisionError, match="global batch of 6 samples.*4 processes"):
        stream(source, world_size=4)
    with pytest.raises(OpenVisionError, match="25 samples in all"):
        stream(source, 0, 25, world_size=2)
    for rank in (-1, 2):
        with pytest.raises(ValueError, match="rank"):
            stream(source, rank=rank, world_size=2)


def test_rules_for_texts(mixed: Path) -> None:
    """Each role takes the alt text, a sentence or the whole caption; two sentences are drawn apart."""

    class Texts(Source):
        def read(self, position: int) -> Sample:
            return Sample("k", np.zeros((SIZE, SIZE, 3), np.uint8), "red", "One cat. Two dogs. Three birds.")

    tokenizer = demo_tokenizer()

    def texts(*rules: Any) -> list[set[str]]:
        batches = list(stream(Texts(), 0, 60, texts=rules))
        columns = ("alt_ids", "caption_text_ids", "caption_ids")
        return [
            {tokenizer.decode(row[:-1] if name != "caption_ids" else row) for b in batches for row in getattr(b, name)}
            for name in columns
        ]

    whole = tokenizer.normalise("One cat. Two dogs. Three birds.")
    sentences = set(map(tokenizer.normalise, ("One cat.", "Two dogs.", "Three birds.")))
    assert texts("alt", "sentence", "caption") == [{"red"}, sentences, {whole}]
    assert texts("caption", "alt", "alt") == [{whole}, {"red"}, {"red"}]
    assert texts("sentence", "caption", "sentence") == [sentences, {whole}, sentences]
    (batch,) = stream(Texts(), 0, 60, batch_size=60, texts=("sentence", "sentence", "caption"))
    assert not torch.equal(batch.alt_ids, batch.caption_text_ids)


def test_a_substitute_does_not_depend_on_what_is_counted(tmp_path: Path) -> None:
    """Tars without an index, window by window: the same substitutes at the first pass, at the second start, and with
    all counted beforehand."""
    for i in range(6):
        tar(tmp_path / f"{i}.tar", 20, {3: None, 11: b"\xff"})
    config = DataConfig(shuffle_window=2, seed=1)

    def held(source: Any, start: int) -> dict[int, tuple[Any, ...]]:
        return rows(list(stream(source, start, 240, max_bad_fraction=1.0)))

    whole = held(TarSource(tmp_path, config), 0)
    cache = tmp_path / "cache"
    assert held(TarSource(tmp_path, config, cache=cache), 0) == whole
    assert held(TarSource(tmp_path, config, cache=cache), 90) == {p: row for p, row in whole.items() if p >= 90}
    assert held(TarSource(tmp_path, config, cache=tmp_path / "late"), 90) == {p: r for p, r in whole.items() if p >= 90}


_SIGNALS = """
import os, signal, sys, time
import numpy as np
from openvision3.config import OpenVisionError
from openvision3.data.batches import BatchStream
from openvision3.data.samples import Sample, Source

class Slow(Source):
    def read(self, position):
        if position >= 48:
            time.sleep(600)  # as a store that does not answer
        return Sample("k", np.zeros((8, 8, 3), np.uint8), "a", "a")

for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda *_: None)
for i, batch in enumerate(BatchStream(Slow(), None, 8, 8, 0, 800, contrastive_length=0, caption_length=0,
                                      num_workers=2)):
    if i == 0:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.killpg(0, number) if number != signal.SIGTERM else os.system(f"kill -TERM -{os.getpgrp()}")
        time.sleep(0.5)
    if i == 4:
        time.sleep(1)  # by now both workers wait
        raise OpenVisionError("this rank has had enough")
"""


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs sigwaitinfo")
def test_workers_outlive_the_groups_signals_but_not_the_run() -> None:
    """The group's signals leave them at work; a run that ends in an error does not wait for what they wait for."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SIGNALS], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, said = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 1 and said.strip().endswith("OpenVisionError: this rank has had enough"), said
