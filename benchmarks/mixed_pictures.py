"""Makes a folder of mixed pictures, good and bad, to run `ov3 reconstruct` on.

    python benchmarks/mixed_pictures.py /tmp/mixed --count 1000
    ov3 reconstruct /tmp/mixed --model runs/quickstart/model --batch-size 32

Scenes at sizes from 48 to 700 px a side, most not square, as JPEG, PNG, WebP, BMP, TIFF and GIF; RGB, grey, palette,
CMYK, 16-bit, with transparency, animated, turned by EXIF, 1 x 1. Every 50th is broken in one of five ways; their
number is printed, and `ov3 reconstruct` should name exactly these and exit with 1.
"""

import argparse
import random
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from openvision3.config import SceneConfig
from openvision3.data import demo

FORMATS = ("jpg", "png", "webp", "bmp", "tif", "gif")
KINDS = (*FORMATS, "grey", "palette", "cmyk", "16bit", "alpha", "animated", "exif", "1x1")
BROKEN = ("empty", "text", "truncated", "bomb", "half-header")


def main() -> None:
    """Writes the folder; a given count and seed give the same pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=False)
    rng, broken = random.Random(options.seed), 0
    for index in range(options.count):
        if index % 50 == 49:
            write_broken(options.folder, index, BROKEN[broken % len(BROKEN)])
            broken += 1
        else:
            write_picture(options.folder, index, rng)
    print(f"{options.count} files in {options.folder}, {broken} of them broken")


def write_picture(folder: Path, index: int, rng: random.Random) -> None:
    """Writes one good picture of a random kind and size."""
    kind = rng.choice(KINDS)
    side = rng.choice((48, 96, 128, 128, 200, 256, 256, 480, 700))
    square = demo.render(demo.scene(SceneConfig(), "val", 1, index), side)
    picture = Image.fromarray(square[: rng.choice((side, side * 3 // 4)), : rng.choice((side, side * 2 // 3))])
    path = folder / f"{index:05d}-{kind}"
    if kind in FORMATS:
        picture.save(path.with_suffix(f".{kind}"))
    elif kind == "grey":
        picture.convert("L").save(path.with_suffix(".png"))
    elif kind == "palette":
        picture.quantize(64).save(path.with_suffix(".png"))
    elif kind == "cmyk":
        picture.convert("CMYK").save(path.with_suffix(".jpg"))
    elif kind == "16bit":
        Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(path.with_suffix(".png"))
    elif kind == "alpha":
        picture.putalpha(picture.convert("L"))
        picture.save(path.with_suffix(".png"))
    elif kind == "animated":
        picture.save(path.with_suffix(".gif"), save_all=True, append_images=[picture.rotate(90)], duration=100)
    elif kind == "exif":
        exif = picture.getexif()
        exif[0x0112] = 6  # orientation: turned by 90 degrees
        picture.save(path.with_suffix(".jpg"), exif=exif)
    else:
        picture.resize((1, 1)).save(path.with_suffix(".png"))


def write_broken(folder: Path, index: int, kind: str) -> None:
    """Writes one file that no program can read as a picture, or that none should."""
    path = folder / f"{index:05d}-broken-{kind}.png"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("this is not a picture\n")
    elif kind == "bomb":  # 30,000 x 30,000 pixels in a few kilobytes
        path.write_bytes(_png(30_000, 30_000))
    else:
        Image.fromarray(demo.render(demo.scene(SceneConfig(), "val", 1, index), 256)).save(path)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2 if kind == "truncated" else 20])


def _png(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    packer = zlib.compressobj()
    rows = b"".join(packer.compress(bytes(1 + width)) for _ in range(64)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


if __name__ == "__main__":
    main()
