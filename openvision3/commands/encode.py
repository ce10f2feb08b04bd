"""`ov3 encode`: pictures to tokens, a file beside each, or one folder of shards for many."""

import math
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from openvision3.commands import common
from openvision3.commands.batching import BatchOptions, OutputOptions, Runner, check_options, find, square
from openvision3.commands.common import ModelOptions
from openvision3.commands.inference import Batching, Images, Model, Output, token_grid
from openvision3.commands.pictures import Picture, full_batch
from openvision3.config import OpenVisionError
from openvision3.files import save_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from openvision3.data.token_shards import Encoding
    from openvision3.model.openvision3 import OpenVision3

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]

SHARD_SECONDS = 300.0  # a kill costs at most this much encoding


def encode(
    images: Images,
    model: Model = ModelOptions(),
    batching: Batching = BatchOptions(),
    output: Output = OutputOptions(),
    out: Path | None = None,
    suffix: str = ".tokens.safetensors",
    native_size: Flag = False,
    save_dtype: Literal["fp32", "bf16"] = "fp32",
    shard_mb: float = 256.0,
    compile: Flag = False,
) -> int:
    """Writes each picture's tokens (N, D) and pooled embedding (E) as safetensors: beside it, or with --out in shards.

    A folder of shards (--out) takes any number of pictures. The command may be stopped at any moment, and the same
    command goes on: what is in the folder is not encoded again. A picture is known by its path inside its folder; one
    whose file has another length by now is reported and left alone. Under torchrun the processes share the work.

    Args:
        images: pictures, and folders of pictures.
        out: folder of shards, with an index from each picture's path inside its folder to shard and row.
        suffix: without --out: takes the place of each input's extension.
        native_size: keep each picture's own size and shape (see --max-side), instead of the model's square.
        save_dtype: of the tokens on disk; embeddings are fp32.
        shard_mb: largest shard, in millions of bytes.
        compile: compile the encoder by torch.compile, on CUDA with CUDA graphs; the first batch takes a minute.
    """
    if compile and native_size:
        raise OpenVisionError("--compile is for pictures of one size: leave out --native-size")
    if native_size and batching.size is not None:
        raise OpenVisionError("--native-size keeps each picture's size: leave out --size")
    if not native_size and batching.max_side != BatchOptions.max_side:
        raise OpenVisionError("--max-side is for pictures that keep their size: pass --native-size too")
    if out is not None:
        return encode_to_shards(images, out, model, batching, output, native_size, save_dtype, shard_mb, compile)
    from openvision3.evaluation.retrieval import check_finite

    found = find(images, output, suffix)
    loaded = common.load_model(model)
    batching = batching if native_size else square(loaded, batching)
    run = encoder_for(loaded, batching, compile)
    figures: list[dict[str, Any]] = []

    def save(picture: Picture, tokens: "Tensor", embedding: "Tensor", grid: tuple[int, int]) -> None:
        assert picture.output is not None
        metadata = {"grid": "{}x{}".format(*grid), "size": "{}x{}".format(*picture.size), "model": model.model}
        with common.whole_file(picture.output, output.overwrite) as temporary:
            save_tensors(temporary, {"tokens": tokens.contiguous(), "embedding": embedding.contiguous()}, metadata)
        figures.append({"input": str(picture.path), "output": str(picture.output), "grid": grid})

    def work(pictures: list[Picture], pixels: "Tensor") -> list[Callable[[], None]]:
        import torch

        tokens = run(pixels)
        embeddings = check_finite(loaded.pool(tokens).float().cpu(), "image")
        tokens = tokens.to("cpu", torch.bfloat16 if save_dtype == "bf16" else torch.float32)
        grid = token_grid(loaded, pixels)
        return [partial(save, picture, tokens[i], embeddings[i], grid) for i, picture in enumerate(pictures)]

    outcome = Runner(found, loaded, batching).run(work)
    return outcome.finish(output, {"model": model.model, "pictures": figures})


def encode_to_shards(
    images: tuple[Path, ...],
    out: Path,
    model: ModelOptions,
    batching: BatchOptions,
    output: OutputOptions,
    native_size: bool,
    save_dtype: Literal["fp32", "bf16"],
    shard_mb: float,
    compile: bool,
) -> int:
    """Encodes the pictures that are not in the folder `out` yet, this process's share of them; returns the exit code.

    Raises `RunInterrupted` after SIGINT or SIGTERM, with all that was encoded saved.
    """
    if not 0 < shard_mb < math.inf:
        raise OpenVisionError(f"--shard-mb {shard_mb}: expected a finite size above 0")
    rank, world = share_of_work()
    if world > 1 and output.json is not None:
        raise OpenVisionError("--json: each process would write it; leave it out under torchrun")
    found = find(images, output)
    _check_keys(found.pictures)
    pictures = len(found.pictures)
    loaded = common.load_model(on_own_device(model, world))
    batching = batching if native_size else square(loaded, batching)
    check_options(loaded, batching)
    run = encoder_for(loaded, batching, compile)

    from openvision3.data.token_shards import ShardWriter, open_for_writing, read_index, write_index
    from openvision3.evaluation.retrieval import check_finite
    from openvision3.training.run_folder import RunInterrupted, StopRequest

    encoding = _describe(loaded, batching, save_dtype)
    with open_for_writing(out, encoding, rank, world), StopRequest() as stop:
        share = [picture for picture in found.pictures if zlib.crc32(os.fsencode(picture.key)) % world == rank]
        done = read_index(out)
        found.pictures = [picture for picture in share if picture.key not in done]
        already = len(share) - len(found.pictures)
        for picture in share:
            if picture.key in done and (now := _file_bytes(picture.path)) != (then := done[picture.key].file_bytes):
                found.fail(
                    f"{picture.path}: has {now} bytes, and what is in {out} as {picture.key!r} had {then}: another "
                    "picture, or a changed one; choose another --out"
                )
        if world > 1:
            print(f"process {rank} of {world}: {len(share)} of {pictures} pictures are its share", file=sys.stderr)
        if already:
            print(f"{already} of {len(share)} pictures are in {out} already: not encoded again", file=sys.stderr)
        writer = ShardWriter(out, encoding, rank, int(shard_mb * 1e6), SHARD_SECONDS)

        def work(pictures: list[Picture], pixels: "Tensor") -> list[Callable[[], None]]:
            if stop:
                where = f"stopped; what was encoded is in {out}, and the same command goes on from there"
                raise RunInterrupted(where, stop.signal_number)
            tokens = run(pixels)
            sizes = [picture.size for picture in pictures]
            keys = [picture.key for picture in pictures]
            embeddings = check_finite(loaded.pool(tokens).float().cpu(), "image")
            lengths = [_file_bytes(picture.path) for picture in pictures]
            writer.add(keys, tokens, embeddings, token_grid(loaded, pixels), sizes, lengths)
            return []

        try:
            outcome = Runner(found, loaded, batching).run(work)
        finally:
            writer.flush()
        write_index(out)
    wait_for_all(world)
    return outcome.finish(output, {"model": model.model, "out": str(out), "already": already})


def encoder_for(model: "OpenVision3", batching: BatchOptions, compile: bool) -> "Callable[[Tensor], Tensor]":
    """`model.encode`, or compiled: then a batch that is not full is filled up, for each shape is compiled anew."""
    if not compile:
        return model.encode
    import torch

    from openvision3.model.compiled import compile_encoder

    compile_encoder(model)
    assert batching.size is not None
    full = full_batch(batching.batch_size, batching.size**2)

    def encode(images: "Tensor") -> "Tensor":
        count = images.shape[0]
        filler = images[-1:].expand(full - count, -1, -1, -1)
        return model.encode(torch.cat([images, filler]))[:count].clone()  # of a CUDA graph the next run overwrites it

    return encode


def share_of_work() -> tuple[int, int]:
    """This process's rank and the number of processes, as torchrun sets RANK and WORLD_SIZE; (0, 1) without it."""
    values = [os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")]
    if not all(value.isdecimal() for value in values) or not int(values[0]) < int(values[1]):
        raise OpenVisionError(
            f"RANK {values[0]!r} and WORLD_SIZE {values[1]!r} are no share of work: torchrun sets both"
        )
    return int(values[0]), int(values[1])


def wait_for_all(world: int) -> None:
    """Returns when all of torchrun's processes are here: it kills the others when one ends with a failure."""
    if world == 1 or "MASTER_ADDR" not in os.environ:
        return
    from datetime import timedelta

    from torch import distributed

    distributed.init_process_group("gloo", timeout=timedelta(days=30))
    distributed.barrier()
    distributed.destroy_process_group()


def on_own_device(model: ModelOptions, world: int) -> ModelOptions:
    """The same options, and of several processes each on the CUDA device of its LOCAL_RANK where there are any."""
    import torch

    devices = torch.cuda.device_count()
    if world == 1 or model.device not in ("auto", "cuda") or not devices:
        return model
    return replace(model, device=f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % devices}")


def _file_bytes(path: Path) -> int:
    """The file's length; -1 of one that is gone."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _check_keys(pictures: list[Picture]) -> None:
    if twice := [key for key, count in Counter(picture.key for picture in pictures).items() if count > 1]:
        paths = [str(picture.path) for picture in pictures if picture.key == twice[0]]
        raise OpenVisionError(
            f"{paths[0]} and {paths[1]} would share the key {twice[0]!r}: give the folder that holds both, or two --out"
        )


def _describe(model: "OpenVision3", batching: BatchOptions, save_dtype: Literal["fp32", "bf16"]) -> "Encoding":
    from openvision3.data.token_shards import Encoding
    from openvision3.model.fingerprint import image_fingerprint

    return Encoding(
        fingerprint=image_fingerprint(model),
        width=model.config.encoder.width,
        embed_dim=model.config.embed_dim,
        pixels_per_token=model.config.downsampling,
        size=batching.size,
        max_side=None if batching.size else batching.max_side,
        dtype=save_dtype,
    )
