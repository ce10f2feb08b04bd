"""Encoders out to the released layout, which is open_clip's for a vision tower, and open_clip's tower to check them.

The two are one: `open_clip_config.json` and the tensors that `hub/released.py` lists, without prefix. open_clip's class
for it is `VisionTransformer`; its config has no `in_channels` (the authors added it), so that `open_clip_tower` gives
the tower its first convolution.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from openvision3.config import Activation, ModelConfig, OpenVisionError, to_dict
from openvision3.hub.released import CONFIG, EXTRA, read_state, released_names
from openvision3.hub.verify import own_encoder
from openvision3.model.openvision3 import OpenVision3
from openvision3.vae import TinyVAE, load_tiny_vae
from openvision3.vae_diffusers import flux_config

WEIGHTS, PICKLE, CARD = "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "README.md"

_ACTIVATIONS: dict[Activation, dict[str, Any]] = {"gelu": {}, "gelu_tanh": {"act_kwargs": {"approximate": "tanh"}}}


def released_config(config: ModelConfig) -> dict[str, Any]:
    """`open_clip_config.json` of an encoder; raises `OpenVisionError` for one that the layout cannot express."""
    size, refused = config.encoder, f"model {config.name!r} can't be written in the released layout: "
    if config.input == "pixels" or config.in_channels == 3:
        raise OpenVisionError(
            refused + "it reads 3 channels of pixels; the layout is of encoders that read VAE latents"
        )
    if size.activation not in _ACTIVATIONS:
        raise OpenVisionError(
            refused + f"activation {size.activation!r}; the layout has {' and '.join(_ACTIVATIONS)} "
            "(such a model has to be trained with --model.encoder.activation gelu)"
        )
    vision = {
        "image_size": config.image_size // config.vae.factor,  # in latents
        "layers": size.depth,
        "width": size.width,
        "head_width": size.width // size.num_heads,
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "no_ln_pre": True,
        "pool_type": "avg",
        "final_ln_after_pool": True,
        "output_tokens": True,
        "norm_kwargs": {"eps": size.norm_eps},
    } | _ACTIVATIONS[size.activation]
    if size.mlp_width not in (0, 4 * size.width):
        vision["mlp_ratio"] = _mlp_ratio(size.width, size.mlp_width)
    return {
        "model_cfg": {"embed_dim": config.embed_dim, "vision_cfg": vision},
        "preprocess_cfg": {
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "interpolation": "bilinear",
            "resize_mode": "squash",
        },
    }


def released_state(model: OpenVision3) -> dict[str, Tensor]:
    """The encoder's tensors under their released names, with the position table of the model's own size."""
    encoder, side = own_encoder(model), model.config.image_size // model.config.downsampling
    of_class, of_patches = encoder.position_table((side, side))
    first = torch.zeros_like(of_patches[0]) if of_class is None else of_class
    ours = model.state_dict() | {"encoder.positions": torch.cat([first[None], of_patches])}
    ours["encoder.projection.weight"] = ours["encoder.projection.weight"].T
    return {there: ours[here].detach() for there, here in released_names(model.config.encoder.depth)}


def save_released(model: OpenVision3, folder: Path, dtype: torch.dtype = torch.float32, pickle: bool = False) -> None:
    """Writes the encoder into an empty folder in the released layout.

    `pickle`: also as `open_clip_pytorch_model.bin`, the name that the authors published. The position table stays fp32
    in any `dtype`: rounded, it would no longer be the formula's, which works at every size. Raises `OpenVisionError`
    for a model that the layout cannot express, or values that `dtype` cannot hold.
    """
    own_encoder(model)
    description = released_config(model.config)
    if extra := _beyond_layout(model):
        description[EXTRA] = extra
    state = {}
    for name, tensor in released_state(model).items():
        cast = tensor.cpu().to(torch.float32 if name == "positional_embedding" else dtype)
        if not torch.isfinite(cast).all() and torch.isfinite(tensor).all():
            raise OpenVisionError(f"{name} holds values that {dtype} cannot; choose another --dtype")
        state[name] = cast.contiguous()
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    if pickle:
        torch.save(state, folder / PICKLE)
    (folder / CARD).write_text(_card(model.config), encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def open_clip_tower(folder: Path) -> nn.Module | None:
    """open_clip's `VisionTransformer` with a released folder's weights, loaded strict, fp32; None without open_clip.

    It takes scaled latents (B, C, h, w) of the config's size and gives (pooled (B, E), tokens (B, N, D)). Raises
    `OpenVisionError` where open_clip cannot build it or the weights do not fit.
    """
    try:
        from open_clip.model import CLIPVisionCfg, _build_vision_tower
    except ImportError:
        return None
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model_cfg"]
    vision = {name: value for name, value in config["vision_cfg"].items() if name in CLIPVisionCfg.__dataclass_fields__}
    channels = config["vision_cfg"].get("in_channels", 3)
    try:
        with torch.device("meta"):
            tower: Any = _build_vision_tower(config["embed_dim"], CLIPVisionCfg(**vision))
            patch = tower.conv1.kernel_size
            tower.conv1 = nn.Conv2d(channels, tower.conv1.out_channels, patch, stride=patch, bias=False)
        state = {name: tensor.float() for name, tensor in read_state(folder).items()}
        tower.load_state_dict(state, strict=True, assign=True)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OpenVisionError(f"open_clip's vision tower does not take {folder}: {reason}") from None
    return tower.eval().requires_grad_(False)


def _mlp_ratio(width: int, mlp_width: int) -> float:
    """The ratio that `int(width * ratio)`, as open_clip computes it, turns into exactly `mlp_width`."""
    ratio = mlp_width / width
    return ratio if int(width * ratio) == mlp_width else math.nextafter(ratio, math.inf)


def _beyond_layout(model: OpenVision3) -> dict[str, Any]:
    """What a reader needs and the layout has no place for: another VAE, scaled positions."""
    config, vae = model.config, model.config.vae
    if isinstance(model.vae, TinyVAE) and not _is_embedded(model.vae):
        vae = dataclasses.replace(vae, source=f"the VAE of {config.name}")  # no other may silently take its place
    extra: dict[str, Any] = {} if vae == flux_config("released") else {"vae": to_dict(vae)}
    return extra | ({"positions": "scaled"} if config.positions == "scaled" else {})


def _is_embedded(vae: TinyVAE) -> bool:
    ours, embedded = vae.state_dict(), load_tiny_vae().state_dict()
    return ours.keys() == embedded.keys() and all(torch.equal(ours[name].float(), embedded[name]) for name in ours)


def _card(config: ModelConfig) -> str:
    vae, side = config.vae, config.image_size // config.vae.factor
    return (
        f"# {config.name}\n\nThe encoder of an OpenVision 3 model in the layout of the released weights (open_clip's "
        f"`VisionTransformer` with {config.in_channels} input channels). Its input is latents of the VAE {vae.source} "
        f"({vae.kind}) as `(z - {vae.latent_shift:g}) * {vae.latent_scale:g}`, {config.in_channels} x {side} x {side} "
        f"for pictures of {config.image_size} x {config.image_size} pixels. Load it with `openvision3.load(folder)`.\n"
    )
