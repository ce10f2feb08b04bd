"""Index rate against `tar -t`, and the time to open many tars at a random position and to give the first batch.

    python benchmarks/tar_index.py FOLDER [--tars 1000] [--samples 1000] [--bytes 4000] [--json FILE]

Writes tars of synthetic samples (jpg, txt, json) into FOLDER where there are none yet, then measures, in this order:
`tar -t` over all of them, one after the other; `ov3 data index` with one process, and with one for each processor; and
fresh processes that open all tars, with their index, at a random position of a shuffled turn, and make a batch of 256
there. All figures are with the tars in the page cache (`tar -t` reads all headers first). On a machine that does other
work too, compare the processor seconds.
"""

import argparse
import io
import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

OPENINGS = 5
BATCH = 256
FIRST_BATCH = """
import json, sys, time
begin = time.perf_counter()
from openvision3.config import DataConfig
from openvision3.data.batches import BatchStream
from openvision3.data.shards import open_source
imported = time.perf_counter()
from pathlib import Path
folder, position, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
source = open_source(DataConfig(source=folder, seed=1), "train", 64, Path(sys.argv[4]))
stream = BatchStream(source, None, 64, size, position, position + size, contrastive_length=0, caption_length=0)
batch = next(iter(stream))
assert len(batch.keys) == size
print(json.dumps([imported - begin, time.perf_counter() - imported]))
"""


def main() -> int:
    """Prints the figures; the exit code is 1 where one misses its bar."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tars", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=1000, help="in each tar")
    parser.add_argument("--bytes", type=int, default=2000, help="of padding after each picture's own bytes")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    write_tars(options.folder, options.tars, options.samples, options.bytes)
    tars = sorted(options.folder.glob("*.tar"))
    samples = options.tars * options.samples

    listing, listing_cpu = timed([["tar", "-tf", str(tar)] for tar in tars])
    indexing: dict[int, tuple[float, float]] = {}
    for workers in (1, 0):
        for index in options.folder.glob("*.idx.json"):  # to replace a file, some disks wait until it is written
            index.unlink()
        indexing[workers] = timed([ov3("data", "index", options.folder, "--workers", workers)])
    rng = random.Random(0)
    cache = options.folder / "cache"
    openings = []
    for _ in range(OPENINGS):
        position = rng.randrange(10 * samples)
        command = [sys.executable, "-c", FIRST_BATCH, options.folder, position, BATCH, cache]
        answer = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
        openings.append(json.loads(answer.stdout))
    first_batch = max(opening for _, opening in openings)
    figures = {
        "tars": len(tars),
        "samples": samples,
        "tar_t_tars_per_second": len(tars) / listing,
        "index_tars_per_second_1_process": len(tars) / indexing[1][0],
        "index_tars_per_second": len(tars) / indexing[0][0],
        "index_time_over_tar_t_1_process": indexing[1][0] / listing,
        "index_time_over_tar_t": indexing[0][0] / listing,
        "index_cpu_over_tar_t_1_process": indexing[1][1] / listing_cpu,
        "tar_t_cpu_seconds": listing_cpu,
        "first_batch_seconds": [opening for _, opening in openings],
        "imports_seconds": [imports for imports, _ in openings],
        "first_batch_seconds_worst": first_batch,
    }
    print(json.dumps(figures, indent=2))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if indexing[0][0] <= 2 * listing and first_batch <= 2 else 1


def ov3(*arguments: object) -> list[str]:
    """The command `ov3` with this Python."""
    program = "import sys; from openvision3.cli import main; sys.exit(main())"
    return [sys.executable, "-c", program, *map(str, arguments)]


def timed(commands: list[list[str]]) -> tuple[float, float]:
    """Seconds on the clock that the commands take, one after the other, and processor seconds."""
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    for command in commands:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - begin, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def write_tars(folder: Path, tars: int, samples: int, padding: int) -> None:
    """Writes tars whose samples differ in their keys and texts; pictures are one of 16, with bytes after their end."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.Generator(np.random.PCG64(0))
    pictures = [jpg(rng) + bytes(padding) for _ in range(16)]
    for number in range(tars):
        path = folder / f"{number:06d}.tar"
        if path.exists():
            continue
        parts: list[bytes] = []
        for sample in range(samples):
            key = f"{number:06d}{sample:06d}"
            members = {
                "jpg": pictures[(number + sample) % 16],
                "txt": f"picture {key}".encode(),
                "json": json.dumps({"caption": f"This is {key}. It is synthetic."}).encode(),
            }
            for extension, content in members.items():
                parts += [header(f"{key}.{extension}", len(content)), content, bytes(-len(content) % 512)]
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(b"".join([*parts, bytes(1024)]))
        temporary.replace(path)


def header(name: str, size: int) -> bytes:
    """A ustar header, as tarfile writes it (which takes ten times as long)."""
    fields = f"{name:\0<100}0000644\0000000000\0000000000\000{size:011o}\00000000000000\0"
    rest = "0" + "\0" * 100 + "ustar\x0000" + "\0" * 247
    checksum = sum(fields.encode()) + sum(rest.encode()) + 8 * ord(" ")
    return f"{fields}{checksum:06o}\0 {rest}".encode()


def jpg(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    low = (rng.random((8, 8, 3)) * 255).astype(np.uint8)
    Image.fromarray(low).resize((128, 128)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())
