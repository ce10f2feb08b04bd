"""Files of local disks and of object stores behind one interface: ranges of bytes, with retries and a bound on waiting.

A location is a `Path`, or the URL of anything that fsspec knows (`s3://`, `gs://`, `hf://`, `https://`, `memory://`).
fsspec is imported at the first URL, never for local files. `pipe:` locations run commands, so they are refused.
"""

import asyncio
import glob
import itertools
import logging
import os
import random
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from openvision3.config import OpenVisionError

log = logging.getLogger(__name__)

MAX_BRACES = 2_000_000  # locations that one brace list may stand for
OPEN_FILES = 64  # local files that a thread keeps open
PARALLEL = 16  # reads of a store that a process has under way
BLOCK = 8 * 2**20  # bytes that one read of a store asks for where a file is gone through from front to back
LOCAL_BLOCK = 4096  # the same of a local file: a header, and those of the small members after it
FIRST_WAIT, LONGEST_WAIT = 0.1, 20.0  # seconds between attempts: doubled each time, up to the longest
_FINAL = (IsADirectoryError, NotADirectoryError, PermissionError, NotImplementedError, ImportError)
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "abfs": "adlfs"}

# Every file system that was opened. In a forked child those of the parent would else be cleaned up, and closing
# connections that are not the child's ends in errors on its stderr.
_opened: list[Any] = []

Location = Path | str  # a local file, or a URL
T = TypeVar("T")


class StoreError(OpenVisionError):
    """A file that can't be had: missing, forbidden, or not answered after all attempts."""


def locate(text: str | Path) -> Location:
    """A path or URL as a location; raises `OpenVisionError` for `pipe:`, and for URLs chained with `::`."""
    if isinstance(text, Path):
        return text
    if text.startswith("pipe:"):
        raise OpenVisionError(
            f"{text}: pipe: sources run commands, so they are refused; give the store's own address (s3://, gs://, "
            "hf://, https://)"
        )
    if text.startswith("file://"):
        return Path(text[len("file://") :])
    if "://" in text and "::" in text:
        raise OpenVisionError(f"{text}: chained URLs (::) are not read; give the address of the tars themselves")
    return text if "://" in text else Path(text)


def name_of(location: Location) -> str:
    """The file's own name: "000000.tar"."""
    return location.name if isinstance(location, Path) else location.split("?")[0].rpartition("/")[2]


def sibling(location: Location, name: str) -> Location:
    """The location of `name` in the same folder."""
    if isinstance(location, Path):
        return location.parent / name
    return location.split("?")[0].rpartition("/")[0] + "/" + name


class Store:
    """Reads files wherever they are. It can be used from several threads, carried to other processes and forked.

    An attempt may take `timeout` seconds; after a dropped, late or short answer there is another one, `attempts` in
    all, with growing pauses between them. What a method can't do in the end raises `StoreError`, in one line.
    """

    def __init__(self, attempts: int = 8, timeout: float = 60.0):
        if attempts < 1 or timeout <= 0:
            raise OpenVisionError(f"store_attempts is {attempts} and store_timeout {timeout}: expected at least 1, > 0")
        self.attempts, self.timeout = attempts, timeout
        self.retried = 0  # attempts that failed and were repeated
        self._forget()

    def _forget(self) -> None:
        self._local = threading.local()
        self._lock = threading.Lock()
        self._systems: dict[str, Any] = {}
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._waiting: SimpleQueue[tuple[Future[bytes], Location, int, int]] = SimpleQueue()
        self._threads = 0
        self._jitter = random.Random(os.getpid())
        self._pid = os.getpid()  # last: from here on other threads take the rest for this process's own

    def __getstate__(self) -> dict[str, Any]:
        return {"attempts": self.attempts, "timeout": self.timeout}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def _here(self) -> None:
        """Connections and threads do not survive a fork: begin anew in the child."""
        if self._pid != os.getpid():
            self._forget()

    def size(self, location: Location) -> int:
        """Bytes of a file."""
        self._here()
        if isinstance(location, Path):
            return self.local_call(location, lambda: os.stat(location).st_size)
        if location not in self._sizes:
            info = self._retry(location, lambda: self._bounded(location, "info"))
            size = info.get("size")
            if not isinstance(size, int):
                raise StoreError(f"{location}: the store does not say how many bytes it has, so no part can be read")
            self._sizes[location] = size
            if len(self._sizes) > 100_000:
                self._sizes.popitem(last=False)
        return self._sizes[location]

    def read(self, location: Location, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on; fewer only where a local file ends before."""
        self._here()
        if size <= 0:
            return b""
        if isinstance(location, Path):
            return self.local_call(location, lambda: self._read_local(location, offset, size))

        def attempt() -> bytes:
            data = self._bounded(location, "cat_file", start=offset, end=offset + size)
            if len(data) > size:
                raise StoreError(f"{location}: the store answers a request for {size} bytes with {len(data)}")
            if len(data) < size:
                raise OSError(f"{len(data)} of {size} bytes at {offset}")
            return data

        return self._retry(location, attempt)

    def read_all(self, location: Location, most: int) -> bytes | None:
        """A whole file of at most `most` bytes; None where there is no such file, or a larger one.

        Nor where a store forbids to look: one that may not be listed says so of files that are not there.
        """
        self._here()
        if isinstance(location, Path):
            try:
                return location.read_bytes() if location.stat().st_size <= most else None
            except OSError:
                return None

        def attempt() -> bytes:
            size = self._bounded(location, "info").get("size")
            data = b"" if size == 0 else self._bounded(location, "cat_file", start=0, end=min(size or most, most) + 1)
            if size is not None and size <= most and len(data) != size:
                raise OSError(f"{len(data)} of {size} bytes")
            return data

        try:
            data = self._retry(location, attempt)
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError | PermissionError):
                return None
            raise
        return data if len(data) <= most else None

    def write(self, location: Location, data: bytes) -> None:
        """Writes a file, whole or not at all."""
        self._here()
        if isinstance(location, Path):
            temporary = location.with_name(f".{location.name}.{os.getpid()}.{threading.get_ident()}.tmp")
            try:
                temporary.write_bytes(data)
                temporary.replace(location)
            except OSError as error:
                raise StoreError(f"{location}: can't be written ({error.strerror or error})") from None
        else:
            self._retry(location, lambda: self._bounded(location, "pipe_file", data))

    def submit(self, location: Location, offset: int, size: int) -> "Future[bytes]":
        """Starts `read` on a thread beside this one, of which there are `PARALLEL`.

        A process ends without waiting for what is under way (it would with `ThreadPoolExecutor`: minutes for a store
        that is gone).
        """
        self._here()
        future: Future[bytes] = Future()
        self._waiting.put((future, location, offset, size))
        if self._threads < PARALLEL:
            self._threads += 1
            threading.Thread(target=self._answer, args=(self._waiting,), name="store", daemon=True).start()
        return future

    def _answer(self, waiting: "SimpleQueue[tuple[Future[bytes], Location, int, int]]") -> None:
        while True:
            future, location, offset, size = waiting.get()
            try:
                future.set_result(self.read(location, offset, size))
            except BaseException as error:  # raised where the result is asked for
                future.set_exception(error)
            del future  # else its bytes would stay until the next read

    def match(self, pattern: str) -> list[str]:
        """URLs that a pattern with `*` or `[` stands for, sorted."""
        self._here()
        system = self._system(pattern)
        found = self._retry(pattern, lambda: self._bounded(pattern, "glob"))
        return sorted(path if "://" in path else system.unstrip_protocol(path) for path in map(str, found))

    def local_call(self, path: Path, call: Callable[[], T]) -> T:
        """The call's result, with its errors as `StoreError`."""
        try:
            return call()
        except FileNotFoundError:
            raise StoreError(f"{path}: no such file") from None
        except OSError as error:
            raise StoreError(f"{path}: can't be read ({error.strerror or error})") from None

    def _read_local(self, path: Path, offset: int, size: int) -> bytes:
        # files are kept open by thread: one that another thread closes must never be read through a number used again
        files: OrderedDict[Path, Any] | None = getattr(self._local, "files", None)
        if files is None:
            files = self._local.files = OrderedDict()
        file = files.get(path)
        if file is None:
            file = files[path] = path.open("rb", buffering=0)
            if len(files) > OPEN_FILES:
                files.popitem(last=False)[1].close()
        else:
            files.move_to_end(path)
        try:
            data = os.pread(file.fileno(), size, offset)
            while len(data) < size and (more := os.pread(file.fileno(), size - len(data), offset + len(data))):
                data += more
        except OSError:
            files.pop(path).close()
            raise
        return data

    def close_local(self, path: Path) -> None:
        """Lets go of a local file that this thread has open."""
        file = getattr(self._local, "files", {}).pop(path, None)
        if file is not None:
            file.close()

    def _system(self, url: str) -> Any:
        """The file system of a URL, one for each kind, host and process."""
        kind, host = url.split("://")[0], "/".join(url.split("/", 3)[:3])
        with self._lock:
            if host not in self._systems:
                try:
                    import fsspec.core
                except ImportError:
                    raise StoreError(f"{url}: stores are read by fsspec: pip install openvision3[remote]") from None
                try:
                    self._systems[host] = fsspec.core.url_to_fs(url)[0]
                except ImportError as error:
                    package = _PACKAGES.get(kind)
                    hint = f"pip install {package}" if package else str(error)
                    raise StoreError(f"{url}: {kind}:// needs another package: {hint}") from None
                except Exception as error:
                    raise StoreError(f"{url}: can't be opened ({_one_line(error)})") from None
                _opened.append(self._systems[host])
            return self._systems[host]

    def _bounded(self, url: str, method: str, *args: Any, **options: Any) -> Any:
        """Calls a method of the URL's file system; raises `TimeoutError` after `timeout` seconds."""
        system = self._system(url)
        if getattr(system, "async_impl", False):
            import fsspec.asyn

            async def call() -> Any:
                path = system._strip_protocol(url)
                return await asyncio.wait_for(getattr(system, f"_{method}")(path, *args, **options), self.timeout)

            return fsspec.asyn.sync(system.loop, call)
        answer: Future[Any] = Future()

        def run() -> None:
            try:
                answer.set_result(getattr(system, method)(system._strip_protocol(url), *args, **options))
            except BaseException as error:
                answer.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return answer.result(self.timeout)

    def _retry(self, url: str, attempt: Callable[[], T]) -> T:
        """The attempt's result; after an error that may pass, another attempt, until there were `attempts`."""
        wait = FIRST_WAIT
        for left in reversed(range(self.attempts)):
            try:
                return attempt()
            except StoreError:
                raise
            except Exception as error:  # every store's package has errors of its own
                if isinstance(error, FileNotFoundError) and not _may_pass(error.__cause__):
                    raise StoreError(f"{url}: no such file") from error
                if isinstance(error, _FINAL):
                    raise StoreError(f"{url}: can't be read or written ({_one_line(error)})") from error
                if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
                    error = error.__cause__
                if not left:
                    raise StoreError(
                        f"{url}: no answer after {self.attempts} attempts; the last error: {_one_line(error)} "
                        "(--data.store-attempts and --data.store-timeout set how long it is tried)"
                    ) from error
                log.info("%s: %s; another attempt in %.1f s", url, _one_line(error), wait)
                self.retried += 1
                time.sleep(wait * (0.5 + self._jitter.random()))
                wait = min(2 * wait, LONGEST_WAIT)
        raise AssertionError


def _may_pass(cause: BaseException | None) -> bool:
    """Whether what a store's package took for a missing file was an answer that did not come (fsspec does for http)."""
    status = getattr(cause, "status", None)
    if isinstance(status, int):
        return status >= 500 or status == 429
    connection = isinstance(cause, OSError) or type(cause).__module__.startswith("aiohttp")
    return connection and not isinstance(cause, FileNotFoundError)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class ForwardReader:
    """Reads a file from front to back: of a store in blocks of `BLOCK` bytes, of a local file little at a time."""

    def __init__(self, store: Store, location: Location):
        self.store, self.location = store, location
        self.size = store.size(location)
        self._most = LOCAL_BLOCK if isinstance(location, Path) else BLOCK
        self._file = None
        if isinstance(location, Path):
            self._file = store.local_call(location, lambda: location.open("rb", buffering=0))
            self._descriptor = self._file.fileno()
        self._start, self._block = 0, b""

    def block(self, offset: int) -> bytes:
        """What one read gives from `offset` on; empty at the end."""
        size = min(self._most, self.size - offset)
        if size <= 0:
            return b""
        if offset == self._start and len(self._block) == size:
            return self._block
        if self._file is None:
            return self.store.read(self.location, offset, size)
        try:
            return os.pread(self._descriptor, size, offset)
        except OSError as error:
            raise StoreError(f"{self.location}: can't be read ({error.strerror or error})") from None

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on, or what there is of them."""
        size = max(0, min(size, self.size - offset))
        if size > self._most:
            return self.store.read(self.location, offset, size)
        begin = offset - self._start
        if begin < 0 or begin + size > len(self._block):
            self._start, self._block, begin = offset, self.block(offset), 0
        return self._block[begin : begin + size]

    def close(self) -> None:
        """Lets go of a local file."""
        if self._file is not None:
            self._file.close()


def expand(paths: str | Path | Sequence[str | Path], store: Store | None = None) -> list[Location]:
    """The tars that paths, URLs, brace lists, globs and folders stand for.

    Raises `OpenVisionError` where one has none. Whether the tars of a store exist shows when they are read.
    """
    found: list[Location] = []
    patterns = [paths] if isinstance(paths, str | Path) else list(paths)
    if not patterns:
        raise OpenVisionError("no tars given: name files, brace lists, globs or folders")
    for pattern in patterns:
        texts = list(itertools.islice(braces(str(pattern)), MAX_BRACES + 1))
        if len(texts) > MAX_BRACES:
            raise OpenVisionError(f"{pattern}: stands for more than {MAX_BRACES} tars")
        for text in texts:
            location = locate(text)
            if isinstance(location, Path):
                tars: Sequence[Location] = _local_tars(location)
            else:
                tars = _remote_tars(location, store or Store())
            if not tars:
                raise OpenVisionError(f"{text}: no such tar, nor a folder with tars")
            found += tars
    return found


def _local_tars(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    if any(mark in str(path) for mark in "*?["):
        return [tar for tar in sorted(Path(match) for match in glob.glob(str(path))) if tar.is_file()]
    return []


def _remote_tars(url: str, store: Store) -> Sequence[str]:
    file = url.split("?")[0] if url.startswith("http") else url  # beyond it, a signature
    if any(mark in file for mark in "*["):
        return [found for found in store.match(url) if found.endswith(".tar")]
    return [url] if file.endswith(".tar") else store.match(url.rstrip("/") + "/*.tar")


def braces(text: str) -> Iterator[str]:
    """Expands "{000..012}" (keeping leading zeros) and "{a,b}", from left to right."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", text)
    if match is None:
        yield text
        return
    first, last, words = match.groups()
    middles: Iterable[str] = (
        words.split(",") if words else (f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1))
    )
    for middle in middles:
        yield from braces(text[: match.start()] + middle + text[match.end() :])
