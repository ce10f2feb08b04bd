"""One named file from the Python package index that the user's pip is configured for.

`pip download` is no help with a source archive: it runs the archive's `setup.py` to learn its name. Here the index's
page is read (PEP 503 and PEP 691), the one file with the pinned name and sha256 is downloaded, and nothing is run.
"""

import ast
import base64
import hashlib
import http.client
import json
import os
import shutil
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import IO, Any

from openvision3.config import OpenVisionError

DEFAULT_INDEX = "https://pypi.org/simple"
TIMEOUT = 60.0  # seconds without a byte
ATTEMPTS = 3  # of a download that breaks off
RETRY_PAUSE = 1.0  # seconds, growing with each
MAX_PAGE = 32 * 2**20  # bytes of an index page
CHUNK = 2**18
Progress = Callable[[int, int], None]  # (bytes so far, bytes in all)


@dataclass(frozen=True)
class PipSettings:
    """What pip's configuration says about where packages come from."""

    indexes: tuple[str, ...] = (DEFAULT_INDEX,)
    folders: tuple[str, ...] = ()  # find-links that are local folders
    cert: str = ""  # extra certificate authorities, a PEM file
    proxy: str = ""


def pip_settings() -> PipSettings:
    """Reads index-url, extra-index-url, find-links, no-index, cert and proxy from PIP_* variables and pip's files.

    Variables win over the `[download]` section, and that over `[global]`, as in pip itself. Without pip (an
    environment made by uv, for one) the variables and pip's defaults count.
    """
    options = {f"global.{name}": value for name, value in _pip_variables().items()}
    for line in _pip_config_list():
        name, _, value = line.partition("=")
        try:
            options.setdefault(name.strip(), str(ast.literal_eval(value.strip())))
        except (SyntaxError, ValueError):
            continue  # not an option line

    def option(name: str) -> str:
        variable = _pip_variables().get(name)
        return variable or options.get(f"download.{name}") or options.get(f"global.{name}") or ""

    indexes = [option("index-url") or DEFAULT_INDEX, *option("extra-index-url").split()]
    if option("no-index").lower() in ("1", "true", "yes", "on"):
        indexes = []
    links = [urllib.request.url2pathname(link.removeprefix("file://")) for link in option("find-links").split()]
    folders = tuple(link for link in links if os.path.isdir(link))
    return PipSettings(tuple(dict.fromkeys(indexes)), folders, option("cert"), option("proxy"))


def download(
    project: str, filename: str, size: int, sha256: str, target: Path, progress: Progress | None = None
) -> None:
    """Writes the pinned file to `target`, looking in pip's find-links folders, then in each of its indexes.

    size: of the file in bytes, exact. Raises `OpenVisionError` that lists where it looked and why each failed.
    """
    settings = pip_settings()
    failures = []
    for folder in settings.folders:
        path = Path(folder, filename)
        if path.is_file():
            if file_matches(path, size, sha256):
                shutil.copyfile(path, target)
                return
            failures.append(f"{path}: not the pinned file (wrong size or sha256)")
    opener = _opener(settings)
    for index in settings.indexes:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                url = _find(opener, index, project, filename)
                _download_url(opener, index, url, size, sha256, target, progress)
                return
            except _WrongFile as error:
                failures.append(f"{_without_login(index)}: {error}")
                break
            except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException) as error:
                gone = isinstance(error, urllib.error.HTTPError) and error.code < 500
                if attempt == ATTEMPTS or gone:
                    failures.append(f"{_without_login(index)}: {error}")
                    break
                time.sleep(RETRY_PAUSE * attempt)
    raise OpenVisionError(
        f"could not get {filename} of {project} from the package index: " + ("; ".join(failures) or "no index is set")
    )


def file_matches(path: Path, size: int, sha256: str) -> bool:
    """Whether a file has exactly this size and this sha256 (hexadecimal)."""
    if path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


class _WrongFile(Exception):
    """The index answered, but not with the pinned file: trying again would not help."""


def _pip_variables() -> dict[str, str]:
    return {
        name[4:].lower().replace("_", "-"): value
        for name, value in os.environ.items()
        if name.startswith("PIP_") and value
    }


def _pip_config_list() -> list[str]:
    command = [sys.executable, "-m", "pip", "config", "list", "--disable-pip-version-check"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return result.stdout.splitlines() if result.returncode == 0 else []


def _opener(settings: PipSettings) -> urllib.request.OpenerDirector:
    context = ssl.create_default_context()  # honours SSL_CERT_FILE and SSL_CERT_DIR
    for bundle in (settings.cert, os.environ.get("REQUESTS_CA_BUNDLE", "")):
        if os.path.isfile(bundle):
            context.load_verify_locations(bundle)
    try:
        import certifi  # pip's own roots: python.org's Python on macOS starts without any

        context.load_verify_locations(certifi.where())
    except ImportError:
        pass
    handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=context)]
    if settings.proxy:
        handlers.append(urllib.request.ProxyHandler({"http": settings.proxy, "https": settings.proxy}))
    return urllib.request.build_opener(*handlers)


def _open(opener: urllib.request.OpenerDirector, url: str, index: str, accept: str = "*/*") -> Any:
    """Opens a URL; the index's login, if it has one, is sent to the index's own host only, and not on redirects."""
    parts, home = urllib.parse.urlsplit(url), urllib.parse.urlsplit(index)
    if parts.scheme not in ("http", "https") and not (parts.scheme == "file" and home.scheme == "file"):
        raise ValueError(f"refusing a link to {_without_login(url)}")
    request = urllib.request.Request(_without_login(url), headers={"Accept": accept, "User-Agent": "openvision3"})
    login = home if home.username and parts.hostname == home.hostname else parts
    if login.username:
        pair = f"{urllib.parse.unquote(login.username)}:{urllib.parse.unquote(login.password or '')}"
        request.add_unredirected_header("Authorization", "Basic " + base64.b64encode(pair.encode()).decode())
    return opener.open(request, timeout=TIMEOUT)


def _find(opener: urllib.request.OpenerDirector, index: str, project: str, filename: str) -> str:
    page = f"{index.rstrip('/')}/{project}/"
    if page.startswith("file:"):
        page += "index.html"
    with _open(opener, page, index, "application/vnd.pypi.simple.v1+json, text/html;q=0.5") as response:
        content, base = response.read(MAX_PAGE), response.geturl()
        kind = response.headers.get("Content-Type", "")
    for link in _links(content, kind):
        url = urllib.parse.urljoin(base, link)
        path = urllib.parse.urlsplit(url).path
        if urllib.parse.unquote(path.rsplit("/", 1)[-1]).lower() == filename.lower():
            return urllib.parse.urldefrag(url).url
    raise _WrongFile(f"its page of {project} lists no {filename}")


def _links(content: bytes, kind: str) -> Iterator[str]:
    if "json" in kind:
        for item in json.loads(content)["files"]:
            yield item["url"]
        return
    parser = _Anchors()
    parser.feed(content.decode("utf-8", errors="replace"))
    yield from parser.links


class _Anchors(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        href = dict(attrs).get("href")
        if tag == "a" and href:
            self.links.append(href)


def _download_url(
    opener: urllib.request.OpenerDirector,
    index: str,
    url: str,
    size: int,
    sha256: str,
    target: Path,
    progress: Progress | None,
) -> None:
    with _open(opener, url, index) as response, target.open("wb") as file:
        got, digest = _copy(response, file, size, progress)
    if got > size or (got == size and digest != sha256):
        raise _WrongFile(f"{_without_login(url)} is not the pinned file (wrong size or sha256)")
    if got < size:
        raise OSError(f"the download broke off after {got} of {size} bytes")


def _copy(source: Any, file: IO[bytes], size: int, progress: Progress | None) -> tuple[int, str]:
    digest, got = hashlib.sha256(), 0
    while got <= size and (chunk := source.read(min(CHUNK, size + 1 - got))):
        file.write(chunk)
        digest.update(chunk)
        got += len(chunk)
        if progress is not None:
            progress(got, size)
    return got, digest.hexdigest()


def _without_login(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
