"""The encoder nested in transformers' LLaVA-1.5 and LLaVA-NeXT: train, generate, save, load."""

from typing import Any

import hf_models
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    pipeline,
)

import openvision3.hub.hf as hf
from openvision3.data.tokenizer import demo_tokenizer

SIDE = 32  # pixels: 2 x 2 tokens
SETTINGS = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
PROCESSOR = {"patch_size": 16, "num_additional_image_tokens": 0, "vision_feature_select_strategy": "full"}


@pytest.fixture(scope="module")
def ours():
    return hf_models.whole_model()


@pytest.fixture(scope="module")
def tokenizer():
    found = PreTrainedTokenizerFast(
        tokenizer_object=demo_tokenizer().tokenizer, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]"
    )
    found.add_tokens(["<image>"], special_tokens=True)
    return found


def build(kind, config_kind, ours, tokenizer, **settings):
    tower = hf.to_transformers(ours, vision_only=True)
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    model = kind(
        config_kind(vision_config=tower.config, text_config=text, image_token_index=image_token, **SETTINGS, **settings)
    )
    assert type(model.model.vision_tower) is hf.OpenVision3VisionModel
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.vision_tower.requires_grad_(False)  # METHOD.md, section 8: frozen
    return model


def train(model, batch, steps):
    """Losses of some steps on the answer alone."""
    labels = batch["input_ids"].clone()
    labels[:, :-3] = -100
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().max() > 0
    model.eval()
    return losses


def generated(model, batch):
    prompt = {name: t[:, :-3] if name in ("input_ids", "attention_mask") else t for name, t in batch.items()}
    return model.generate(**prompt, max_new_tokens=6, do_sample=False)


def test_llava(ours, tokenizer, tmp_path):
    model = build(LlavaForConditionalGeneration, LlavaConfig, ours, tokenizer, image_seq_length=4)
    processor: Any = LlavaProcessor(
        hf.OpenVision3ImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer,
        **PROCESSOR,
    )
    batch = processor(images=hf_models.picture(), text="<image> a panda and a sailboat", return_tensors="pt")
    assert (batch["input_ids"] == model.config.image_token_id).sum() == 4
    seen = []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    losses = train(model, batch, 30)
    assert losses[1] < losses[0] and losses[-1] < 0.5 * losses[0]
    torch.testing.assert_close(seen[0], ours.encode(batch["pixel_values"]), atol=1e-5, rtol=0)

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    loaded: Any = LlavaProcessor.from_pretrained(tmp_path)
    assert type(again.model.vision_tower) is hf.OpenVision3VisionModel
    assert type(loaded.image_processor) is hf.OpenVision3ImageProcessor
    batch_again = loaded(images=hf_models.picture(), text="<image> a panda and a sailboat", return_tensors="pt")
    assert torch.equal(batch_again["pixel_values"], batch["pixel_values"])
    ids = generated(model, batch)
    text = tokenizer.batch_decode(ids)
    assert "and a sailboat" in text[0]
    assert tokenizer.batch_decode(generated(again, batch_again)) == text
    chat: Any = pipeline("image-text-to-text", model=again, processor=loaded)
    said = chat(images=hf_models.picture(), text="<image> a panda", generate_kwargs={"max_new_tokens": 3})
    assert "and a sailboat" in said[0]["generated_text"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_llava_next(ours, tokenizer, tmp_path):
    pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    model = build(
        LlavaNextForConditionalGeneration,
        LlavaNextConfig,
        ours,
        tokenizer,
        image_seq_length=4,
        image_grid_pinpoints=pinpoints,
    )
    half = [0.5] * 3
    processor: Any = LlavaNextProcessor(
        LlavaNextImageProcessor(
            size={"shortest_edge": SIDE},
            crop_size={"height": SIDE, "width": SIDE},
            image_grid_pinpoints=pinpoints,
            image_mean=half,
            image_std=half,
        ),
        tokenizer,
        **PROCESSOR,
    )
    picture = hf_models.picture().resize((100, 60))
    batch = processor(images=picture, text="<image> a panda and a sailboat", return_tensors="pt")
    assert batch["pixel_values"].ndim == 5 and batch["pixel_values"].shape[1] > 1  # tiles
    assert batch["pixel_values"].min() >= -1 and batch["pixel_values"].max() <= 1
    losses = train(model, batch, 8)
    assert losses[1] < losses[0]
    model.save_pretrained(tmp_path)
    again = LlavaNextForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(generated(again, batch), generated(model, batch))


def test_gradients_reach_a_tower_that_trains(ours, tokenizer):
    model = build(LlavaForConditionalGeneration, LlavaConfig, ours, tokenizer, image_seq_length=4)
    model.requires_grad_(True).train()
    model.activation_checkpointing_enable()
    ids = torch.tensor([[2, *[model.config.image_token_id] * 4, 5, 6]])
    model(input_ids=ids, pixel_values=hf_models.images(1), labels=ids.clone()).loss.backward()
    tower = model.model.vision_tower
    assert tower.layers[0].attention.qkv.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in tower.vae.parameters())
