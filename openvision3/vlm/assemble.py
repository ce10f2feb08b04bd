"""A frozen encoder, a projector and a language model put together as transformers' LLaVA, with its processor."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import openvision3.hub.hf as hf
from openvision3.config import OpenVisionError
from openvision3.hub.load import load
from openvision3.vlm.conversation import IMAGE
from openvision3.vlm.folder import VLM

_FOREIGN = {"clip": True, "clip_vision_model": True, "siglip": False, "siglip_vision_model": False}  # has a class token
_ROWS = 64  # the embedding's rows come in multiples of this, as LLaVA's
# Turns content that is a list of parts into text; the language model's own template follows.
_PARTS = """{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set text = namespace(value='') -%}
{%- if message['content'] is string -%}
{%- set text.value = message['content'] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{%- set text.value = text.value + '<image>\\n' -%}
{%- else -%}
{%- set text.value = text.value + part['text'] -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- set flat.messages = flat.messages + [{'role': message['role'], 'content': text.value}] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""


@dataclass(frozen=True)
class Tower:
    """A vision encoder of transformers, and what LLaVA must know of it."""

    model: Any
    side: int  # pixels
    patch: int  # pixels
    mean: tuple[float, ...]
    std: tuple[float, ...]
    layer: int  # the hidden state that is used
    class_token: bool

    @property
    def tokens(self) -> int:
        """Of a picture, without the class token, which is left out."""
        return (self.side // self.patch) ** 2


def open_tower(name: str, resolution: int = 0) -> Tower:
    """A model of openvision3 (folder, hub id, "demo"), or a folder of transformers' CLIP or SigLIP.

    As LLaVA does: of CLIP the last hidden state but one, without the class token; of the others the last, whole. The
    patch is 16 pixels of VAE and ViT together for OpenVision 3. Raises `OpenVisionError` for anything else.
    """
    if foreign := _foreign_kind(Path(name).expanduser()):
        return _foreign_tower(Path(name).expanduser(), foreign, resolution)
    ours = load(name)
    patch, side = ours.config.downsampling, resolution or ours.config.image_size
    if side % patch:
        raise OpenVisionError(f"resolution is {side}: expected a multiple of {patch}")
    half = (0.5, 0.5, 0.5)
    return Tower(hf.to_transformers(ours, vision_only=True), side, patch, half, half, -1, class_token=False)


def _foreign_kind(folder: Path) -> str:
    """`model_type` of a folder of CLIP or SigLIP; empty for any other name."""
    try:
        kind = json.loads((folder / "config.json").read_text()).get("model_type", "")
    except (OSError, ValueError, AttributeError):
        return ""
    return kind if kind in _FOREIGN else ""


def _foreign_tower(folder: Path, kind: str, resolution: int) -> Tower:
    from transformers import AutoImageProcessor, CLIPVisionModel, SiglipVisionModel

    make = CLIPVisionModel if kind.startswith("clip") else SiglipVisionModel
    try:
        model: Any = make.from_pretrained(folder, dtype=torch.float32)
        images: Any = AutoImageProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise OpenVisionError(f"{folder}: {str(error).splitlines()[0]}") from None
    side, patch = model.config.image_size, model.config.patch_size
    if resolution not in (0, side):
        raise OpenVisionError(f"resolution is {resolution}: {folder} takes {side} pixels only")
    layer = -2 if _FOREIGN[kind] else -1
    return Tower(model, side, patch, tuple(images.image_mean), tuple(images.image_std), layer, _FOREIGN[kind])


def assemble(
    tower: Tower, language_model: Any, tokenizer: Any, kind: str = "llava", tiles: tuple[tuple[int, int], ...] = ()
) -> VLM:
    """LLaVA-1.5 ("llava") or LLaVA-NeXT ("llava_next") of these parts, which it takes over, not copies.

    The projector is new: two layers with GELU between, from torch's generator. "<image>" becomes a token of its own.
    `tiles` are LLaVA-NeXT's grids of pictures of the tower's size, (rows, columns).
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaNextConfig
    from transformers import LlavaNextForConditionalGeneration as LlavaNext

    add_image_token(tokenizer, language_model)
    settings: dict[str, Any] = {
        "vision_config": tower.model.config,
        "text_config": language_model.config,
        "image_token_index": tokenizer.convert_tokens_to_ids(IMAGE),
        "image_seq_length": tower.tokens,
        "vision_feature_layer": tower.layer,
        "vision_feature_select_strategy": "default" if tower.class_token else "full",
        "tie_word_embeddings": language_model.config.tie_word_embeddings,
    }
    if kind == "llava_next":
        settings["image_grid_pinpoints"] = pinpoints(tower, tiles)
        config: Any = LlavaNextConfig(**settings)
    else:
        config = LlavaConfig(**settings)
    # built without memory, then given its parts: a language model is large
    with torch.device("meta"):
        model: Any = (LlavaNext if kind == "llava_next" else LlavaForConditionalGeneration)(config)
    dtype = next(language_model.parameters()).dtype
    model.model.vision_tower = tower.model.to(dtype)
    model.model.language_model, model.lm_head = language_model.model, language_model.lm_head
    projector = model.model.multi_modal_projector.to_empty(device="cpu").to(dtype)
    for layer in projector.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    if kind == "llava_next":
        newline = torch.randn(config.text_config.hidden_size) / config.text_config.hidden_size**0.5
        model.model.image_newline = nn.Parameter(newline.to(dtype))
    model.generation_config = language_model.generation_config
    return VLM(model, processor(tower, tokenizer, kind, tiles), tokenizer.name_or_path)


def pinpoints(tower: Tower, tiles: tuple[tuple[int, int], ...]) -> list[list[int]]:
    """LLaVA-NeXT's resolutions, height and width in pixels."""
    return [[rows * tower.side, columns * tower.side] for rows, columns in tiles]


def processor(tower: Tower, tokenizer: Any, kind: str, tiles: tuple[tuple[int, int], ...] = ()) -> Any:
    """LLaVA's processor: pictures padded to a square with grey, or cut into tiles; and the chat template."""
    from transformers import LlavaImageProcessor, LlavaNextImageProcessor, LlavaNextProcessor, LlavaProcessor

    pixels: dict[str, Any] = {
        "size": {"shortest_edge": tower.side},
        "crop_size": {"height": tower.side, "width": tower.side},
        "image_mean": list(tower.mean),
        "image_std": list(tower.std),
        "do_pad": True,
    }
    settings: dict[str, Any] = {
        "patch_size": tower.patch,
        "vision_feature_select_strategy": "default" if tower.class_token else "full",
        "num_additional_image_tokens": int(tower.class_token),
        "image_token": IMAGE,
        "chat_template": _PARTS + tokenizer.chat_template if tokenizer.chat_template else None,
    }
    if kind == "llava_next":
        images: Any = LlavaNextImageProcessor(**pixels, image_grid_pinpoints=pinpoints(tower, tiles))
        return LlavaNextProcessor(images, tokenizer, **settings)
    return LlavaProcessor(LlavaImageProcessor(**pixels), tokenizer, **settings)


def add_image_token(tokenizer: Any, language_model: Any) -> None:
    """Makes "<image>" one special token; where the embedding has no row left, new rows are the mean of all."""
    if tokenizer.convert_tokens_to_ids(IMAGE) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]}, replace_extra_special_tokens=False)
    weight = language_model.get_input_embeddings().weight
    rows = weight.shape[0]
    if len(tokenizer) <= rows:
        return
    mean = weight.detach().float().mean(dim=0)
    language_model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=_ROWS, mean_resizing=False)
    with torch.no_grad():
        for layer in (language_model.get_input_embeddings(), language_model.get_output_embeddings()):
            layer.weight[rows:] = mean.to(layer.weight.dtype)


@torch.no_grad()
def calibrate_projector(model: Any, pixel_values: Tensor) -> None:
    """Scales a new projector so that what it makes of pictures (n, 3, H, W) is as large as the text's embeddings.

    Of its inputs, the first layer's products are then of order one. Without this the tokens of an encoder whose last
    state has no norm (OpenVision 3's: rms 5) enter the language model 10 to 80 times larger than words: its blocks add
    nothing to them, and gradients of the projector vanish in its norms. The recipe of LLaVA does not have it.
    """
    config, projector = model.config, model.model.multi_modal_projector
    states = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    tokens = states[config.vision_feature_layer]
    if config.vision_feature_select_strategy == "default":
        tokens = tokens[:, 1:]
    projector.linear_1.weight /= rms(tokens)
    factor = rms(model.get_input_embeddings().weight) / rms(projector(tokens))
    projector.linear_2.weight *= factor
    projector.linear_2.bias *= factor


def rms(tensor: Tensor) -> Tensor:
    """Root of the mean square of all elements."""
    return tensor.float().square().mean().sqrt()
