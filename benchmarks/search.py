"""Makes a folder of many small pictures and measures `ov3 search` on it: the first run, and one that encodes nothing.

    python benchmarks/search.py /tmp/many --count 10000 --model runs/quickstart/model

Pictures are rendered demo scenes as JPEG, all different. A folder that is there already is used as it is: with the same
model the first run then encodes nothing either. Without --model the encoder is a tiny one of random weights: the time
to find a picture is the same. What is counted is printed beside each time.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from openvision3.config import ModelConfig, SceneConfig, TextEncoderConfig, TinyVAEConfig, TransformerConfig, VAEConfig
from openvision3.data import demo

BAR = 0.5  # seconds from the loaded model to the answer


def main() -> int:
    """Returns 1 where a run missed a picture, or the second one encoded one or took longer than `BAR`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--model", default="")
    parser.add_argument("--text", default="a red apple")
    options = parser.parse_args()
    make_pictures(options.folder, options.count, options.size)
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model or str(random_model(Path(scratch) / "model"))
        found = [search(options.folder, options.text, model, Path(scratch) / f"{run}.json") for run in (1, 2)]
    for name, run in zip(("first", "second"), found, strict=True):
        print(
            f"{name} run: {run['pictures']} pictures, {run['encoded']} encoded; answered {run['seconds']:.3f} s after "
            "the model was loaded (weights' fingerprint, listing the folder, reading and checking the cache, encoding, "
            f"saving, the query's embedding, ranking); whole process {run['process']:.1f} s"
        )
    missed = any(run["pictures"] != options.count for run in found)
    return int(missed or found[1]["encoded"] > 0 or found[1]["seconds"] > BAR)


def make_pictures(folder: Path, count: int, size: int) -> None:
    """Renders scenes of the split "val" into 10 subfolders, where the folder is not there yet."""
    if folder.exists():
        return
    for i in range(count):
        path = folder / str(i % 10) / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(demo.render(demo.scene(SceneConfig(), "val", 2, i), size)).save(path, quality=90)


def random_model(folder: Path) -> Path:
    """Saves a model of random weights that reads pictures of 64 pixels and texts."""
    from openvision3.data.tokenizer import demo_tokenizer
    from openvision3.model.openvision3 import OpenVision3
    from openvision3.vae import TinyVAE

    torch.manual_seed(0)
    size, tokenizer = TransformerConfig(64, 2, 2), demo_tokenizer()
    text = TextEncoderConfig(size, tokenizer.vocab_size, 32, tokenizer.pad_id)
    vae = TinyVAE(VAEConfig(licence="MIT"), TinyVAEConfig((8, 8, 8), (1, 1, 1), (8, 8, 8), (1, 1, 1)))
    config = ModelConfig("random", image_size=64, embed_dim=192, encoder=size, text_encoder=text)
    config = dataclasses.replace(config, decoder=None, text_decoder=None)
    vae.freeze()
    OpenVision3(config, vae, tokenizer).save(folder)
    return folder


def search(folder: Path, text: str, model: str, figures: Path) -> dict[str, float]:
    """One `ov3 search` in its own process: its figures, and `process`, its whole time with start and model loading."""
    started = time.monotonic()
    command = [sys.executable, "-m", "openvision3.cli", "search", text, "--images", str(folder), "--model", model]
    subprocess.run([*command, "--json", str(figures)], check=True, stdout=subprocess.DEVNULL)
    return json.loads(figures.read_text()) | {"process": time.monotonic() - started}


if __name__ == "__main__":
    sys.exit(main())
