"""Prints how far the golden checkpoint's outputs are from the expected ones, through every form that `ov3 convert` has.

    python benchmarks/golden_differences.py

The checkpoint is a tiny encoder of random weights in the released format, with the tokens and pooled embeddings that it
must give. Needs openvision3[eval,onnx,vlm].
"""

import contextlib
import io
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import openvision3
import openvision3.hub.hf
from openvision3 import cli
from openvision3.hub.onnx import OnnxEncoder
from openvision3.hub.open_clip import open_clip_tower
from openvision3.hub.verify import encoder_outputs

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "released-format-tiny"


def main() -> int:
    """Returns 1 where a difference is above its bar."""
    expected, good = load_file(GOLDEN / "expected.safetensors"), True
    print("| through | tokens | pooled | bar |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for name, bar, found in forms(Path(scratch), expected["latents"]):
            tokens, pooled = (float((found[key] - expected[key]).abs().max()) for key in ("tokens", "pooled"))
            print(f"| {name} | {tokens:.1e} | {pooled:.1e} | {bar:g} |")
            good &= max(tokens, pooled) <= bar
    return int(not good)


@torch.no_grad()
def forms(scratch: Path, latents: Tensor) -> Iterator[tuple[str, float, dict[str, Tensor]]]:
    """Each form's name, bar and outputs."""
    yield "`ov3.load`", 1e-5, through_load(GOLDEN, latents)
    own, released = convert(GOLDEN, scratch / "own", "folder"), scratch / "released"
    yield "own folder", 1e-5, through_load(own, latents)
    convert(own, released, "released")
    yield "own folder, and back to the released format", 1e-5, through_load(released, latents)
    tower: Any = open_clip_tower(released)
    pooled, tokens = tower(latents)
    yield "the same, in open_clip's `VisionTransformer`", 1e-5, {"tokens": tokens, "pooled": pooled}
    folder = convert(GOLDEN, scratch / "transformers", "transformers")
    for attention in ("eager", "sdpa"):
        model: Any = openvision3.hub.hf.OpenVision3VisionModel.from_pretrained(folder, attn_implementation=attention)
        output = model(latents=latents)
        found = {"tokens": output.last_hidden_state, "pooled": output.pooler_output}
        yield f"transformers, {attention} attention", 1e-5, found
    exported = OnnxEncoder(convert(GOLDEN, scratch / "onnx", "onnx") / "model.onnx")
    yield "ONNX, onnxruntime", 1e-4, exported(latents)


def through_load(folder: Path, latents: Tensor) -> dict[str, Tensor]:
    """Outputs of a folder that openvision3 loads."""
    return encoder_outputs(openvision3.load(folder, vae=None, device="cpu"), latents)


def convert(source: Path, out: Path, to: str) -> Path:
    """Runs `ov3 convert` without its output."""
    with contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(["convert", str(source), "--out", str(out), "--to", to])
    assert code == 0, (source, to)
    return out


if __name__ == "__main__":
    sys.exit(main())
