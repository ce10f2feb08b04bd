"""Language models by name: what is opened, with which pad token, and what is refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import vlm_models
from safetensors.torch import load_file

from openvision3.assets import cache_dir, fetch
from openvision3.config import OpenVisionError
from openvision3.vlm.language_model import SMOLLM2, open_language_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return vlm_models.save_language_model(tmp_path / "lm")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder(folder: Path) -> None:
    model, tokenizer = open_language_model(str(folder), torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not model.training
    saved = load_file(folder / "model.safetensors")["model.norm.weight"]
    assert torch.equal(model.model.norm.weight, saved.to(torch.bfloat16))
    assert tokenizer.chat_template and tokenizer.pad_token == "[PAD]"
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("pad", [None, "[EOS]"])
def test_the_pad_token_never_ends_an_answer(folder: Path, pad: str | None) -> None:
    edit(folder / "tokenizer_config.json", pad_token=pad)
    model, tokenizer = open_language_model(str(folder))
    assert tokenizer.pad_token == "[UNK]" and tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    edit(folder / "tokenizer_config.json", unk_token=None)
    with pytest.raises(OpenVisionError, match="give it another pad_token"):
        open_language_model(str(folder))


def test_refusals(folder: Path, tmp_path: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises(OpenVisionError, match=match) as caught:
            open_language_model(str(folder))
        assert "\n" not in str(caught.value)

    config = (folder / "config.json").read_text()
    edit(folder / "config.json", model_type="gpt2")
    refused("model_type is 'gpt2': expected one of llama, qwen2, qwen3, smollm3")
    edit(folder / "config.json", model_type="llama", quantization_config={"quant_method": "gguf"})
    refused("quantised")
    (folder / "config.json").write_text("{")
    refused("holds no language model")
    (folder / "config.json").write_text(config)
    edit(folder / "config.json", num_hidden_layers=3)
    refused("the weights lack model.layers.2")
    (folder / "config.json").write_text(config)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused("can't be loaded")
    weights.rename(folder / "pytorch_model.bin")  # never unpickled
    refused("expected model.safetensors")
    for name in ("smollm", str(tmp_path / "none"), "../none"):
        with pytest.raises(OpenVisionError, match="there is no language model"):
            open_language_model(name)


def test_smollm2_where_it_can_be_had(capfd: pytest.CaptureFixture[str]) -> None:
    """Unpacked once; it knows a capital, and ends its answer."""
    try:
        gguf = fetch(SMOLLM2)
    except OpenVisionError as error:
        pytest.skip(str(error))
    capfd.readouterr()  # what the fetching says
    open_language_model(SMOLLM2)
    assert capfd.readouterr().err in ("", "unpacking smollm2-135m-instruct, once: half a minute or more\n")
    model, tokenizer = open_language_model(SMOLLM2)
    assert capfd.readouterr() == ("", "")
    folder = cache_dir() / f"{gguf.stem}-fp16"
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.float16}
    assert model.dtype == torch.float32 and model.lm_head.weight is model.model.embed_tokens.weight
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert len(tokenizer) == len(model.lm_head.weight)
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(ids) == "The capital of France is Paris.<|im_end|>"
