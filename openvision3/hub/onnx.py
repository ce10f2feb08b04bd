"""The encoder, alone or behind its VAE, as an ONNX file, and the file run by onnxruntime.

Input `latents` (B, C, h, w), scaled, or `images` (B, 3, H, W) in [-1, 1]; outputs `tokens` (B, N, D) and `pooled`
(B, E), which is not L2-normalised. Any batch; any picture of whole tokens where positions are computed. A stored
position table is fixed to one size: interpolating it has no counterpart in ONNX that gives the same numbers.
"""

import contextlib
import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openvision3.config import AttentionPath, OpenVisionError
from openvision3.hub.verify import own_encoder, random_inputs
from openvision3.model.blocks import SelfAttention
from openvision3.model.openvision3 import OpenVision3

MODEL, DATA, CARD = "model.onnx", "model.onnx.data", "README.md"


class _Exported(nn.Module):
    def __init__(self, model: OpenVision3, through_vae: bool) -> None:
        super().__init__()
        self.encoder, self.vae = model.encoder, model.vae if through_vae else None

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.encoder(inputs if self.vae is None else self.vae.encode(inputs))
        return tokens, self.encoder.pool(tokens)


def export_onnx(model: OpenVision3, folder: Path, through_vae: bool = False, size: int | None = None) -> bool:
    """Writes `model.onnx` (and `model.onnx.data` for weights above 2 GB) and a README into a folder.

    `size`: side of the only pictures that it takes, in pixels; None: any where positions are computed, else the model's
    own. Returns whether it takes any size. Raises `OpenVisionError` where the model cannot be exported.
    """
    require_onnx()
    config, encoder = model.config, own_encoder(model)
    if through_vae and config.input == "pixels":
        raise OpenVisionError(f"model {config.name!r} has no VAE, it reads pixels: --to onnx already takes images")
    step = config.downsampling
    if size is not None and (size < step or size % step):
        raise OpenVisionError(f"--size {size} is not a multiple of {step} pixels")
    if size is None and encoder.positions is not None:
        size = config.image_size
    name = input_name(model, through_vae)
    # two and other sides than square: what is 1 or equal in the example would be taken for constant
    grid = (size // step, size // step) if size is not None else (4, 6)
    example = random_inputs(config, grid, batch=2, images=through_vae)
    dims: dict[int, Any] = {0: torch.export.Dim("batch")}
    if size is None:
        unit = step if name == "images" else config.patch_size
        dims |= {2: unit * torch.export.Dim("rows"), 3: unit * torch.export.Dim("columns")}
    module = _Exported(model, through_vae).eval()
    with _plain_attention(module), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                verbose=False,
                dynamic_shapes=(dims,),
                input_names=[name],
                output_names=["tokens", "pooled"],
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise OpenVisionError(f"torch can't export model {config.name!r}: {_one_line(error)}") from None
    assert program is not None
    vae = config.vae
    program.model.metadata_props.update(
        {"model": config.name, "vae": vae.source, "latents": f"(z - {vae.latent_shift!r}) * {vae.latent_scale!r}"}
        if config.input == "latents"
        else {"model": config.name}
    )
    program.save(folder / MODEL)
    (folder / CARD).write_text(_card(model, name, size), encoding="utf-8")
    return size is None


def input_name(model: OpenVision3, through_vae: bool) -> str:
    """Name of the exported file's input."""
    return "images" if through_vae or model.config.input == "pixels" else "latents"


class OnnxEncoder:
    """An exported file, run by onnxruntime on the CPU. Raises `OpenVisionError` for a file that is none."""

    def __init__(self, path: Path) -> None:
        require_onnx()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own errors have no common base but this
            raise OpenVisionError(f"onnxruntime can't load {path}: {_one_line(error)}") from None
        self.any_size = not isinstance(self.session.get_inputs()[0].shape[2], int)

    def __call__(self, inputs: Tensor) -> dict[str, Tensor]:
        """Latents or images, as the file's only input wants, -> tokens (B, N, D) and pooled (B, E)."""
        names = [output.name for output in self.session.get_outputs()]
        try:
            found = self.session.run(names, {self.session.get_inputs()[0].name: inputs.numpy()})
        except Exception as error:
            raise OpenVisionError(f"onnxruntime can't run the exported encoder: {_one_line(error)}") from None
        return {name: torch.from_numpy(array) for name, array in zip(names, found, strict=True)}


def require_onnx() -> None:
    """Raises `OpenVisionError` where a library of the extra `[onnx]` is missing."""
    for library in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(library) is None:
            raise OpenVisionError(f"ONNX needs {library}, which is not installed: pip install 'openvision3[onnx]'")


@contextlib.contextmanager
def _plain_attention(module: nn.Module) -> Iterator[None]:
    """Attention by matmul and softmax: the same mathematics in the simplest operators, and no choice by length."""
    layers = [layer for layer in module.modules() if isinstance(layer, SelfAttention)]
    paths: list[AttentionPath] = [layer.path for layer in layers]
    for layer in layers:
        layer.path = "matmul"
    try:
        yield
    finally:
        for layer, path in zip(layers, paths, strict=True):
            layer.path = path


def _card(model: OpenVision3, name: str, size: int | None) -> str:
    config = model.config
    step = config.downsampling if name == "images" else config.patch_size
    sides = f"multiples of {step}" if size is None else f"{size // config.downsampling * step}"
    vae = config.vae
    what = (
        "pictures in [-1, 1]"
        if name == "images"
        else f"latents of the VAE {vae.source} as `(z - {vae.latent_shift:g}) * {vae.latent_scale:g}`"
    )
    channels = 3 if name == "images" else config.in_channels
    return (
        f"# {config.name}\n\nAn OpenVision 3 encoder in ONNX. Input `{name}` (B, {channels}, H, W), H and W {sides}: "
        f"{what}, fp32. Outputs: `tokens` (B, N, {config.encoder.width}), row by row, not normalised; `pooled` (B, "
        f"{config.embed_dim}), not L2-normalised. `{DATA}`, where it is there, belongs to `{MODEL}`.\n"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
