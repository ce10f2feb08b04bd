"""The authors' released encoders (UCSC-VLAA/openvision3-vit-*) and their key names, in open_clip's format.

A released folder holds `open_clip_config.json` and the weights of the vision tower: no decoder, no text tower. Its
names, with or without the prefix `visual.`, and ours (B = `transformer.resblocks.{i}.` there,
`encoder.transformer.blocks.{i}.` here):

| released | here | |
|---|---|---|
| conv1.weight | encoder.patch_embed.weight | |
| class_embedding | encoder.class_token | |
| positional_embedding | encoder.positions | class row first; left out where the sine-cosine formula gives it |
| B ln_1, ln_2 | B norm_1, norm_2 | |
| B attn.in_proj_weight, in_proj_bias | B attention.qkv.weight, bias | queries, keys, values in this order |
| B attn.out_proj | B attention.out | |
| B mlp.c_fc, mlp.c_proj | B mlp.up, mlp.down | |
| ln_post | encoder.pool_norm | |
| proj | encoder.projection.weight | transposed |

`hub/open_clip.py` writes such folders. What the layout cannot say is then under the key `openvision3` of the config
(which open_clip does not read): "vae", where it is not FLUX.1's as released, and "positions", where they are scaled.
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from openvision3.config import ModelConfig, OpenVisionError, TransformerConfig, VAEConfig, from_dict
from openvision3.model.blocks import check_transformer, sincos_positions
from openvision3.model.folder import read_json
from openvision3.model.openvision3 import INITIAL_LOGIT_SCALE, OpenVision3, check_model
from openvision3.vae import FrozenVAE, load_vae
from openvision3.vae_diffusers import flux_config

CONFIG, EXTRA = "open_clip_config.json", "openvision3"
_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",  # last: beside one of the others, it is transformers'
)
_OTHER_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # of our own folders, and of transformers'
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_POSITION_TOLERANCE = 1e-5  # a table this close to the formula is the formula, computed in other software

_BLOCK_NAMES = {
    "ln_1.weight": "norm_1.weight",
    "ln_1.bias": "norm_1.bias",
    "ln_2.weight": "norm_2.weight",
    "ln_2.bias": "norm_2.bias",
    "attn.in_proj_weight": "attention.qkv.weight",
    "attn.in_proj_bias": "attention.qkv.bias",
    "attn.out_proj.weight": "attention.out.weight",
    "attn.out_proj.bias": "attention.out.bias",
    "mlp.c_fc.weight": "mlp.up.weight",
    "mlp.c_fc.bias": "mlp.up.bias",
    "mlp.c_proj.weight": "mlp.down.weight",
    "mlp.c_proj.bias": "mlp.down.bias",
}


def released_names(depth: int) -> Iterator[tuple[str, str]]:
    """Yields (released name, name here) of every tensor of a tower with `depth` blocks."""
    yield "conv1.weight", "encoder.patch_embed.weight"
    yield "class_embedding", "encoder.class_token"
    yield "positional_embedding", "encoder.positions"
    for index in range(depth):
        for there, here in _BLOCK_NAMES.items():
            yield f"transformer.resblocks.{index}.{there}", f"encoder.transformer.blocks.{index}.{here}"
    yield "ln_post.weight", "encoder.pool_norm.weight"
    yield "ln_post.bias", "encoder.pool_norm.bias"
    yield "proj", "encoder.projection.weight"


def is_released_folder(folder: Path) -> bool:
    """Whether a folder holds a checkpoint in the released format."""
    return (folder / CONFIG).is_file()


def load_released(
    folder: str | Path,
    vae: FrozenVAE | Literal["auto"] | None = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> OpenVision3:
    """Loads a folder in the released format into a model with an encoder alone, in eval mode and fp32 (or `dtype`).

    vae "auto": FLUX.1's, with the convention that the weights were trained with (no shift). A `.bin` is read by torch's
    loader that builds tensors and nothing else. Raises `OpenVisionError` for a folder that does not fit.
    """
    folder = Path(folder)
    config = read_released_config(folder)
    state = read_state(folder)
    names = dict(released_names(config.encoder.depth))
    if missing := [name for name in names if name not in state]:
        raise OpenVisionError(f"{folder}: the weights lack {missing[0]}")
    if surplus := sorted(state.keys() - names.keys()):
        raise OpenVisionError(f"{folder}: the weights hold {surplus[0]}, which {CONFIG} does not describe")
    if strange := [name for name, tensor in state.items() if not tensor.is_floating_point()]:
        raise OpenVisionError(f"{folder}: {strange[0]} holds {state[strange[0]].dtype}, not floating-point numbers")

    ours = {here: state[there].to(dtype=dtype or torch.float32) for there, here in names.items()}
    if ours["encoder.projection.weight"].ndim == 2:
        ours["encoder.projection.weight"] = ours["encoder.projection.weight"].T.contiguous()
    if _is_formula(state["positional_embedding"], config):
        del ours["encoder.positions"]
    else:
        config = dataclasses.replace(config, stored_positions=True)
    with torch.device("meta"):
        model = OpenVision3(config)
    rest = {"logit_scale": torch.tensor(INITIAL_LOGIT_SCALE), "token_rms": torch.ones(())}
    for name, tensor in model.state_dict().items():
        if name in ours and ours[name].shape != tensor.shape:
            raise OpenVisionError(
                f"{folder}: {name} has shape {tuple(ours[name].shape)}, {CONFIG} needs {tuple(tensor.shape)}"
            )
    model.load_state_dict(ours | rest, assign=True)
    model.to(device)
    if vae == "auto":
        vae = load_vae(config.vae, device, dtype or torch.float32) if config.input == "latents" else None
    if vae is not None:
        model.attach_vae(vae)
    return model.eval()


def read_released_config(folder: Path) -> ModelConfig:
    """The `ModelConfig` of a released folder's `open_clip_config.json`; raises `OpenVisionError` for other towers."""
    path = folder / CONFIG
    if not path.is_file():
        raise OpenVisionError(f"{path} does not exist")
    data = read_json(path)
    try:
        model, vision = data["model_cfg"], data["model_cfg"]["vision_cfg"]
        width, depth = int(vision["width"]), int(vision["layers"])
        channels, patch = int(vision.get("in_channels", 3)), int(vision["patch_size"])
        size, head_width = int(vision["image_size"]), int(vision.get("head_width", 64))
        mlp_width = int(width * float(vision.get("mlp_ratio", 4.0)))
        eps = float((vision.get("norm_kwargs") or {}).get("eps", 1e-5))
        embed_dim = int(model["embed_dim"])
        act, extra = vision.get("act_kwargs") or {}, data.get(EXTRA, {})
        vae = from_dict(VAEConfig, extra["vae"], f"{path}: vae") if "vae" in extra else flux_config("released")
        positions = "scaled" if extra.get("positions") == "scaled" else "computed"
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise OpenVisionError(f"{path} does not describe a released encoder: {error!r}") from None
    required: dict[str, Any] = {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}
    for name, value in required.items():
        if vision.get(name) != value:
            raise OpenVisionError(f"{path}: {name} is {vision.get(name)!r}, OpenVision 3's encoders have {value!r}")
    if model.get("quick_gelu") or vision.get("timm_model_name"):
        raise OpenVisionError(f"{path} describes another architecture (quick_gelu or a timm model)")
    if min(width, depth, channels, patch, size, head_width, embed_dim) < 1 or width % head_width:
        raise OpenVisionError(
            f"{path}: sizes must be positive, and width {width} a multiple of head_width {head_width}"
        )
    if act not in ({}, {"approximate": "none"}, {"approximate": "tanh"}):
        raise OpenVisionError(f"{path}: act_kwargs {act!r} is no activation known here")
    activation = "gelu_tanh" if act == {"approximate": "tanh"} else "gelu"
    pixels = channels == 3
    config = ModelConfig(
        name=folder.name,
        input="pixels" if pixels else "latents",
        in_channels=channels,
        patch_size=patch,
        image_size=size if pixels else size * vae.factor,  # stated in the units of the tower's input
        embed_dim=embed_dim,
        encoder=TransformerConfig(width, depth, width // head_width, mlp_width, activation, eps),
        positions=positions,
        decoder=None,
        text_encoder=None,
        text_decoder=None,
        vae=VAEConfig() if pixels else vae,
    )
    try:  # before anything is made in these sizes
        check_model(config)
        check_transformer(config.encoder)
    except OpenVisionError as error:
        raise OpenVisionError(f"{path}: {error}") from None
    return config


def weight_patterns(folder: Path) -> tuple[str, ...]:
    """Patterns of the files that may hold a folder's weights; the first that fits counts."""
    return _WEIGHTS if is_released_folder(folder) else _OTHER_WEIGHTS


def download(repo_id: str) -> Path:
    """The local snapshot of a hub repository, downloaded where needed: its JSON and one copy of its weights.

    Raises `OpenVisionError` without it.
    """
    if not _HUB_ID.fullmatch(repo_id):
        raise OpenVisionError(
            f"{repo_id!r} is neither a folder nor a hub id such as UCSC-VLAA/openvision3-vit-base-patch2-32"
        )
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo_id, allow_patterns=["*.json", "README.md"]))
        for pattern in weight_patterns(folder):
            folder = Path(snapshot_download(repo_id, allow_patterns=["*.json", "README.md", pattern]))
            if any(folder.glob(pattern)):
                break
        return folder
    except Exception as error:  # the hub client raises its own, httpx's and the system's errors
        reason = " ".join(str(error).split())[:200]
        raise OpenVisionError(
            f"{repo_id} can't be had from the hub: {reason}. Check the name, or download it where there is a "
            "network and pass its folder"
        ) from None


def read_state(folder: Path) -> dict[str, Tensor]:
    """The vision tower's tensors of a folder in open_clip's format, without the prefix `visual.`."""
    path = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise OpenVisionError(f"{folder} has no weights; expected one of {', '.join(_WEIGHTS)}")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can make its reader raise almost anything
        raise OpenVisionError(f"{path} can't be read: {' '.join(str(error).split())[:200]}") from None
    check_tensors(path, state)
    tower = {name.removeprefix("visual."): tensor for name, tensor in state.items() if name.startswith("visual.")}
    return tower or state


def check_tensors(path: Path, state: Any) -> None:
    """Raises `OpenVisionError` where what a pickle gave is no table of tensors whose numbers are all in the file.

    A small pickle can call one number a tensor of any size: a copy of that would ask for all the memory.
    """
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise OpenVisionError(f"{path} is refused: it is not a plain table of tensors")
    for name, tensor in state.items():
        dense = tensor.layout == torch.strided and not tensor.is_meta
        if not dense or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise OpenVisionError(f"{path} is refused: the file does not hold all the numbers of {name}")


def _is_formula(table: Tensor, config: ModelConfig) -> bool:
    side = config.image_size // config.downsampling
    if table.shape != (side * side + 1, config.encoder.width):
        return False  # the check of shapes names it
    expected = torch.cat([torch.zeros(1, table.shape[1]), sincos_positions((side, side), table.shape[1])])
    return bool((table.float() - expected).abs().max() <= _POSITION_TOLERANCE)
