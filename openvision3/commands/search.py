"""`ov3 search`: the pictures of a folder that fit a text, or look like another picture."""

import hashlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from openvision3.commands import common
from openvision3.commands.batching import BatchOptions, OutputOptions, Runner, check_options, square
from openvision3.commands.common import ModelOptions
from openvision3.commands.inference import Batching, Model, Output
from openvision3.commands.pictures import Found, Picture, has_picture_extension, is_picture_name, prepare, walk
from openvision3.config import OpenVisionError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from openvision3.data.embedding_cache import EmbeddingCache, Match
    from openvision3.model.openvision3 import OpenVision3

MAX_SHOWN = 500  # pictures on a contact sheet: 100 rows, 80 MB
_PREPARATION = "square, 1"  # part of the cache's name: another way of preparing pictures gives other embeddings


def search(
    images: Path,
    text: tyro.conf.Positional[str] = "",
    like: Path | None = None,
    model: Model = ModelOptions(),
    batching: Batching = BatchOptions(),
    output: Output = OutputOptions(),
    top: int = 10,
    out: Path | None = None,
) -> int:
    """Finds the pictures of a folder that fit a text, or another picture, best, and prints them with their cosines.

    The folder's embeddings are kept beside it: the next search encodes what is new or changed, and nothing else.

    Args:
        images: folder of pictures, with its subfolders.
        text: what to look for.
        like: picture to look for, instead of a text.
        top: how many pictures to show.
        out: also write them as one picture (a contact sheet) to this file.
    """
    _check_query(images, text, like, top)
    if out is not None and not is_picture_name(out.name):
        raise OpenVisionError(f"--out {out}: expected a picture's extension, such as .png, .jpg or .webp")
    if out is not None and top > MAX_SHOWN:
        raise OpenVisionError(f"--top {top}: expected at most {MAX_SHOWN} with --out")
    for path in (out, output.json):
        common.refuse_existing(path, output.overwrite)
    loaded = common.load_model(model)
    if text and loaded.config.text_encoder is None:
        raise OpenVisionError(
            f"model {loaded.config.name!r} has no text encoder, so it can't search by text; it can by picture: "
            "--like PICTURE"
        )
    started = time.perf_counter()
    batching = square(loaded, batching)
    check_options(loaded, batching)
    query = _query(loaded, batching, text, like)
    cache = _open_cache(images, loaded, batching)
    encoded, failed = update(cache, loaded, batching)
    if not len(cache):
        raise OpenVisionError(f"no pictures in {images}" + (f" that can be read; {failed} failed" if failed else ""))
    matches = cache.search(query, top)
    seconds = time.perf_counter() - started

    _print(matches, text or f"like {like}", images)
    said = f"{len(cache)} pictures, {encoded} encoded now" + (f", {failed} failed" if failed else "")
    print(f"{said}; answered {seconds:.2f} s after the model was loaded", file=sys.stderr)
    results = [
        {"picture": str(images / m.keys[0]), "score": m.score, "copies": [str(images / key) for key in m.keys[1:]]}
        for m in matches
    ]
    counts = {"pictures": len(cache), "encoded": encoded, "failed": failed, "seconds": seconds}
    asked: dict[str, Any] = {"text": text} if text else {"like": str(like)}
    common.write_json(output.json, {"model": model.model, **asked, **counts, "results": results}, output.overwrite)
    if out is not None:
        from openvision3.commands.contact_sheet import contact_sheet

        sheet = contact_sheet(text or f"like {like}", like, [(images / m.keys[0], m.score) for m in matches])
        try:
            with common.whole_file(out, output.overwrite) as temporary:
                sheet.save(temporary)
        except (OSError, ValueError) as error:  # such as WebP's limit of 16383 pixels
            raise OpenVisionError(
                f"--out {out}: {sheet.width} x {sheet.height} pixels can't be saved ({error})"
            ) from None
    return 1 if failed else 0


def update(cache: "EmbeddingCache", model: "OpenVision3", batching: BatchOptions) -> tuple[int, int]:
    """Brings a cache up to date with its folder, and saves it: (pictures encoded, pictures that failed, each named)."""
    from openvision3.data.embedding_cache import Stamp
    from openvision3.evaluation.retrieval import check_finite

    found, listed = Found(), {}

    def unread(inside: str, line: str) -> None:
        found.fail(line)
        # what is known of a folder that can't be read now is kept
        listed.update({key: stamp for key, (stamp, _) in cache.files.items() if key.startswith(inside)})

    for key, entry in walk(cache.folder, unread):
        if has_picture_extension(key):
            try:
                status = entry.stat()
            except OSError as error:  # removed since it was listed
                found.fail(f"{cache.folder / key}: can't be read ({error.strerror})")
                continue
            listed[key] = Stamp(status.st_size, status.st_mtime_ns, status.st_ino)
    with common.Progress(None, "pictures read") as progress:
        for key, reason in cache.update(listed, progress.advance).items():
            found.fail(f"{cache.folder / key}: {reason}")
    missing = cache.missing()
    content_of = {cache.folder / keys[0]: content for content, keys in missing.items()}
    found.pictures = [Picture(path) for path in content_of]

    def work(pictures: list[Picture], pixels: "Tensor") -> list[Callable[[], None]]:
        embeddings = check_finite(model.embed_image(pixels).float().cpu(), "image")
        cache.add([content_of[picture.path] for picture in pictures], embeddings)
        return []

    runner = Runner(found, model, batching, read=lambda path: read_same(path, content_of[path]))
    try:
        outcome = runner.run(work)
    finally:
        cache.save()
    copies = [key for keys in cache.missing().values() for key in keys[1:]]
    for key in copies:
        common.fail(f"{cache.folder / key}: a copy of a picture that failed")
    return outcome.done, outcome.failed + len(copies)


def read_same(path: Path, content: str) -> "Image":
    """Reads a picture whose content has that sha256; raises `OpenVisionError` where it has another one by now."""
    from openvision3.data.transforms import decode_image

    try:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != content:
                raise OpenVisionError(f"{path}: was changed meanwhile; search again")
            file.seek(0)
            return decode_image(file, str(path))
    except OSError as error:
        raise OpenVisionError(f"{path}: can't be read ({error.strerror or error})") from None


def _check_query(images: Path, text: str, like: Path | None, top: int) -> None:
    if bool(text.strip()) == (like is not None):
        raise OpenVisionError("give a text to search for, or --like PICTURE, and not both")
    if top < 1:
        raise OpenVisionError(f"--top {top}: expected at least 1")
    if not images.is_dir():
        raise OpenVisionError(f"--images {images}: " + ("not a folder" if images.exists() else "no such folder"))


def _query(model: "OpenVision3", batching: BatchOptions, text: str, like: Path | None) -> "Tensor":
    """The embedding (E,) of the text or the picture, in fp32 on the CPU."""
    from openvision3.evaluation.retrieval import check_finite
    from openvision3.evaluation.samples import evaluating

    with evaluating(model):
        if like is None:
            return _embed_text(model, text)
        pixels, _ = prepare(like, batching.size, batching.max_side, model.config.downsampling)
        parameter = next(model.parameters())
        images = pixels[None].to(parameter.device, parameter.dtype)
        return check_finite(model.embed_image(images).float().cpu(), "image")[0]


def _embed_text(model: "OpenVision3", text: str) -> "Tensor":
    """The text's embedding; of a demo thing's bare name the mean over the prompts that `ov3 classify` uses.

    Captions hold no bare names: with the quickstart model, "seal" finds far less than "a seal" does.
    """
    from torch.nn.functional import normalize

    from openvision3.data.demo import scene_names
    from openvision3.evaluation.retrieval import embed_texts
    from openvision3.evaluation.zeroshot import demo_prompts

    texts = demo_prompts(text) if text in scene_names() else [text]
    return normalize(embed_texts(model, texts).mean(dim=0), dim=0)


def _open_cache(folder: Path, model: "OpenVision3", batching: BatchOptions) -> "EmbeddingCache":
    from openvision3.data.embedding_cache import EmbeddingCache
    from openvision3.model.fingerprint import image_fingerprint

    named = f"{image_fingerprint(model)} {_PREPARATION} {batching.size}"
    fingerprint = hashlib.sha256(named.encode()).hexdigest()
    return EmbeddingCache(folder, fingerprint, model.config.embed_dim, say=lambda line: print(line, file=sys.stderr))


def _print(matches: "list[Match]", query: str, folder: Path) -> None:
    rows = []
    for match in matches:
        copies = len(match.keys) - 1
        also = f" (and {copies} {'copy' if copies == 1 else 'copies'})" if copies else ""
        rows.append((f"{folder / match.keys[0]}{also}", f"{match.score:.3f}"))
    common.print_table(query, ("picture", "cosine"), rows)
