"""Causal language models by name: the small one that is fetched as an asset, a folder, or a hub id.

The asset comes as a GGUF of 4 bits a weight. transformers unpacks it once, in half a minute, into an ordinary folder
beside it in the cache, which opens in a second from then on.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from openvision3 import assets
from openvision3.config import OpenVisionError
from openvision3.files import save_tensors
from openvision3.vlm.folder import quiet

SMOLLM2 = "smollm2-135m-instruct"
FAMILIES = ("llama", "qwen2", "qwen3", "smollm3")  # SmolLM 1 and 2 are of llama's form, Qwen 2.5 of qwen2's
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]  # of a hub's repository
# Q4_1's values are an fp16 scale times 0 to 15 plus an fp16 offset. fp16 holds them with a seventh of bf16's error
# (1.9e-4 of their root mean square, against 1.4e-3); the largest weight is 9.25.
_UNPACKED_DTYPE = torch.float16


def open_language_model(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A causal language model in eval mode, of the given dtype on the CPU, and its tokenizer, which has a pad token.

    `name` is "smollm2-135m-instruct" (fetched at the first use), a folder, or a hub id. The pad token is never the one
    that ends an answer. Only the Llama, Qwen (2, 2.5, 3) and SmolLM families, from safetensors, without code of theirs.
    Raises `OpenVisionError` for anything else, and where it can't be had or is broken.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = _unpacked_asset() if name == SMOLLM2 else _folder(name)
    _check(folder)
    with quiet():
        try:
            opened: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # transformers, safetensors and tokenizers raise errors of many kinds
            raise OpenVisionError(f"{folder} can't be loaded: {_one_line(error)}") from None
    model, found = opened
    if missing := sorted(found["missing_keys"]):  # else they would stay random
        raise OpenVisionError(f"{folder}: the weights lack {missing[0]}")
    _set_pad(folder, model, tokenizer)
    return model.eval(), tokenizer


def _folder(name: str) -> Path:
    """The folder that a name means: itself, or a hub id's snapshot."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        raise OpenVisionError(f"there is no language model {name!r}: name {SMOLLM2}, a folder, or a hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except Exception as error:  # the hub client raises its own, httpx's and the system's errors
        raise OpenVisionError(
            f"{name} can't be had from the hub: {_one_line(error)}. Check the name, or download it where there is a "
            "network and pass its folder"
        ) from None


def _check(folder: Path) -> None:
    """Refuses what is no language model of the families, or has no safetensors."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        family = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise OpenVisionError(f"{folder} holds no language model: expected a config.json with a model_type") from None
    if family not in FAMILIES:
        raise OpenVisionError(f"{folder}: model_type is {family!r}: expected one of {', '.join(FAMILIES)}")
    if config.get("quantization_config"):
        raise OpenVisionError(f"{folder}: its weights are quantised: expected plain ones, which can be trained")
    if not any((folder / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        raise OpenVisionError(
            f"{folder} has no weights: expected model.safetensors, or several with their "
            "index; transformers makes them of a .bin (docs/VLM.md)"
        )


def _set_pad(folder: Path, model: Any, tokenizer: Any) -> None:
    """Pads with a token that does not end an answer: the label of that one must count."""
    if tokenizer.eos_token is None:
        raise OpenVisionError(f"{folder}: the tokenizer has no token that ends an answer (eos_token)")
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        vocabulary = tokenizer.get_vocab()
        spare = ("<|endoftext|>", "<|finetune_right_pad_id|>", "<pad>", "<|pad|>", tokenizer.unk_token)
        pad = next((word for word in spare if word in vocabulary and word != tokenizer.eos_token), None)
        if pad is None:
            raise OpenVisionError(
                f"{folder}: the tokenizer pads with {tokenizer.pad_token!r} where {tokenizer.eos_token!r} ends an "
                "answer: give it another pad_token"
            )
        tokenizer.pad_token = pad
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id


def _unpacked_asset() -> Path:
    """The asset as a folder of transformers in the cache, made at the first use (safe with several processes)."""
    gguf = assets.cached_path(SMOLLM2)
    folder = gguf.with_name(f"{gguf.stem}-fp16")
    if folder.is_dir():
        return folder
    gguf = assets.fetch(SMOLLM2)
    try:
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not folder.is_dir():  # another process may have been faster
                print(f"unpacking {SMOLLM2}, once: half a minute or more", file=sys.stderr, flush=True)
                with tempfile.TemporaryDirectory(dir=folder.parent, prefix="unpack-") as scratch:
                    _unpack(gguf, Path(scratch) / folder.name)
                    os.rename(Path(scratch) / folder.name, folder)
    except OSError as error:
        raise OpenVisionError(f"can't write {folder}: {error}; set OV3_CACHE to another folder") from None
    return folder


def _unpack(gguf: Path, folder: Path) -> None:
    """Writes a GGUF's weights (fp16) and tokenizer as an ordinary folder of transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    alone = folder.with_name("gguf")  # a folder without the cache's other files
    alone.mkdir()
    (alone / gguf.name).symlink_to(gguf.absolute())
    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # a bar that transformers' switch does not reach
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                alone, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
            )
            tokenizer: Any = AutoTokenizer.from_pretrained(alone, gguf_file=gguf.name)
        except ImportError:
            raise OpenVisionError(f"{SMOLLM2} needs gguf: pip install 'openvision3[vlm]'") from None
    tokenizer.model_max_length = model.config.max_position_embeddings
    _set_pad(gguf, model, tokenizer)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = _UNPACKED_DTYPE
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tied = set(model.all_tied_weights_keys)
    weights = {name: t.to(_UNPACKED_DTYPE) for name, t in model.state_dict().items() if name not in tied}
    save_tensors(folder / "model.safetensors", weights, {"format": "pt"})


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
