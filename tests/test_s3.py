"""Training data from an S3 endpoint over HTTP (moto's server on loopback) that spoils one answer in fifty."""

import io
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flaky_proxy import FlakyProxy
from PIL import Image
from small_tars import write_tar
from tiny_run import make_vae, tiny_config

from openvision3.config import DataConfig, VAEConfig
from openvision3.data import shards
from openvision3.data.batches import Batch, BatchStream
from openvision3.data.shards import TarSource
from openvision3.data.tokenizer import demo_tokenizer
from openvision3.training.loop import train
from openvision3.training.monitor import read_records

pytest.importorskip("moto.server", reason="needs moto[server]")
pytest.importorskip("s3fs")
SAMPLES, TARS = 60, 8
TIMEOUT = 2.0  # seconds; the proxy delays by twice that


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight tars of 60 samples of noise, without an index; every thirtieth sample has a broken picture."""
    folder = tmp_path_factory.mktemp("tars")
    for i in range(TARS):
        members: dict[str, bytes] = {}
        for j in range(SAMPLES):
            buffer = io.BytesIO()
            pixels = np.random.Generator(np.random.PCG64([i, j])).random((24, 20, 3)) * 255
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
            members[f"{i}-{j:03d}.png"] = b"junk" if j % 30 == 7 else buffer.getvalue()
            members[f"{i}-{j:03d}.txt"] = f"a picture of {i} {j}".encode()
            members[f"{i}-{j:03d}.json"] = f'{{"caption": "One is {i}. Two is {j}."}}'.encode()
        write_tar(folder / f"{i:03d}.tar", members)
    return folder


@pytest.fixture
def proxy(tars: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyProxy]:
    """The endpoint that s3:// means; the bucket `data` holds the tars."""
    import boto3
    import fsspec.config
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    monkeypatch.setattr(shards, "JOIN_GAP", 1024)  # these tars are so small that a read would join all of a batch
    server.start()
    _, port = server.get_host_and_port()
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", **keys)
    client.create_bucket(Bucket="data")
    for tar in tars.iterdir():
        client.upload_file(str(tar), "data", f"train/{tar.name}")
    with FlakyProxy(port, delay=2 * TIMEOUT) as proxy:
        options = {"endpoint_url": f"http://127.0.0.1:{proxy.port}", "key": "test", "secret": "test"}
        # other options than the test before: else its connections would be taken for these
        monkeypatch.setitem(fsspec.config.conf, "s3", {**options, "client_kwargs": {"region_name": "us-east-1"}})
        yield proxy
    server.stop()


def rows(source: Any, start: int, stop: int, **options: Any) -> list[Any]:
    """Everything that training sees."""
    options = {"crop_min_area": 0.5, "max_bad_fraction": 0.2, "seed": 3, **options}
    stream = BatchStream(
        source, demo_tokenizer(), 16, 24, start, stop, contrastive_length=16, caption_length=16, **options
    )
    tensors = ("images", "alt_ids", "caption_text_ids", "caption_ids")
    return [
        (b.positions, b.keys, b.captions, b.bad, *(getattr(b, name).numpy().tobytes() for name in tensors))
        for b in stream
    ]


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_flaky_s3_endpoint_trains_like_the_disk(
    tars: Path, proxy: FlakyProxy, tmp_path: Path, num_workers: int
) -> None:
    """The same ids, pictures and texts, unusable samples included, over two turns without any index; and no hang."""
    config = DataConfig(shuffle_window=3, shuffle_block=2, seed=5, store_timeout=TIMEOUT)
    stop = 2 * TARS * SAMPLES
    expected = rows(TarSource(tars, config, cache=tmp_path / "disk"), 0, stop)
    begin = time.monotonic()
    source = TarSource(f"s3://data/train/{{000..{TARS - 1:03d}}}.tar", config, cache=tmp_path / "s3")
    assert rows(source, 0, stop, num_workers=num_workers) == expected
    assert time.monotonic() - begin < 300
    assert sum(proxy.spoilt.values()) >= proxy.answers // 50 > 5 and min(proxy.spoilt.values()) > 0
    resumed = TarSource("s3://data/train", config, cache=tmp_path / "s3")
    assert rows(resumed, stop - 48, stop, num_workers=num_workers) == expected[-2:]


def trained(folder: Path, source: str, vae: VAEConfig, num_workers: int) -> tuple[list[Any], list[Any], list[bytes]]:
    """What a training sees (position, sample), what it records of each step, and the weights that it ends with."""
    seen: list[Any] = []
    count = BatchStream._count

    def recorded(stream: BatchStream, batch: Batch) -> None:
        seen.extend(zip(batch.positions, batch.keys, strict=True))
        count(stream, batch)

    data = DataConfig(
        source, shuffle_window=3, shuffle_block=2, seed=5, crop_min_area=0.5, max_bad_fraction=0.2,
        store_timeout=TIMEOUT, num_workers=num_workers,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchStream, "_count", recorded)
        train(tiny_config(folder, vae, steps=60, data=data, meter_samples=0), "cpu")
    rows = [
        {name: value for name, value in row.items() if name not in ("samples_per_second", "data_wait")}
        for row in read_records(folder / "metrics.jsonl")
    ]
    return seen, rows, [path.read_bytes() for path in sorted((folder / "model").rglob("*.safetensors"))]


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_training_from_a_flaky_s3_endpoint_is_that_from_disk(
    tars: Path, proxy: FlakyProxy, tmp_path: Path, num_workers: int
) -> None:
    """The same sample ids, losses and weights, to the last bit; unusable samples included, and no hang."""
    vae = make_vae(tmp_path / "vae")
    seen, rows, weights = trained(tmp_path / "disk", str(tars), vae, 0)
    losses = {row["total"] for row in rows if "total" in row}
    assert len(seen) == 240 + 2 * 8 and len(losses) == 60 and rows[-1]["bad_samples"] > 0 and weights  # with pictures
    begin = time.monotonic()
    assert trained(tmp_path / "s3", "s3://data/train", vae, num_workers) == (seen, rows, weights)
    assert time.monotonic() - begin < 300
    assert sum(proxy.spoilt.values()) >= proxy.answers // 50 and min(proxy.spoilt.values()) > 0
