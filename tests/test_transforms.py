"""Reading any picture file, resizing, cropping, and the way back from tensors."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openvision3.config import OpenVisionError
from openvision3.data import demo
from openvision3.data.transforms import (
    _reduction,
    crop,
    crop_back,
    decode_crops,
    decode_image,
    load_image,
    preprocess,
    random_box,
    to_pil,
    to_tensor,
    to_uint8,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray((rng(seed).random((height, width, 3)) * 256).astype(np.uint8))


def pixels(image: Image.Image) -> list[list[tuple[int, ...]]]:
    array = np.asarray(image)
    return [[tuple(int(v) for v in pixel) for pixel in row] for row in array]


def grey_png(path: Path, width: int, height: int, bits: int, rows: bytes | None = None) -> Path:
    """A grey PNG written by hand; without `rows`, all black, row by row, so that its size costs no memory."""
    compressor = zlib.compressobj(1)
    if rows is None:
        row = bytes(1 + -(-width * bits // 8))
        data = b"".join(compressor.compress(row) for _ in range(height)) + compressor.flush()
    else:
        data = compressor.compress(rows) + compressor.flush()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(OpenVisionError) as caught:
        load_image(path)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def test_missing_empty_and_folder(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    assert refusal(tmp_path / "none.png") == "no such file"
    assert refusal(tmp_path / "empty.png") == "is empty"
    assert refusal(tmp_path) == "is a folder, not a picture"


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "tif"])
def test_truncated(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    noise(64, 64).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "can't be decoded" in refusal(path) or "not a picture" in refusal(path)


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("this is no picture")
    (tmp_path / "page.html").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (tmp_path / "noise.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(200)))
    for name in ("text.jpg", "page.html", "noise.png"):
        assert "not a picture" in refusal(tmp_path / name)


def test_30000_by_30000(tmp_path: Path) -> None:
    path = grey_png(tmp_path / "bomb.png", 30_000, 30_000, bits=1)
    assert path.stat().st_size < 2_000_000
    assert refusal(path).startswith("too large")


def test_the_limit_holds_where_another_library_lifted_pillows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert refusal(grey_png(tmp_path / "bomb.png", 30_000, 30_000, bits=1)).startswith("too large (30000 x 30000")


def test_largest_size_is_checked_before_decoding(tmp_path: Path) -> None:
    """Between Pillow's warning (89 million pixels) and its error (179 million) a picture is read, above it is not."""
    assert refusal(grey_png(tmp_path / "a.png", 13_400, 13_400, bits=1)).startswith("too large")
    assert load_image(grey_png(tmp_path / "b.png", 10_000, 9_000, bits=1)).size == (10_000, 9_000)


def test_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a.tif")
    image = load_image(tmp_path / "a.tif")
    assert image.mode == "RGB" and pixels(image)[0][0] == (0, 255, 255)
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    red, green, blue = pixels(load_image(tmp_path / "a.jpg"))[8][8]
    assert red > 250 and green < 5 and blue < 5


def test_16_bit(tmp_path: Path) -> None:
    """16-bit values are scaled, not clipped: 32896 = 128 * 257 is middle grey."""
    rows = b"\0" + struct.pack(">4H", 0, 257, 32896, 65535)
    image = load_image(grey_png(tmp_path / "a.png", 4, 1, bits=16, rows=rows))
    assert pixels(image)[0] == [(0, 0, 0), (1, 1, 1), (128, 128, 128), (255, 255, 255)]
    Image.fromarray(np.array([[0, 32896, 65535]], dtype=np.uint16)).save(tmp_path / "b.tif")
    assert pixels(load_image(tmp_path / "b.tif"))[0] == [(0, 0, 0), (128, 128, 128), (255, 255, 255)]
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32)).save(tmp_path / "c.tif")
    assert pixels(load_image(tmp_path / "c.tif"))[0] == [(0, 0, 0), (128, 128, 128), (255, 255, 255)]


def test_palette_with_transparency_lies_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "clear.png", transparency=0)
    assert pixels(load_image(tmp_path / "opaque.png")) == [[(255, 0, 0), (0, 0, 255)]]
    assert pixels(load_image(tmp_path / "clear.png")) == [[(255, 255, 255), (0, 0, 255)]]


def test_alpha_lies_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (1, 1), (0, 0, 0, 51)).save(tmp_path / "a.png")
    Image.new("LA", (1, 1), (0, 0)).save(tmp_path / "b.png")
    Image.new("RGB", (1, 1), (9, 9, 9)).save(tmp_path / "c.png", transparency=(9, 9, 9))
    assert pixels(load_image(tmp_path / "a.png")) == [[(204, 204, 204)]]
    assert pixels(load_image(tmp_path / "b.png")) == [[(255, 255, 255)]]
    assert pixels(load_image(tmp_path / "c.png")) == [[(255, 255, 255)]]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animated_gives_its_first_frame(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    first.save(path, save_all=True, append_images=[second], lossless=True)
    assert getattr(Image.open(path), "n_frames", 1) == 2
    assert pixels(load_image(path))[0][0] == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path: Path, orientation: int) -> None:
    """However a camera stored it, the picture comes upright: a 3 x 2 one with four known corners."""
    upright = np.array([[[10, 0, 0], [20, 0, 0], [30, 0, 0]], [[40, 0, 0], [50, 0, 0], [60, 0, 0]]], dtype=np.uint8)
    store = {  # what of the upright picture lies in the file, row by row (TIFF 6.0, Orientation)
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    Image.fromarray(np.ascontiguousarray(store[orientation])).save(path, exif=exif)
    assert np.array_equal(np.asarray(load_image(path)), upright)


def test_1_by_1(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (255, 0, 51)).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png")
    for size in (None, 32):
        tensor = preprocess(image, size)
        assert tensor.shape == (3, size or 16, size or 16)
        assert torch.allclose(tensor[:, 3, 3], torch.tensor([1.0, -1.0, -0.6]), atol=1e-6)


def test_preprocess_resizes_the_short_side_and_crops_the_centre() -> None:
    image = noise(60, 40)
    expected = image.resize((48, 32), Image.Resampling.BICUBIC).crop((8, 0, 40, 32))
    tensor = preprocess(image, 32)
    assert tensor.dtype == torch.float32
    assert np.array_equal(np.asarray(to_pil(tensor)), np.asarray(expected))


@pytest.mark.parametrize("size", [(640, 20), (20, 640)])
def test_preprocess_of_a_long_picture_is_the_same_without_its_ends(size: tuple[int, int]) -> None:
    image = noise(*size)
    scaled = image.resize((size[0] * 32 // 20, size[1] * 32 // 20), Image.Resampling.BICUBIC)
    left, top = (scaled.width - 32) // 2, (scaled.height - 32) // 2
    expected = np.asarray(scaled.crop((left, top, left + 32, top + 32)))
    assert np.array_equal(np.asarray(to_pil(preprocess(image, 32))), expected)


def test_preprocess_of_a_very_long_picture_needs_little_memory() -> None:
    assert preprocess(Image.new("RGB", (1_000_000, 1)), 256).shape == (3, 256, 256)
    assert preprocess(Image.new("RGB", (1_000_000, 1))).shape == (3, 16, 1024)


def test_preprocess_pads_to_whole_tokens_by_reflection_and_crop_back_undoes_it() -> None:
    image = noise(70, 37)
    array, tensor = np.asarray(image), preprocess(image)
    assert tensor.shape == (3, 48, 80)
    whole = np.asarray(to_pil(tensor))
    assert np.array_equal(whole, np.pad(array, ((0, 11), (0, 10), (0, 0)), mode="reflect"))
    assert np.array_equal(whole[37], array[35].tolist() + array[35, -2:-12:-1].tolist())  # the edge itself not twice
    assert np.array_equal(np.asarray(to_pil(crop_back(tensor, image.size))), array)
    batch = crop_back(tensor[None].repeat(2, 1, 1, 1), image.size)
    assert batch.shape == (2, 3, 37, 70)
    assert torch.equal(preprocess(noise(64, 32)), to_tensor(noise(64, 32)))  # nothing to pad


def test_preprocess_pads_to_what_a_model_needs() -> None:
    assert preprocess(noise(70, 37), multiple=32).shape == (3, 64, 96)


@pytest.mark.parametrize("width", [1, 2, 3, 7, 15, 16, 17])
@pytest.mark.parametrize("height", [1, 2, 15])
def test_preprocess_of_tiny_pictures_reflects_as_often_as_it_takes(width: int, height: int) -> None:
    image = noise(width, height)
    tensor, array = preprocess(image), np.asarray(image)
    assert tensor.shape == (3, 16, -(-width // 16) * 16)
    assert np.array_equal(np.asarray(to_pil(crop_back(tensor, image.size))), array)
    period = max(1, 2 * width - 2)
    for x in range(tensor.shape[2]):  # a triangle wave
        column = min(x % period, period - x % period)
        assert np.array_equal(np.asarray(to_pil(tensor))[:height, x], array[:, column])


def test_preprocess_caps_the_longest_side() -> None:
    image = noise(300, 200)
    tensor = preprocess(image, max_side=100)
    assert tensor.shape == (3, 80, 112)
    expected = np.asarray(image.resize((100, 67), Image.Resampling.BICUBIC))
    assert np.array_equal(np.asarray(to_pil(crop_back(tensor, image.size, max_side=100))), expected)
    assert preprocess(noise(40, 2000)).shape == (3, 1024, 32)  # 20 x 1024
    assert preprocess(noise(1024, 16)).shape == (3, 16, 1024)
    for wrong in ({"size": 0}, {"max_side": 0}, {"multiple": 0}):
        with pytest.raises(ValueError, match="at least 1 pixel"):
            preprocess(image, **wrong)


def test_the_python_api_reads_prepares_and_crops_back(tmp_path: Path) -> None:
    """Turned by EXIF, in 16 bits or in CMYK: what comes back has the size of the upright picture."""
    import openvision3 as ov3

    exif = Image.Exif()
    exif[0x0112] = 6
    noise(50, 20).save(tmp_path / "turned.jpg", exif=exif)
    noise(50, 20).convert("CMYK").save(tmp_path / "cmyk.tif")
    grey_png(tmp_path / "deep.png", 50, 20, bits=16)
    for name, (width, height) in {"turned.jpg": (20, 50), "cmyk.tif": (50, 20), "deep.png": (50, 20)}.items():
        image = ov3.load_image(tmp_path / name)
        tensor = ov3.preprocess(image)
        assert tensor.shape == (3, -(-height // 16) * 16, -(-width // 16) * 16)
        assert ov3.crop_back(tensor, image.size).shape == (3, height, width)


def test_to_pil_rounds_and_clamps() -> None:
    every = torch.arange(256, dtype=torch.uint8).repeat(3, 1, 1)
    assert torch.equal(to_uint8(every.float() / 127.5 - 1), every)
    values = torch.tensor([-2.0, -1.0, 0.9 / 127.5 - 1, 0.4 / 127.5 - 1, 1.0, 3.0]).view(1, 1, 6).expand(3, 1, 6)
    assert [p[0] for p in pixels(to_pil(values))[0]] == [0, 0, 1, 0, 255, 255]
    assert torch.equal(to_tensor(to_pil(values)), to_tensor(to_pil(to_tensor(to_pil(values)))))


def random_crop(image: np.ndarray, size: int, min_area: float, rng: np.random.Generator) -> np.ndarray:
    return crop(image, size, random_box(image.shape[1], image.shape[0], min_area, rng))


def test_random_crop_of_the_whole_leaves_a_picture_of_that_size() -> None:
    image = np.asarray(noise(32, 32))
    assert random_crop(image, 32, 1.0, rng()) is image
    wide = np.asarray(noise(48, 32))
    assert np.array_equal(random_crop(wide, 32, 1.0, rng()), wide[:, 8:40])


def test_random_crop_covers_the_stated_area_and_keeps_left_and_right() -> None:
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (256, 256, 3)).copy()
    widths = []
    for seed in range(200):
        row = random_crop(ramp, 64, 0.4, rng(seed))[0, :, 0].astype(int)
        assert (np.diff(row) >= 0).all()
        widths.append((row[-1] - row[0]) / 255)
    # width of a crop of area a and shape s is sqrt(a * s), a in [0.4, 1], s in [3/4, 4/3]
    assert 0.53 < min(widths) < 0.65 and 0.9 < max(widths) <= 1.0
    assert np.array_equal(random_crop(ramp, 64, 0.4, rng(7)), random_crop(ramp, 64, 0.4, rng(7)))


def test_random_crop_is_antialiased() -> None:
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    small = random_crop(stripes, 32, 1.0, rng())
    assert abs(small.astype(int) - 128).max() <= 5  # without: 0 or 255


def landscape_file(
    orientation: int = 1, side: tuple[int, int] = (575, 283), mode: str = "RGB", **how: Any
) -> io.BytesIO:
    """A photograph of odd sides, as a JPEG unless `how` says otherwise."""
    image = demo.landscape(demo.landscapes(held_out=False)[0]).resize(side).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, **{"format": "JPEG", "quality": 90, "exif": exif, **how})
    return file


BOXES = ((0, 0, 150, 140), (10, 5, 283, 278), (90, 70, 280, 270), (1, 2, 70, 68))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_crops_of_a_file_are_those_of_the_whole_picture(orientation: int) -> None:
    file = landscape_file(orientation)
    whole = np.array(decode_image(file, "x"))
    sizes: list[tuple[int, int]] = []

    def boxes(width: int, height: int) -> Any:
        sizes.append((width, height))
        return BOXES

    exact = decode_crops(file, "x", 32, boxes)
    assert sizes == [(whole.shape[1], whole.shape[0])]
    assert all(np.array_equal(part, crop(whole, 32, box)) for part, box in zip(exact, BOXES, strict=True))
    fast = decode_crops(file, "x", 32, boxes, fast=True)
    reductions = [_reduction(box, 32) for box in BOXES]
    assert reductions == [2, 4, 2, 1]
    for part, full, reduction in zip(fast, exact, reductions, strict=True):
        difference = part.astype(float) - full
        assert (difference == 0).all() if reduction == 1 else 0 < (difference**2).mean() < 1.5, reduction  # 46 dB
    alone = [decode_crops(file, "x", 32, lambda *_, box=box: [box], fast=True)[0] for box in BOXES]
    assert all(np.array_equal(a, b) for a, b in zip(fast, alone, strict=True))


def test_a_reduction_leaves_twice_the_pixels() -> None:
    sides = {127: 1, 128: 2, 255: 2, 256: 4, 511: 4, 512: 8, 9999: 8}
    assert {side: _reduction((3, 4, 3 + side, 4 + side), 32) for side in sides} == sides
    assert _reduction((0, 0, 512, 127), 32) == 1


def test_fast_crops_of_other_files() -> None:
    """Grey and CMYK JPEGs are reduced too; other formats are decoded whole; broken ones give the usual error."""
    for mode in ("L", "CMYK"):
        file = landscape_file(mode=mode)
        full, fast = (decode_crops(file, "x", 32, lambda w, h: [(0, 0, h, h)], fast)[0] for fast in (False, True))
        assert 0 < ((fast.astype(float) - full) ** 2).mean() < 1.5
    others: list[dict[str, Any]] = [{"format": "PNG"}, {"format": "WEBP"}, {"format": "PNG", "mode": "RGBA"}]
    for how in others:
        file = landscape_file(**how)
        full, fast = (decode_crops(file, "x", 32, lambda w, h: [(0, 0, h, h)], fast)[0] for fast in (False, True))
        assert np.array_equal(full, fast)
    data = landscape_file().getvalue()
    for broken in (b"", data[:3000], b"x" * 100):
        for fast in (False, True):
            with pytest.raises(OpenVisionError, match="^its jpg: "):
                decode_crops(io.BytesIO(broken), "its jpg", 32, lambda w, h: [(0, 0, h, h)], fast)


def test_broken_files_never_raise_anything_else(tmp_path: Path) -> None:
    """Flipping bytes of real files either still gives a picture, or the one error that users get."""
    draw = rng(3)
    for suffix in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
        buffer = io.BytesIO()
        noise(24, 24).save(buffer, suffix)
        for trial in range(40):
            data = bytearray(buffer.getvalue())
            for _ in range(1 + trial % 6):
                data[int(draw.random() * min(len(data), 200))] = int(draw.random() * 256)
            path = tmp_path / f"{trial}.{suffix}"
            path.write_bytes(data)
            try:
                assert load_image(path).mode == "RGB"
            except OpenVisionError as error:
                assert "\n" not in str(error)


def test_no_other_program_decodes_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would hand PostScript to Ghostscript, whatever the file is called."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was called"))
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n")
    with pytest.raises(OpenVisionError, match="a.jpg: is not a picture of a known format"):
        load_image(tmp_path / "a.jpg")
