"""`ov3 app` under parallel visitors, a tenth of whose uploads are hostile: errors, waiting, memory.

python benchmarks/app_load.py --visitors 8 --seconds 120        (in .venv-app; Linux)

Each visitor uploads a picture and asks for a reconstruction, a caption, labels or a generated picture, again and again.
Hostile uploads: PNGs of a few bytes that claim 40 000 x 40 000 and 9000 x 9000 pixels, a JPEG cut in half, a text named
.png, and 100 MB. Each sender must be told so in one line; each honest request must be answered.
Memory: the server's RSS after a warm-up (every kind of request by every visitor) and 20 s after the end.
"""

import argparse
import collections
import io
import json
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

WORK: dict[str, tuple[Any, ...]] = {
    "reconstruct": (0.3,),
    "caption": (1,),
    "zeroshot": ("panda\napple\nsailboat",),
    "generate": ("a lion by the water", 1, 0, 2.0, 4),
}


def claims(side: int) -> bytes:
    """A PNG of a few bytes whose header claims side x side pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )


def picture(draw: random.Random) -> bytes:
    """A JPEG of 64 to 1600 pixels a side."""
    pixels = np.random.default_rng(draw.randrange(2**31)).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((draw.randint(64, 1600), draw.randint(64, 1600))).save(file, "JPEG")
    return file.getvalue()


def hostile(draw: random.Random) -> tuple[str, str, bytes]:
    """Kind, file name and content."""
    kind = draw.choice(("bomb", "large", "truncated", "wrong type", "100 MB"))
    if kind == "truncated":
        whole = picture(draw)
        return kind, "cut.jpg", whole[: len(whole) // 2]
    content = {"bomb": lambda: claims(40_000), "large": lambda: claims(9000), "wrong type": lambda: b"no picture" * 99}
    return kind, "x.png", content.get(kind, lambda: bytes(100_000_000))()


class Visitors:
    """Counts what was asked and what came back, over threads."""

    def __init__(self, address: str):
        self.address, self.lock = address, threading.Lock()
        self.counts: collections.Counter[str] = collections.Counter()
        self.seconds: list[float] = []
        self.wrong: list[str] = []

    def ask(self, client: httpx.Client, name: str, file: tuple[str, bytes] | None) -> tuple[bool, str]:
        """Uploads and asks; whether it was answered, and the error's line."""
        values: list[Any] = list(WORK[name])
        if file is not None:
            try:
                answer = client.post(f"{self.address}/gradio_api/upload", files={"files": file})
            except (httpx.WriteError, httpx.ReadError):  # closed while much is still being sent
                return False, "the connection was closed"
            if answer.status_code != 200:
                return False, answer.text
            values.insert(0, {"path": answer.json()[0], "orig_name": file[0], "meta": {"_type": "gradio.FileData"}})
        started = client.post(f"{self.address}/gradio_api/call/{name}", json={"data": values})
        started.raise_for_status()
        events = client.get(f"{self.address}/gradio_api/call/{name}/{started.json()['event_id']}").text
        if "event: complete" in events:
            return True, ""
        data = events.split("event: error\ndata: ")[-1].splitlines()[0]
        return False, str((json.loads(data) or {}).get("error", ""))

    def visit(self, seed: int, until: float) -> None:
        """One visitor, until that time (of `time.monotonic`), but each kind of request once."""
        draw = random.Random(seed)
        with httpx.Client(timeout=600) as client:
            for count in range(10**9):
                if count >= len(WORK) + 1 and time.monotonic() > until:
                    return
                bad = draw.random() < 0.1 or count == len(WORK)
                name = list(WORK)[count % len(WORK)] if not bad else draw.choice(("reconstruct", "caption", "zeroshot"))
                kind, file = name, None
                if bad:
                    kind, title, content = hostile(draw)
                    file = (title, content)
                elif name != "generate":
                    file = ("a.jpg", picture(draw))
                begun = time.monotonic()
                try:
                    done, line = self.ask(client, name, file)
                except Exception as error:  # all that goes wrong is a figure here
                    done, line = False, f"{type(error).__name__}: {error}"
                    bad = False
                good = done if not bad else not done and line != "" and "\n" not in line.strip()
                with self.lock:
                    self.counts[("hostile: " if bad else "") + kind] += 1
                    self.seconds.append(time.monotonic() - begun)
                    if not good:
                        self.wrong.append(f"{kind}: {line[:200]!r}")

    def run(self, visitors: int, seconds: float, seed: int) -> None:
        until = time.monotonic() + seconds
        threads = [threading.Thread(target=self.visit, args=(seed + i, until)) for i in range(visitors)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def rss(pid: int) -> float:
    """MiB of memory that a process holds."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visitors", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--warm-up", type=float, default=30)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "openvision3", "app", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        if address not in server.stdout.readline():
            return 1
        try:
            Visitors(address).run(options.visitors, options.warm_up, 1000)
            time.sleep(5)
            before = rss(server.pid)
            load = Visitors(address)
            begun = time.monotonic()
            load.run(options.visitors, options.seconds, 0)
            took = time.monotonic() - begun
            at_end = rss(server.pid)
            time.sleep(20)
            alive = server.poll() is None
            after = rss(server.pid) if alive else float("nan")
        finally:
            server.terminate()
    waits = np.percentile(load.seconds, [50, 95])
    figures = {
        "visitors": options.visitors,
        "seconds": round(took, 1),
        "requests": sum(load.counts.values()),
        "of which": dict(sorted(load.counts.items())),
        "answered wrongly": load.wrong,
        "waiting, median and 95 %, s": [round(float(wait), 2) for wait in waits],
        "rss after warm-up, MiB": round(before),
        "rss at the end, MiB": round(at_end),
        "rss 20 s later, MiB": round(after),
        "growth": round(after / before - 1, 4),
        "alive": alive,
    }
    text = json.dumps(figures, indent=2)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0 if alive and not load.wrong and after <= 1.1 * before else 1


if __name__ == "__main__":
    sys.exit(main())
