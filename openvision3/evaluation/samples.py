"""The pictures that figures are measured on: demo scenes, held-out landscapes, folders and tars.

All of them come as square uint8 pictures of one size, in a fixed order, and can be gone through again.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openvision3.config import DataConfig, OpenVisionError, SceneConfig
from openvision3.data import demo, grammar
from openvision3.data.demo import Scene, Thing
from openvision3.data.transforms import from_uint8, load_image, preprocess
from openvision3.data.transforms import to_uint8 as rounded

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
LANDSCAPES = "landscapes"
_THING = {"name": str, "x": float, "y": float, "size": float, "angle": float, "flip": bool}
RESIZING = "short side resized (bicubic, antialiased) and centre crop"


@dataclass(frozen=True)
class EvalSample:
    """One picture and what is known of it. `label` indexes the set's `labels`; -1 where the picture has none."""

    key: str
    image: np.ndarray  # uint8 (size, size, 3), RGB
    alt: str = ""
    caption: str = ""
    label: int = -1
    scene: Scene | None = None  # what a demo picture truly shows
    scene_word: str | None = None  # and where; None where a look would not settle it
    captions: tuple[str, ...] = ()  # where it has several; `caption` is the first

    @property
    def references(self) -> tuple[str, ...]:
        """All of its captions."""
        return self.captions or ((self.caption,) if self.caption else ())


@dataclass
class SampleSet:
    """A named, repeatable sequence of samples; `failed` collects (path or key, reason) of those that can't be used."""

    name: str
    protocol: str  # one line to print beside the figures
    size: int  # pixels, each side
    seed: int | None  # of the scenes; None for files
    make: Callable[["SampleSet"], Iterator[EvalSample]]
    labels: tuple[str, ...] = ()  # the names that pictures with one thing are told apart by
    scenes: SceneConfig | None = None  # for demo scenes
    failed: list[tuple[str, str]] = field(default_factory=list)

    def __iter__(self) -> Iterator[EvalSample]:
        self.failed.clear()
        return self.make(self)


def open_samples(
    data: str = demo.BENCHMARK,
    size: int = 128,
    samples: int = 0,
    scenes: SceneConfig | None = None,
    labels: Path | None = None,
    captions: Path | None = None,
) -> SampleSet:
    """Opens `data`: "scenes-v1", "landscapes", a folder of pictures (sub-folders are labels), or tars.

    `samples` limits how many are used (0: all); `scenes` changes the distribution of "scenes-v1", for an encoder that
    was trained on fewer names; `labels` is a text file with one label a line, in the order of the sorted sub-folders;
    `captions` is COCO's file of a folder's captions. Raises `OpenVisionError` where there is nothing to read.
    """
    if size < 1:
        raise OpenVisionError(f"size is {size}, but must be a positive number of pixels")
    path = Path(data)
    folder = path.is_dir() and not any(path.glob("*.tar"))
    if not folder and (labels or captions):
        raise OpenVisionError(f"labels and captions are of a folder of pictures, which {data!r} is not")
    if data == demo.BENCHMARK:
        return scene_samples(samples or demo.BENCHMARK_SAMPLES, size, scenes or SceneConfig())
    if data == LANDSCAPES:
        return landscape_samples(size, samples)
    if not path.exists() and not any(mark in data for mark in "*{"):
        known = f"{demo.BENCHMARK!r}, {LANDSCAPES!r}"
        raise OpenVisionError(f"{data!r} is no data to evaluate on: expected {known}, a folder of pictures, or tars")
    if folder:
        return folder_samples(path, size, samples, labels, captions)
    return tar_samples(data, size, samples)


def scene_samples(
    samples: int,
    size: int,
    config: SceneConfig | None = None,
    split: str = demo.BENCHMARK,
    seed: int = demo.BENCHMARK_SEED,
) -> SampleSet:
    """Demo scenes 0 to `samples` - 1 of a split; scenes of one thing are labelled with its name."""
    config = config or SceneConfig()
    names = demo.names(config.num_names)

    def make(_: SampleSet) -> Iterator[EvalSample]:
        for index in range(samples):
            scene = demo.scene(config, split, seed, index)
            yield scene_sample(scene, size, names)

    what = f"demo scenes of {config.num_names} names, split {split}"
    if config == SceneConfig() and split == demo.BENCHMARK and seed == demo.BENCHMARK_SEED:
        what = f"demo scenes, the frozen benchmark {split}"
    elif replace(config, num_names=SceneConfig().num_names) != SceneConfig():
        what += ", with a distribution of their own"
    protocol = f"{what}, seed {seed}, indices 0-{samples - 1}, rendered at {size} px"
    return SampleSet(split, protocol, size, seed, make, names, config)


def scene_sample(scene: Scene, size: int, names: tuple[str, ...]) -> EvalSample:
    """Renders a scene and writes its captions."""
    texts = grammar.captions(scene)
    label = names.index(scene.things[0].name) if len(scene.things) == 1 else -1
    word = grammar.scene_word(scene)
    return EvalSample(scene.key, demo.render(scene, size), texts.alt, texts.caption, label, scene, word)


def one_thing(config: SceneConfig) -> SceneConfig:
    """The same distribution, with one thing in each scene."""
    return replace(config, count_weights=(1.0, 0.0, 0.0, 0.0))


def landscape_samples(size: int = 128, samples: int = 0) -> SampleSet:
    """The held-out landscapes: 34 files, three fixed square crops of full height each."""

    def make(_: SampleSet) -> Iterator[EvalSample]:
        for i, (key, image) in enumerate(demo.landscape_crops(size)):
            if samples and i >= samples:
                return
            yield EvalSample(key, image)

    crops = "34 held-out landscapes x 3 fixed square crops of full height"
    protocol = f"{crops}, resized (bicubic, antialiased) to {size} px"
    return SampleSet(LANDSCAPES, protocol, size, None, make)


def folder_samples(
    folder: Path, size: int, samples: int = 0, labels: Path | None = None, captions: Path | None = None
) -> SampleSet:
    """All pictures below a folder, sorted by path, or `samples` of them spread evenly over that list.

    A picture's captions are those that COCO's file `captions` has of it; without that file, the text of the file beside
    it with the suffix `.txt`, where there is one. Its label is its sub-folder. Pictures that can't be read are left out
    and named in `failed`.
    """
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in PICTURE_SUFFIXES and f.is_file())
    if not files:
        raise OpenVisionError(f"{folder} holds no pictures ({', '.join(sorted(PICTURE_SUFFIXES))}) and no tars")
    found = len(files)
    if 0 < samples < found:
        files = [files[i * found // samples] for i in range(samples)]
    classes = sorted({f.relative_to(folder).parts[0] for f in files if f.parent != folder})
    names = _label_names(classes, labels)
    known = None if captions is None else coco_captions(captions)
    if known is not None and not any(file.name in known for file in files):
        raise OpenVisionError(f"{captions} has captions of none of the pictures below {folder}")

    def make(self: SampleSet) -> Iterator[EvalSample]:
        for file in files:
            parts = file.relative_to(folder).parts
            try:
                image = square_pixels(file, size)
                texts = _caption_beside(file) if known is None else known.get(file.name, ())
            except OpenVisionError as error:
                self.failed.append((str(file), str(error)))
                continue
            label = classes.index(parts[0]) if len(parts) > 1 else -1
            caption = texts[0] if texts else ""
            yield EvalSample("/".join(parts), image, caption, caption, label, captions=texts)

    protocol = f"{len(files)} of {found} pictures below {folder}, {RESIZING} to {size} px"
    if known is not None:
        protocol += f"; captions of {captions}"
    return SampleSet(str(folder), protocol, size, None, make, names)


def square_pixels(path: Path, size: int) -> np.ndarray:
    """Reads a picture file as uint8 (size, size, 3): short side resized and centre crop."""
    image = preprocess(load_image(path), size)
    return to_uint8(image[None])[0].permute(1, 2, 0).numpy()


def _label_names(classes: list[str], labels: Path | None) -> tuple[str, ...]:
    """What a folder's classes are called: the file's lines, ImageNet's names for its synsets, or the folders' own."""
    if labels is not None:
        try:
            lines = [line.strip() for line in labels.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise OpenVisionError(f"{labels}: not a readable list of labels ({error})") from None
        if len(lines) != len(classes):
            raise OpenVisionError(f"{labels} has {len(lines)} labels, but the folder has {len(classes)} sub-folders")
        return tuple(lines)
    return _imagenet_names(classes) or tuple(c.replace("_", " ") for c in classes)


def _imagenet_names(classes: list[str]) -> tuple[str, ...]:
    """CLIP's names for folders that are all among ImageNet's 1000 synsets (n01440764 and so on); none for others."""
    if not all(len(c) == 9 and c[0] == "n" and c[1:].isdigit() for c in classes):
        return ()
    from timm.data.imagenet_info import ImageNetInfo

    order = {synset: i for i, synset in enumerate(ImageNetInfo().label_names())}
    if not order.keys() >= set(classes):
        return ()
    try:
        from open_clip import IMAGENET_CLASSNAMES
    except ImportError:
        raise OpenVisionError("ImageNet's class names come with open_clip: pip install openvision3[eval]") from None
    return tuple(IMAGENET_CLASSNAMES[order[c]] for c in classes)


def _caption_beside(file: Path) -> tuple[str, ...]:
    text = file.with_suffix(".txt")
    if not text.is_file():
        return ()
    try:
        caption = text.read_text(encoding="utf-8").strip()
        return (caption,) if caption else ()
    except (OSError, UnicodeDecodeError) as error:
        raise OpenVisionError(f"{text}: not a readable caption ({error})") from None


def coco_captions(file: Path) -> dict[str, tuple[str, ...]]:
    """The captions of each picture by its file name, from COCO's annotations such as `captions_val2017.json`.

    Raises `OpenVisionError` for anything else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        names = {image["id"]: str(image["file_name"]) for image in found["images"]}
        captions: dict[str, tuple[str, ...]] = {}
        for annotation in found["annotations"]:
            name, caption = names[annotation["image_id"]], str(annotation["caption"]).strip()
            captions[name] = (*captions.get(name, ()), *([caption] if caption else []))
    except (OSError, UnicodeDecodeError) as error:
        raise OpenVisionError(f"{file}: not readable ({error})") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise OpenVisionError(f'{file}: expected COCO\'s captions, {{"images": [...], "annotations": [...]}}') from None
    return captions


def tar_samples(paths: str, size: int, samples: int = 0) -> SampleSet:
    """Samples of indexed tars (`ov3 data index`): pictures with their alt text and full caption."""
    from openvision3.data.samples import BadSample
    from openvision3.data.shards import TarSource

    source = TarSource(paths, DataConfig(source=paths))
    total = len(source)
    count = min(samples or total, total)

    def make(self: SampleSet) -> Iterator[EvalSample]:
        self.failed += [(str(path), reason) for path, reason in source.broken]
        for i in range(count):
            try:
                sample = source.read_number(i * total // count)
            except BadSample as error:
                self.failed.append((error.key, error.reason))
                continue
            scene, word = scene_of_meta(sample.key, sample.meta)
            image = _square_array(sample.image, size)
            yield EvalSample(sample.key, image, sample.alt, sample.caption, scene=scene, scene_word=word)

    protocol = f"{count} of {total} samples of {paths}, spread evenly, {RESIZING} to {size} px"
    return SampleSet(paths, protocol, size, None, make)


def scene_of_meta(key: str, meta: Any) -> tuple[Scene | None, str | None]:
    """What a picture shows by the json that `ov3 data make-demo` writes; (None, None) for other samples."""
    try:
        things = tuple(Thing(**{name: kind(item[name]) for name, kind in _THING.items()}) for item in meta["things"])
        word = meta["scene"]
    except (KeyError, TypeError, ValueError):
        return None, None
    if not things or not all(thing.name in demo.scene_names() for thing in things):
        return None, None
    black = (0.0, 0.0, 0.0)  # neither crop nor colours are needed to judge a caption
    scene = Scene(key, things, str(meta.get("background", "")), (0.0, 0.0, 1.0, False), (black, black, 0.0))
    return scene, word if word in grammar.SCENE_PHRASES else None


def _square_array(array: np.ndarray, size: int) -> np.ndarray:
    from PIL import Image

    if array.shape[:2] == (size, size):
        return array
    return to_uint8(preprocess(Image.fromarray(array), size)[None])[0].permute(1, 2, 0).numpy()


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1], any shape, clamped and rounded (not truncated) to uint8. NaN raises `OpenVisionError`."""
    if bool(torch.isnan(images).any()):
        raise OpenVisionError("the model's pictures hold NaN: its weights are broken, or the precision is too low")
    return rounded(images)


@dataclass(frozen=True)
class EncodedBatch:
    """Samples with their unified tokens."""

    samples: list[EvalSample]
    pixels: Tensor  # uint8 (B, 3, H, W), on the CPU
    images: Tensor  # (B, 3, H, W) in [-1, 1], on the model's device
    tokens: Tensor  # (B, N, D)


def encode_batches(
    model: torch.nn.Module, samples: SampleSet, batch_size: int, progress: Callable[[int], None] | None = None
) -> Iterator[EncodedBatch]:
    """Goes through the samples in order and encodes them; `progress` is called with the number of samples done.

    The caller holds `evaluating(model)`. Raises `OpenVisionError` where no sample can be used.
    """
    if batch_size < 1:
        raise OpenVisionError(f"batch size is {batch_size}, but must be at least 1")
    weights, done = next(model.parameters()), 0
    for chunk in _chunks(iter(samples), batch_size):
        pixels = torch.from_numpy(np.stack([sample.image for sample in chunk])).permute(0, 3, 1, 2).contiguous()
        images = from_uint8(pixels).to(weights.device, weights.dtype)
        yield EncodedBatch(chunk, pixels, images, model.encode(images))  # type: ignore[operator]
        done += len(chunk)
        if progress:
            progress(done)
    if done == 0:
        reason = f" (first: {samples.failed[0][0]}: {samples.failed[0][1]})" if samples.failed else ""
        raise OpenVisionError(f"{samples.name}: not one picture could be used{reason}")


def _chunks(samples: Iterator[EvalSample], batch_size: int) -> Iterator[list[EvalSample]]:
    chunk: list[EvalSample] = []
    for sample in samples:
        chunk.append(sample)
        if len(chunk) == batch_size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients and no autocast; the model's mode comes back afterwards."""
    training = model.training
    device = next(model.parameters()).device.type
    model.eval()
    try:
        with torch.inference_mode(), torch.autocast(device, enabled=False):
            yield
    finally:
        model.train(training)


def mean(values: list[float]) -> float:
    """The exactly summed mean; NaN for no values, so that a missing figure is never taken for 0."""
    return math.fsum(values) / len(values) if values else math.nan
