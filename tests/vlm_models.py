"""What the tests of vision-language models share: a tiny tower, a tiny language model, a small data set."""

import json
from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from openvision3.data.tokenizer import demo_tokenizer

SIDE, TOKENS = 32, 4  # pixels, and tokens of a picture
TEMPLATE = (
    "{% for message in messages %}[BOS]{{ message['role'] }} : {{ message['content'] }}[EOS]{% endfor %}"
    "{% if add_generation_prompt %}[BOS]assistant : {% endif %}"
)


def tokenizer() -> Any:
    """The demo's words with a chat template."""
    found = PreTrainedTokenizerFast(
        tokenizer_object=demo_tokenizer().tokenizer,
        pad_token="[PAD]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        unk_token="[UNK]",
    )
    found.chat_template = TEMPLATE
    return found


def save_language_model(folder: Path, seed: int = 0) -> Path:
    """A Llama of two blocks, with its tokenizer."""
    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def save_tower(folder: Path) -> Path:
    """A model of openvision3 that makes 4 tokens of 32 pixels."""
    hf_models.whole_model().save(folder)
    return folder


def save_data(folder: Path, entries: list[tuple[int, list[str]]]) -> Path:
    """LLaVA's JSON of (number of pictures, question, answer, question, ...), with its pictures in a folder."""
    (folder / "pictures").mkdir(parents=True)
    rng, written = np.random.default_rng(0), []
    for number, (count, turns) in enumerate(entries):
        names = [f"{number}-{k}.png" for k in range(count)]
        for name in names:
            pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "pictures" / name)
        said = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(turns)]
        if count:
            said[0]["value"] = "<image>\n" * count + said[0]["value"]
        image = {0: {}, 1: {"image": names[0] if names else ""}}.get(count, {"image": names})
        written.append({"id": str(number), **image, "conversations": said})
    path = folder / "data.json"
    path.write_text(json.dumps(written))
    return path
