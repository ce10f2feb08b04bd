"""Writing files whole or not at all."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` and renames it to `path` when the block ends without an error.

    The temporary name begins with a dot, is this call's own (processes of several hosts may share a folder and an id),
    and keeps the suffix: writers choose the format by it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem[:200]}.{os.getpid()}-{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: "dict[str, Tensor]", metadata: dict[str, str]) -> None:
    """Writes a safetensors file as any other: `OSError` where it can't be written, permissions by the umask.

    safetensors' own `save_file` raises an error of its own then, writes for the owner alone, and leaves a temporary
    file of a random name where it is killed.
    """
    from safetensors.torch import save

    path.write_bytes(save(tensors, metadata))
