"""Any frozen picture encoder that gives tokens, behind one protocol: ours, and open_clip's and transformers' towers.

Tokens are the patch outputs of the last block, without class token: before the final norm where the pooled embedding
alone is normalised (CLIP), after it where all tokens are (SigLIP), as in transformers' `last_hidden_state`.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openvision3.config import ExternalEncoderConfig, OpenVisionError, TransformerConfig
from openvision3.hub.load import load, model_folder
from openvision3.hub.released import is_released_folder, read_state, weight_patterns
from openvision3.model.folder import read_json
from openvision3.model.openvision3 import OpenVision3
from openvision3.vae import FrozenVAE

Kind = Literal["openvision3", "open_clip", "transformers"]
OPEN_CLIP_CONFIG, CONFIG = "open_clip_config.json", "config.json"
_TRANSFORMERS_TYPES = ("clip", "clip_vision_model", "siglip", "siglip_vision_model")
_MEANS, _STDS = (-1e6, 1e6), (1e-6, 1e6)  # what a folder may say of the pixels
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class TokenEncoder(Protocol):
    """A frozen encoder of pictures: always in eval mode, no gradient to its weights."""

    name: str
    size: TransformerConfig  # of its blocks; tokens have the width `size.width`
    native_size: int | None  # side of the pictures that it reads (another library's resizes others); None: any

    @property
    def width(self) -> int:
        """D of the tokens."""
        ...

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Token rows and columns of a picture of that size in pixels."""
        ...

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] -> tokens (B, N, D), row by row. Raises `ValueError` for other shapes."""
        ...


class FrozenEncoder(nn.Module):
    """What the adapters share: frozen weights, eval mode whatever is asked for, no graph."""

    def __init__(self, name: str, size: TransformerConfig, native_size: int | None, tower: nn.Module) -> None:
        super().__init__()
        self.name, self.size, self.native_size, self.tower = name, size, native_size, tower
        self.eval().requires_grad_(False)

    @property
    def width(self) -> int:
        return self.size.width

    def train(self, mode: bool = True) -> "FrozenEncoder":
        return super().train(False)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        return self._tokens(pixels.to(next(self.tower.parameters())))

    def _tokens(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError


class OpenVisionEncoder(FrozenEncoder):
    """One of our models with its VAE (own training or released weights), on pictures of any size.

    One that is built on another library's encoder reads pictures of its own size alone.
    """

    tower: OpenVision3

    def __init__(self, model: OpenVision3) -> None:
        native_size = model.config.image_size if model.config.external is not None else None
        super().__init__(model.config.name, model.config.encoder, native_size, model)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        step = self.tower.config.downsampling
        return height // step, width // step

    def _tokens(self, pixels: Tensor) -> Tensor:
        return self.tower.encode(pixels)


class ForeignEncoder(FrozenEncoder):
    """A vision tower of another library, with its own size and normalisation of pictures.

    `patches(tower, pixels)` gives its tokens (B, N, D). Raises `OpenVisionError` for a tower whose tokens are no square
    grid of width `size.width`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        size: TransformerConfig,
        native_size: int,
        tower: nn.Module,
        patches: Callable[[Any, Tensor], Tensor],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__(name, size, native_size, tower)
        self.patches, self._side = patches, native_size
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        try:
            shape = tuple(self(torch.zeros(1, 3, native_size, native_size)).shape)
        except Exception as error:  # the tower's code is another library's
            raise OpenVisionError(f"{name} reads no picture of {native_size} pixels: {_one_line(error)}") from None
        side = math.isqrt(shape[1]) if len(shape) == 3 else 0
        if len(shape) != 3 or shape != (1, side * side, size.width):
            raise OpenVisionError(
                f"{name}: its tokens have shape {shape}: expected a square grid of width {size.width}"
            )
        self._grid = (side, side)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return self._grid

    def _tokens(self, pixels: Tensor) -> Tensor:
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] != pixels.shape[3]:
            raise ValueError(f"expected square pictures (B, 3, S, S), got {tuple(pixels.shape)}")
        x = (pixels.float() + 1) / 2
        if x.shape[-1] != self._side:
            x = F.interpolate(x, (self._side, self._side), mode="bicubic", antialias=True).clamp(0, 1)
        return self.patches(self.tower, ((x - self.mean) / self.std).to(pixels.dtype))


def load_token_encoder(
    source: str | Path,
    vae: FrozenVAE | Literal["auto"] | None = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> FrozenEncoder:
    """Loads a frozen encoder from a folder or hub id: its files say of what kind it is (see `encoder_kind`).

    `vae` is for ours: "auto", its own. Weights are safetensors, or a `.bin` read by torch's loader that builds tensors
    and nothing else. Raises `OpenVisionError` with one line where the folder is of no known kind, is broken, or its
    library is not installed.
    """
    folder = model_folder(str(source))
    kind = encoder_kind(folder)
    if kind == "openvision3":
        return OpenVisionEncoder(load(folder, vae, device, dtype))
    encoder = _open_clip_encoder(folder) if kind == "open_clip" else _transformers_encoder(folder)
    return encoder.to(device=device, dtype=dtype)


def encoder_kind(folder: Path) -> Kind:
    """Whose encoder a folder holds, by its files; raises `OpenVisionError` for a folder of no known kind."""
    if is_released_folder(folder):
        vision = _table(_table(read_json(folder / OPEN_CLIP_CONFIG).get("model_cfg")).get("vision_cfg"))
        ours = {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}
        return "openvision3" if all(vision.get(name) == value for name, value in ours.items()) else "open_clip"
    if not (folder / CONFIG).is_file():
        raise OpenVisionError(f"{folder} holds no encoder: it has neither {CONFIG} nor {OPEN_CLIP_CONFIG}")
    config = read_json(folder / CONFIG)
    if "format_version" in config:
        return "openvision3"
    if config.get("model_type") in _TRANSFORMERS_TYPES:
        return "transformers"
    raise OpenVisionError(
        f"{folder / CONFIG}: model_type {config.get('model_type')!r} is no encoder known here; expected a model folder "
        f"of openvision3, or model_type {', '.join(_TRANSFORMERS_TYPES)}"
    )


def load_external(config: ExternalEncoderConfig, device: torch.device | str, dtype: torch.dtype) -> FrozenEncoder:
    """Loads the encoder that a model names; raises `OpenVisionError` where it can't be had or has other weights."""
    try:
        folder = model_folder(config.source)
        if config.sha256 and (found := weights_sha256(folder)) != config.sha256:
            raise OpenVisionError(f"{folder}: the weights' sha256 is {found}, expected {config.sha256}")
        return load_token_encoder(folder, device=device, dtype=dtype)
    except OpenVisionError as error:
        raise OpenVisionError(f"{error} (the encoder that the model's config.json names as external.source)") from None


def weights_sha256(folder: Path) -> str:
    """sha256 (hex) of a folder's weights; raises `OpenVisionError` where there are none."""
    patterns = weight_patterns(folder)
    for pattern in patterns:
        if files := sorted(folder.glob(pattern)):
            digest = hashlib.sha256()
            for path in files:
                with path.open("rb") as file:
                    while chunk := file.read(1 << 20):
                        digest.update(chunk)
            return digest.hexdigest()
    raise OpenVisionError(f"{folder} has no weights; expected one of {', '.join(patterns)}")


def _transformers_encoder(folder: Path) -> ForeignEncoder:
    try:
        import transformers
    except ImportError:
        raise OpenVisionError(_install(folder, "transformers", "vlm")) from None
    from transformers.utils import logging

    siglip = str(read_json(folder / CONFIG)["model_type"]).startswith("siglip")
    cls: Any = transformers.SiglipVisionModel if siglip else transformers.CLIPVisionModel
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        tower, found = cls.from_pretrained(
            folder, output_loading_info=True, local_files_only=True, weights_only=True, dtype=torch.float32
        )
    except Exception as error:  # the library, torch and safetensors raise errors of many kinds
        raise OpenVisionError(f"{folder} can't be loaded: {_one_line(error)}") from None
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    if missing := sorted(found["missing_keys"]):  # else they would stay random
        raise OpenVisionError(f"{folder}: the weights lack {missing[0]}")
    sizes = tower.config
    size = TransformerConfig(
        sizes.hidden_size, sizes.num_hidden_layers, sizes.num_attention_heads, sizes.intermediate_size
    )
    default = ((0.5,) * 3, (0.5,) * 3) if siglip else (_CLIP_MEAN, _CLIP_STD)
    mean, std = _normalisation(folder / "preprocessor_config.json", "image_mean", "image_std", default)
    first = 0 if siglip else 1  # CLIP's class token

    def patches(tower: Any, pixels: Tensor) -> Tensor:
        return tower(pixel_values=pixels).last_hidden_state[:, first:]

    return ForeignEncoder(folder.name, size, sizes.image_size, tower, patches, mean, std)


def _open_clip_encoder(folder: Path) -> ForeignEncoder:
    try:
        from open_clip.model import CLIPVisionCfg, _build_vision_tower
    except ImportError:
        raise OpenVisionError(_install(folder, "open_clip_torch", "eval")) from None
    path = folder / OPEN_CLIP_CONFIG
    try:
        config = read_json(path)["model_cfg"]
        vision = CLIPVisionCfg(**config["vision_cfg"] | {"timm_model_pretrained": False, "output_tokens": False})
        tower: Any = _build_vision_tower(int(config["embed_dim"]), vision, bool(config.get("quick_gelu", False)))
        size, native = _open_clip_size(tower, vision), _square(vision.image_size)
    except Exception as error:  # a config's mistake shows up anywhere in the two libraries
        raise OpenVisionError(
            f"{path} describes no vision transformer that open_clip builds: {_one_line(error)}"
        ) from None
    try:
        tower.load_state_dict(read_state(folder))
    except RuntimeError as error:
        raise OpenVisionError(f"{folder}: the weights do not fit {path.name}: {_one_line(error)}") from None
    normalise = bool(vision.timm_model_name)  # SigLIP's

    def patches(tower: Any, pixels: Tensor) -> Tensor:
        found = tower.forward_intermediates(
            pixels, indices=1, normalize_intermediates=normalise, intermediates_only=True, output_fmt="NLC"
        )
        return found["image_intermediates"][-1]

    mean, std = _normalisation(path, "mean", "std", (_CLIP_MEAN, _CLIP_STD))
    return ForeignEncoder(folder.name, size, native, tower, patches, mean, std)


def _open_clip_size(tower: Any, vision: Any) -> TransformerConfig:
    if vision.timm_model_name:
        block = tower.trunk.blocks[0]
        width, depth = tower.trunk.embed_dim, len(tower.trunk.blocks)
        return TransformerConfig(width, depth, block.attn.num_heads, block.mlp.fc1.out_features)
    heads = vision.width // vision.head_width
    return TransformerConfig(vision.width, int(vision.layers), heads, int(vision.width * vision.mlp_ratio))


def _square(size: Any) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"image_size {size} is not square")
    return int(sides.pop())


def _normalisation(
    path: Path, mean: str, std: str, default: tuple[Sequence[float], Sequence[float]]
) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of the pixels in [0, 1] that an encoder was trained with, from its folder."""
    config = read_json(path) if path.is_file() else {}
    config = _table(config.get("preprocess_cfg")) if path.name == OPEN_CLIP_CONFIG else config
    values = (config.get(mean, default[0]), config.get(std, default[1]))
    for name, value, (low, high) in zip((mean, std), values, (_MEANS, _STDS), strict=True):
        numbers = value if isinstance(value, list | tuple) else []
        fit = [type(v) in (int, float) and low <= v <= high for v in numbers]
        if fit != [True] * 3:
            raise OpenVisionError(f"{path}: {name} must be three numbers from {low:g} to {high:g}, got {value!r}")
    return values


def _table(value: Any) -> dict[str, Any]:
    """A part of a config that should be a table of fields; empty where it is anything else."""
    return value if isinstance(value, dict) else {}


def _install(folder: Path, library: str, extra: str) -> str:
    return f"{folder} needs {library}, which is not installed: pip install 'openvision3[{extra}]'"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
