"""Folders of randomly initialised encoders, one of each kind that `load_token_encoder` knows."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

GOLDEN = Path(__file__).parent / "golden" / "released-format-tiny"
OPEN_CLIP_VIT: dict[str, Any] = {"image_size": 28, "patch_size": 14, "width": 32, "layers": 2, "head_width": 16}
SIGLIP_VIT: dict[str, Any] = {
    "image_size": 160,
    "timm_model_name": "test_vit3",
    "timm_pool": "map",
    "timm_proj": "none",
}


def save_transformers(folder: Path, kind: str, **changes: Any) -> Path:
    """ "clip", "clip_vision_model", "siglip" or "siglip_vision_model": 28 px, 2 x 2 tokens of width 32."""
    import transformers

    torch.manual_seed(1)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    vision = sizes | {"num_hidden_layers": 2, "image_size": 28, "patch_size": 14} | changes
    text = sizes | {"num_hidden_layers": 1, "vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2}
    name = "Siglip" if kind.startswith("siglip") else "CLIP"
    if kind.endswith("vision_model"):
        config = getattr(transformers, f"{name}VisionConfig")(**vision)
        model = getattr(transformers, f"{name}VisionModel")(config)
    else:
        config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision)
        model = getattr(transformers, f"{name}Model")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # else tokens are nearly all alike
    model.save_pretrained(folder)
    return folder


def save_open_clip(folder: Path, vision: dict[str, Any], **preprocess: Any) -> Path:
    """A folder as open_clip's `push_to_hf_hub` writes it: the vision tower beside a text tower's tensor."""
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    torch.manual_seed(2)
    tower = _build_vision_tower(24, CLIPVisionCfg(**vision))
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": {}}, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    tensors = {f"visual.{name}": tensor.contiguous() for name, tensor in tower.state_dict().items()}
    save_file(tensors | {"token_embedding.weight": torch.zeros(2)}, folder / "open_clip_model.safetensors")
    return folder


def save_released(folder: Path) -> Path:
    """The golden checkpoint in the released format: 64 px, 4 x 4 tokens of width 64."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("open_clip_config.json", "open_clip_pytorch_model.bin"):
        shutil.copy(GOLDEN / name, folder)
        (folder / name).chmod(0o644)
    return folder
