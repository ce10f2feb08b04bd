"""Pictures in and out: reading any file as RGB, resizing, padding, cropping, and the way back from tensors."""

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from openvision3.config import OpenVisionError

MAX_PIXELS = 178_956_970  # 512 MiB as RGB; larger pictures are taken for decompression bombs
MULTIPLE = 16  # pixels per token, each side
MAX_SIDE = 1024  # pixels; longer pictures are reduced to it where they keep their shape
REDUCTIONS = (8, 4, 2)  # of a JPEG's sides, that its decoder makes out of fewer coefficients of each block
SPARE = 2  # a reduced crop has at least so many times the pixels, each side, that it is then resized to
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)
_FROM_RIGHT = (
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.ROTATE_180,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
)  # the turned picture's left was a right or lower end, where sizes round up
_FROM_BOTTOM = (
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.ROTATE_180,
    Image.Transpose.ROTATE_90,
    Image.Transpose.TRANSVERSE,
)  # its top, likewise


def load_image(path: str | Path) -> Image.Image:
    """Reads a picture file as upright 8-bit RGB; of several frames the first, transparency over white.

    Raises `OpenVisionError`, in one line with the path, where the file is missing, empty, cut short, no picture, or has
    more than `MAX_PIXELS` pixels.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return decode_image(file, str(path))
    except FileNotFoundError:
        raise OpenVisionError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise OpenVisionError(f"{path}: is a folder, not a picture") from None
    except OSError as error:
        raise OpenVisionError(f"{path}: can't be read ({error.strerror or error})") from None


def decode_image(file: BinaryIO, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes a picture from an open binary file as `load_image` does; its errors begin with `name`.

    One whose header claims more than `max_pixels` pixels is refused before it is decoded.
    """
    with _opened(file, name, max_pixels) as (image, turn):
        image.load()
        rgb = _to_rgb(image)
        return (rgb.copy() if rgb is image else rgb) if turn is None else rgb.transpose(turn)


def decode_crops(
    file: BinaryIO, name: str, size: int, boxes: Callable[[int, int], Sequence["Box"]], fast: bool = False
) -> list[np.ndarray]:
    """Crops of a picture, each uint8 (size, size, 3), from an open binary file, as `crop` makes them of the whole.

    `boxes` gives the crops' boxes for the upright picture's width and height. With `fast`, a JPEG is decoded at a half,
    a quarter or an eighth of its size where a crop then still has `SPARE` times the pixels, each side, that it is
    resized to. Crops of photographs differ a little then: 54 dB PSNR in the median (docs/PERFORMANCE.md). Each is a
    function of the file and its own box. Errors are those of `decode_image`.
    """
    with _opened(file, name) as (image, turn):
        width, height = image.size if turn not in _ON_ITS_SIDE else image.size[::-1]
        jpeg = fast and image.format == "JPEG"
        chosen = [(box, _reduction(box, size) if jpeg else 1) for box in boxes(width, height)]
        first = chosen[0][1]
        decoded = {first: _reduced(image, turn, first)}
    for reduction in {reduction for _, reduction in chosen} - {first}:
        with _opened(file, name) as (image, turn):
            decoded[reduction] = _reduced(image, turn, reduction)
    return [np.array(_resized(decoded[reduction], size, box, reduction)) for box, reduction in chosen]


@contextmanager
def _opened(
    file: BinaryIO, name: str, max_pixels: int = MAX_PIXELS
) -> Iterator[tuple[Image.Image, Image.Transpose | None]]:
    """A picture of which no more than the header was read, and what turns it upright; errors name it in one line."""
    file.seek(0)
    if not file.read(1):
        raise OpenVisionError(f"{name}: is empty")
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of bombs at half of the size that is refused here
            with Image.open(file, formats=_formats()) as image:
                if image.width * image.height > max_pixels:
                    raise OpenVisionError(_too_large(name, f"{image.width} x {image.height}", max_pixels))
                yield image, _UPRIGHT.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    except OpenVisionError:
        raise
    except Image.DecompressionBombError:
        raise OpenVisionError(_too_large(name, "its header claims far more", max_pixels)) from None
    except Image.UnidentifiedImageError:
        raise OpenVisionError(f"{name}: is not a picture of a known format") from None
    except Exception as error:  # Pillow's decoders meet broken files with every kind of exception
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OpenVisionError(f"{name}: can't be decoded ({reason[:200]})") from None


def _reduction(box: "Box", size: int) -> int:
    """The greatest reduction of a JPEG that leaves the crop pixels to spare."""
    side = min(box[2] - box[0], box[3] - box[1])
    return next((reduction for reduction in REDUCTIONS if side >= SPARE * reduction * size), 1)


class _Reduced(NamedTuple):
    """An upright picture, and how many columns and rows of the whole one's size lie before its left and top."""

    image: Image.Image
    before: tuple[int, int]


def _reduced(image: Image.Image, turn: Image.Transpose | None, reduction: int) -> _Reduced:
    """Decodes an open picture at a fraction of its size, rounded up, as upright RGB."""
    width, height = (-(-side // reduction) for side in image.size)
    over = (width * reduction - image.width, height * reduction - image.height)
    if reduction > 1:
        image.draft(None, (image.width // reduction, image.height // reduction))  # type: ignore[arg-type]
        assert image.size == (width, height), (image.size, reduction)
    image.load()
    rgb = _to_rgb(image)
    if turn is None:
        return _Reduced(rgb, (0, 0))
    columns, rows = over[::-1] if turn in _ON_ITS_SIDE else over
    return _Reduced(rgb.transpose(turn), (columns * (turn in _FROM_RIGHT), rows * (turn in _FROM_BOTTOM)))


def _resized(picture: _Reduced, size: int, box: "Box", reduction: int) -> Image.Image:
    (columns, rows), (left, top, right, bottom) = picture.before, box
    part = (
        (left + columns) / reduction,
        (top + rows) / reduction,
        (right + columns) / reduction,
        (bottom + rows) / reduction,
    )
    return picture.image.resize((size, size), Image.Resampling.BILINEAR, box=part)


@functools.cache
def _formats() -> list[str]:
    """Pillow's formats, but for those that it decodes by running another program (Ghostscript), or has Windows do."""
    Image.init()
    return [name for name in Image.ID if name not in ("EPS", "WMF")]


def _too_large(name: str, size: str, max_pixels: int) -> str:
    return f"{name}: too large ({size} pixels); at most {max_pixels / 1e6:.0f} million pixels are read"


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes as 8-bit RGB; a picture that is so is returned itself."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Grey values of 16-bit or 32-bit integers, or floats in [0, 1] or [0, 255], as uint8."""
    values = np.nan_to_num(values.astype(np.float64))
    top = float(values.max())
    if values.dtype.kind == "f" and top <= 1.0:
        scale = 255.0
    else:
        scale = 1.0 if top <= 255 else 255 / 65535 if top <= 65535 else 255 / top
    return np.round(values * scale).clip(0, 255).astype(np.uint8)


def preprocess(
    image: Image.Image, size: int | None = None, max_side: int = MAX_SIDE, multiple: int = MULTIPLE
) -> Tensor:
    """An RGB picture as a float32 tensor (3, H, W) in [-1, 1].

    With `size`, the short side is resized to it (bicubic, antialiased) and the centre cropped to (size, size). Without,
    the picture keeps its size, but a longest side above `max_side` is reduced to that. It is then padded to multiples
    of `multiple` (a model's pixels per token) by reflection at the right and the bottom; `crop_back` undoes that.
    Raises `ValueError` for a size, side or multiple below 1.
    """
    if min(1 if size is None else size, max_side, multiple) < 1:
        raise ValueError(f"size {size}, max_side {max_side} and multiple {multiple} must be at least 1 pixel")
    if size is not None:
        return to_tensor(_resize_and_crop(image, size))
    kept = kept_size(image.size, max_side)
    pixels = np.asarray(image if kept == image.size else image.resize(kept, Image.Resampling.BICUBIC))
    columns, rows = (_reflected(length, -(-length // multiple) * multiple) for length in kept)
    return to_tensor(pixels[rows][:, columns])


def kept_size(size: tuple[int, int], max_side: int = MAX_SIDE) -> tuple[int, int]:
    """The (width, height) that `preprocess` without a size keeps of a picture's, before it pads."""
    longest = max(size)
    if longest <= max_side:
        return size
    width, height = (max(1, round(side * max_side / longest)) for side in size)
    return width, height


def crop_back(images: Tensor, size: tuple[int, int], max_side: int = MAX_SIDE) -> Tensor:
    """Takes what `preprocess` padded off images (..., H, W), such as `model.decode` returns.

    `size` is the picture's own (width, height), as Pillow's `image.size`; `max_side` the one given to `preprocess`.
    """
    width, height = kept_size(size, max_side)
    return images[..., :height, :width]


def _reflected(length: int, padded: int) -> np.ndarray:
    """Indices 0 ... length - 1 and on, turning at both ends without repeating them, to `padded` of them."""
    positions = np.arange(padded) % max(1, 2 * length - 2)
    return np.where(positions < length, positions, 2 * length - 2 - positions)


def _resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    short = min(image.size)
    # only the middle square is kept: without the ends of a very long picture, resizing it can't take all memory
    image = _centre_crop(
        image, min(image.width, _near(4 * short, image.width)), min(image.height, _near(4 * short, image.height))
    )
    width, height = (max(size, round(side * size / short)) for side in image.size)
    return _centre_crop(image.resize((width, height), Image.Resampling.BICUBIC), size, size)


def _near(length: int, whole: int) -> int:
    """`length`, or one more, so that cropping `whole` to it centrally takes as much from both ends."""
    return length + (whole - length) % 2


def _centre_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    if image.size == (width, height):
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


Box = tuple[int, int, int, int]  # left, top, right, bottom, in the picture's own pixels


def random_box(width: int, height: int, min_area: float, rng: np.random.Generator) -> Box:
    """Where a training crop of a picture of `width` x `height` pixels lies.

    It covers a random fraction of the area between `min_area` and 1, at a random shape between 3:4 and 4:3 and a random
    place (OpenVision 1). `min_area` 1 is the centre square, which leaves a square picture as it is.
    """
    for _ in range(10 if min_area < 1 else 0):
        area = (min_area + (1 - min_area) * rng.random()) * width * height
        shape = (4 / 3) ** (2 * rng.random() - 1)  # width by height, uniform in its logarithm
        w, h = round((area * shape) ** 0.5), round((area / shape) ** 0.5)
        if 1 <= w <= width and 1 <= h <= height:
            left, top = int(rng.random() * (width - w + 1)), int(rng.random() * (height - h + 1))
            return left, top, left + w, top + h
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def crop(image: np.ndarray, size: int, box: Box) -> np.ndarray:
    """The part of a picture within `box` as uint8 (size, size, 3): uint8 (H, W, 3) resized, bilinear and antialiased.

    A box that is the whole of a picture of that size leaves it as it is.
    """
    if image.shape[:2] == (size, size) and box == (0, 0, size, size):
        return image
    return np.array(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, box=box))


def to_tensor(image: Image.Image | np.ndarray) -> Tensor:
    """An 8-bit RGB picture as a float32 tensor (3, H, W) in [-1, 1]."""
    return from_uint8(torch.from_numpy(np.array(image)).permute(2, 0, 1))


def from_uint8(pixels: Tensor) -> Tensor:
    """uint8 pixels of any shape as float32 in [-1, 1]."""
    return pixels.to(torch.float32) / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] of any shape as uint8: clamped and rounded, never truncated."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """A tensor (3, H, W) in [-1, 1] as an 8-bit RGB picture: clamped and rounded, never truncated."""
    return Image.fromarray(to_uint8(image.detach()).permute(1, 2, 0).cpu().contiguous().numpy())
