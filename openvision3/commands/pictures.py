"""Pictures from files and folders to batches: found, loaded by a thread ahead of the model, grouped by size."""

import contextlib
import functools
import os
import queue
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from openvision3.config import OpenVisionError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

REFERENCE_SIDE = 256  # pixels; `batch_size` pictures of this size make a batch, larger ones make smaller batches


@dataclass(frozen=True)
class Picture:
    """A picture to read, and the file that its result goes to (None: nowhere)."""

    path: Path
    output: Path | None = None
    key: str = ""  # its path inside the folder that was given, with slashes; of a file that was given, the name
    size: tuple[int, int] = (0, 0)  # height and width in its tensor, before padding; known once it is read


@dataclass
class Found:
    """What `find_pictures` saw."""

    pictures: list[Picture] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)  # lines to print
    failed: int = 0  # pictures that those lines are about
    earlier_outputs: int = 0  # of the same command, in folders: not inputs
    other_files: int = 0  # in folders: not pictures, by their names

    def fail(self, line: str) -> None:
        """Records one failure."""
        self.failures.append(line)
        self.failed += 1


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
            for inside, _ in walk(given, lambda _, line: found.fail(line)):
                if suffix and not bare and inside.endswith(suffix):
                    found.earlier_outputs += 1
                elif not has_picture_extension(inside):
                    found.other_files += 1
                else:
                    entries.setdefault(given / inside, Path(inside))
        else:
            entries.setdefault(given, Path(given.name))
    if not suffix:
        found.pictures = [Picture(path, key=inside.as_posix()) for path, inside in entries.items()]
        return found
    places = {path: (out / inside if out else path) for path, inside in entries.items()}
    stems = Counter(place.with_suffix("") for place in places.values())
    taken: dict[Path, Path] = {}
    for path, place in places.items():
        name = place.name if stems[place.with_suffix("")] > 1 else place.stem
        output = place.with_name(name + suffix)
        if output in taken or output in places:
            owner = f"the output of {taken[output]}" if output in taken else "one of the inputs"
            found.fail(f"{path}: {output} is already {owner}")
        else:
            taken[output] = path
            found.pictures.append(Picture(path, output, entries[path].as_posix()))
    return found


def walk(folder: Path, on_failure: Callable[[str, str], None]) -> list[tuple[str, os.DirEntry[str]]]:
    """All files below a folder, sorted: (path inside it, with slashes; entry). Nothing hidden, no linked folders.

    What can't be read goes to `on_failure(path inside, line)`: of a folder the path ends in a slash, of `folder` itself
    it is empty.
    """
    found: list[tuple[str, os.DirEntry[str]]] = []
    waiting = [("", os.fspath(folder))]
    while waiting:
        inside, path = waiting.pop()
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    try:
                        if entry.is_dir(follow_symlinks=False):
                            waiting.append((f"{inside}{entry.name}/", entry.path))
                        elif entry.is_file():
                            found.append((inside + entry.name, entry))
                    except OSError as error:  # such as a link to itself
                        on_failure(inside + entry.name, f"{entry.path}: can't be read ({error.strerror or error})")
        except OSError as error:
            on_failure(inside, f"{path}: the folder can't be read ({error.strerror or error})")
    return sorted(found, key=lambda pair: pair[0].split("/"))


def has_picture_extension(name: str) -> bool:
    """Whether a file is taken for a picture where it was not named, but lies in a folder."""
    return os.path.splitext(name)[1].lower() in _extensions()


@functools.cache
def _extensions() -> frozenset[str]:
    from PIL import Image

    return frozenset(extension for extension, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def is_picture_name(name: str) -> bool:
    """Whether a file name's extension is that of a picture that can be written, such as .png, .jpg or .webp."""
    from PIL import Image

    return Image.registered_extensions().get(Path("x" + name).suffix.lower()) in Image.SAVE


def prepare(
    path: Path, size: int | None, max_side: int, multiple: int = 16, read: "Callable[[Path], Image] | None" = None
) -> "tuple[Tensor, tuple[int, int]]":
    """Loads one picture: (3, H, W) in [-1, 1] as `preprocess` gives it, and the height and width that are not padding.

    `read` takes the place of `load_image`. Raises `OpenVisionError` that names the file.
    """
    from openvision3.data.transforms import kept_size, load_image, preprocess

    image = (read or load_image)(path)
    width, height = (size, size) if size else kept_size(image.size, max_side)
    return preprocess(image, size, max_side, multiple), (height, width)


def batches(
    pictures: Sequence[Picture],
    prepare_one: "Callable[[Path], tuple[Tensor, tuple[int, int]]]",
    batch_size: int,
    on_failure: Callable[[Picture, str], None],
    workers: int = 1,
) -> "Iterator[tuple[list[Picture], Tensor]]":
    """Yields (pictures, images (B, 3, H, W) in [-1, 1]): each batch of one size, in order where all have the same size.

    `workers` threads prepare pictures ahead of the caller. Memory is bounded whatever the sizes: a batch holds at most
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
            for group in _grouped(pictures, prepare_one, batch_size, lambda p, line: put("failure", p, line), workers):
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
    prepare_one: "Callable[[Path], tuple[Tensor, tuple[int, int]]]",
    batch_size: int,
    on_failure: Callable[[Picture, str], None],
    workers: int,
) -> "Iterator[list[tuple[Picture, Tensor]]]":
    """Groups pictures of one size into batches, and gives the largest group when too much waits."""
    area = batch_size * REFERENCE_SIDE**2
    waiting: dict[tuple[int, ...], list[tuple[Picture, Tensor]]] = defaultdict(list)
    waiting_area = 0
    for picture, prepared in _ahead(pictures, prepare_one, workers):
        try:
            image, size = prepared.result()
        except OpenVisionError as error:
            on_failure(picture, str(error))
            continue
        except Exception as error:  # one picture that a decoder chokes on must not stop the others
            on_failure(picture, f"{picture.path}: {type(error).__name__}: {error}")
            continue
        shape, pixels = tuple(image.shape), image.shape[1] * image.shape[2]
        waiting[shape].append((replace(picture, size=size), image))
        waiting_area += pixels
        if len(waiting[shape]) >= full_batch(batch_size, pixels):
            due = shape
        elif waiting_area > 4 * area:
            due = max(waiting, key=lambda key: len(waiting[key]) * key[1] * key[2])
        else:
            continue
        group = waiting.pop(due)
        waiting_area -= len(group) * due[1] * due[2]
        yield group
    yield from waiting.values()


def full_batch(batch_size: int, pixels: int) -> int:
    """How many pictures of that many pixels make a batch, where `batch_size` of 256 x 256 do; no more than these."""
    return min(batch_size, max(1, batch_size * REFERENCE_SIDE**2 // pixels))


def _ahead(
    pictures: Sequence[Picture], prepare_one: "Callable[[Path], tuple[Tensor, tuple[int, int]]]", workers: int
) -> "Iterator[tuple[Picture, Future[tuple[Tensor, tuple[int, int]]]]]":
    """Pictures in order, each being prepared by a thread; two a thread are begun before the first is taken."""
    waiting: deque[tuple[Picture, Future[tuple[Tensor, tuple[int, int]]]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="pictures")
    try:
        for picture in pictures:
            waiting.append((picture, pool.submit(prepare_one, picture.path)))
            if len(waiting) > 2 * workers:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
