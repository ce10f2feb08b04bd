"""Pictures from files and folders to batches: found, loaded by a thread ahead of the model, grouped by size."""

import contextlib
import queue
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from openvision3.config import OpenVisionError

if TYPE_CHECKING:
    from torch import Tensor

REFERENCE_SIDE = 256  # pixels; `batch_size` pictures of this size make a batch, larger ones make smaller batches


@dataclass(frozen=True)
class Picture:
    """A picture to read, and the file that its result goes to (None: nowhere)."""

    path: Path
    output: Path | None = None


@dataclass
class Found:
    """What `find_pictures` saw."""

    pictures: list[Picture] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)  # lines to print
    failed: int = 0  # pictures that those lines are about
    earlier_outputs: int = 0  # of the same command, in folders: not inputs
    other_files: int = 0  # in folders: not pictures, by their names


def find_pictures(inputs: Sequence[Path], suffix: str = "", out: Path | None = None) -> Found:
    """Lists files as given, and folders' pictures (with subfolders, by extension, sorted), each once.

    With a `suffix` such as `.reconstructed.png` a picture's output is its name with that in place of the extension,
    beside it or under `out` (where a folder's pictures keep their subfolders). Two pictures that differ in nothing but
    the extension keep it: `a.jpg.reconstructed.png`. Files in folders whose names end in `suffix` are left out.
    Raises `OpenVisionError` where `inputs` is empty.
    """
    if not inputs:
        raise OpenVisionError("name at least one picture or folder of pictures")
    if "/" in suffix or "\\" in suffix:
        raise OpenVisionError(f"--suffix {suffix!r} must not hold a folder; see --out")
    bare = Path("x" + suffix).stem == "x"  # no more than an extension
    if suffix and bare and out is None:
        raise OpenVisionError(f"--suffix {suffix!r} would name the inputs themselves; give a longer one, or --out")
    found = Found()
    entries: dict[Path, Path] = {}  # file -> its path under `out`
    for given in inputs:
        if given.is_dir():
            for path in sorted(p for p in given.rglob("*") if p.is_file() and not _hidden(p.relative_to(given))):
                if suffix and not bare and path.name.endswith(suffix):
                    found.earlier_outputs += 1
                elif path.suffix.lower() not in _extensions():
                    found.other_files += 1
                else:
                    entries.setdefault(path, path.relative_to(given))
        else:
            entries.setdefault(given, Path(given.name))
    if not suffix:
        found.pictures = [Picture(path) for path in entries]
        return found
    places = {path: (out / inside if out else path) for path, inside in entries.items()}
    stems = Counter(place.with_suffix("") for place in places.values())
    taken: dict[Path, Path] = {}
    for path, place in places.items():
        name = place.name if stems[place.with_suffix("")] > 1 else place.stem
        output = place.with_name(name + suffix)
        if output in taken or output in places:
            owner = f"the output of {taken[output]}" if output in taken else "one of the inputs"
            found.failures.append(f"{path}: {output} is already {owner}")
            found.failed += 1
        else:
            taken[output] = path
            found.pictures.append(Picture(path, output))
    return found


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _extensions() -> set[str]:
    from PIL import Image

    return {extension for extension, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def prepare(path: Path, size: int | None, max_side: int) -> "Tensor":
    """Loads one picture as (3, H, W) in [-1, 1], H and W multiples of 16.

    With `size` it is resized and cropped to that square; without, it keeps its size (cropped to multiples of 16), but
    a longest side above `max_side` is first reduced to that. Raises `OpenVisionError` that names the file.
    """
    from PIL import Image

    from openvision3.data.transforms import load_image, preprocess

    image = load_image(path)
    if size is None:
        if max(image.size) > max_side:
            image.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
        # preprocess scales a short side up to 16, and the long one with it
        if max(image.size) * 16 > max_side * min(image.size):
            raise OpenVisionError(f"{path}: too narrow to keep its shape within {max_side} pixels; give a --size")
    return preprocess(image, size)


def batches(
    pictures: Sequence[Picture],
    prepare_one: "Callable[[Path], Tensor]",
    batch_size: int,
    on_failure: Callable[[Picture, str], None],
) -> "Iterator[tuple[list[Picture], Tensor]]":
    """Yields (pictures, images (B, 3, H, W) in [-1, 1]): each batch of one size, in order where all have the same size.

    A thread prepares pictures ahead of the caller. Memory is bounded whatever the sizes: a batch holds at most
    `batch_size` pictures of 256 x 256 pixels or their area in larger ones (at least one picture), and a few wait.
    A picture that can't be read goes to `on_failure(picture, line)`, called from the caller's thread.
    """
    import torch

    ready: queue.Queue[tuple[str, object, object]] = queue.Queue(maxsize=2)
    stopped = threading.Event()

    def put(kind: str, what: object = None, more: object = None) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                return ready.put((kind, what, more), timeout=0.1)

    def work() -> None:
        try:
            for group in _grouped(pictures, prepare_one, batch_size, lambda p, line: put("failure", p, line)):
                if stopped.is_set():
                    return
                put("batch", [picture for picture, _ in group], torch.stack([image for _, image in group]))
            put("end")
        except BaseException as error:  # the caller's thread raises it
            put("error", error)

    thread = threading.Thread(target=work, name="pictures", daemon=True)
    thread.start()
    try:
        while True:
            kind, what, more = ready.get()
            if kind == "end":
                return
            if kind == "error":
                assert isinstance(what, BaseException)
                raise what
            if kind == "failure":
                assert isinstance(what, Picture) and isinstance(more, str)
                on_failure(what, more)
            else:
                yield what, more  # type: ignore[misc]
    finally:
        stopped.set()
        thread.join(timeout=5)


def _grouped(
    pictures: Sequence[Picture],
    prepare_one: "Callable[[Path], Tensor]",
    batch_size: int,
    on_failure: Callable[[Picture, str], None],
) -> "Iterator[list[tuple[Picture, Tensor]]]":
    """Groups pictures of one size into batches, and gives the largest group when too much waits."""
    area = batch_size * REFERENCE_SIDE**2
    waiting: dict[tuple[int, ...], list[tuple[Picture, Tensor]]] = defaultdict(list)
    waiting_area = 0
    for picture in pictures:
        try:
            image = prepare_one(picture.path)
        except OpenVisionError as error:
            on_failure(picture, str(error))
            continue
        except Exception as error:  # one picture that a decoder chokes on must not stop the others
            on_failure(picture, f"{picture.path}: {type(error).__name__}: {error}")
            continue
        shape, pixels = tuple(image.shape), image.shape[1] * image.shape[2]
        waiting[shape].append((picture, image))
        waiting_area += pixels
        if len(waiting[shape]) >= min(batch_size, max(1, area // pixels)):
            due = shape
        elif waiting_area > 4 * area:
            due = max(waiting, key=lambda key: len(waiting[key]) * key[1] * key[2])
        else:
            continue
        group = waiting.pop(due)
        waiting_area -= len(group) * due[1] * due[2]
        yield group
    yield from waiting.values()
