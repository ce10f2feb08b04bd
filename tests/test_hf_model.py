"""The whole model in transformers: embeddings, loss, decoders, saving, inputs, pipelines."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import hf_models
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer, pipeline

import openvision3 as ov3
import openvision3.hub.hf as hf
from openvision3.config import ExternalEncoderConfig, OpenVisionError
from openvision3.contrastive import contrastive_loss
from openvision3.model.openvision3 import OpenVision3

TEXTS = ["two apples on a hill", "a panda", "[CLS] " + "word " * 60]


@pytest.fixture(scope="module")
def ours():
    return hf_models.whole_model()


@pytest.fixture(scope="module")
def folder(ours, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "model"
    hf.save_transformers(ours, folder)
    return folder


@pytest.fixture
def model(folder):
    return AutoModel.from_pretrained(folder)


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


def test_folder_loads_through_the_auto_classes(folder, model, processor, ours):
    assert type(model) is hf.OpenVision3Model and type(processor) is hf.OpenVision3Processor
    assert type(AutoTokenizer.from_pretrained(folder)) is hf.OpenVision3Tokenizer
    assert type(AutoImageProcessor.from_pretrained(folder)) is hf.OpenVision3ImageProcessor
    converted = hf.to_transformers(ours)
    assert model.config.to_dict() == AutoModel.from_pretrained(folder).config.to_dict()
    for name, tensor in converted.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    tower: Any = hf.OpenVision3VisionModel.from_pretrained(folder)  # the vision tower of a whole model
    pixels = hf_models.images()
    expected: Any = model.get_image_features(pixels).last_hidden_state
    assert torch.equal(tower(pixels).last_hidden_state, expected)


def test_embeddings_and_loss_are_openvision3s(ours, model, processor):
    pixels, inputs = hf_models.images(3), processor(text=TEXTS, return_tensors="pt")
    with torch.no_grad():
        output = model(pixel_values=pixels, return_loss=True, **inputs)
        z_image, z_text = ours.embed_image(pixels), ours.embed_text(TEXTS)
        torch.testing.assert_close(output.image_embeds, z_image, atol=1e-5, rtol=0)
        torch.testing.assert_close(output.text_embeds, z_text, atol=1e-5, rtol=0)
        expected = ours.temperature() * z_image @ z_text.T
        torch.testing.assert_close(output.logits_per_image, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(output.logits_per_text, expected.T, atol=1e-4, rtol=0)
        torch.testing.assert_close(
            output.loss, contrastive_loss(z_image, z_text, ours.temperature()), atol=1e-4, rtol=0
        )
        features = model.get_text_features(**inputs).pooler_output
        torch.testing.assert_close(features, ours.text_encoder(inputs["input_ids"]), atol=1e-5, rtol=0)
        without_mask = model.get_text_features(inputs["input_ids"]).pooler_output
        torch.testing.assert_close(without_mask, features)


def test_text_sdpa_equals_eager(model, processor):
    inputs, found = processor(text=TEXTS, return_tensors="pt"), []
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        found.append(model.get_text_features(**inputs).pooler_output)
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)
    model.set_attn_implementation({"text_config": "eager"})
    assert model.vision_model.config._attn_implementation == "sdpa"
    output = model.get_text_features(**inputs, output_attentions=True, output_hidden_states=True)
    assert output.attentions[0].shape == (3, 2, 32, 32) and len(output.hidden_states) == 2
    padding = inputs["attention_mask"][1] == 0
    assert padding.any() and output.attentions[0][1][..., padding].abs().max() == 0


def test_one_contrastive_step_lowers_the_loss(model, processor):
    pixels, inputs = hf_models.images(3), processor(text=TEXTS, return_tensors="pt")
    model.train()
    model.activation_checkpointing_enable()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(2):
        loss = model(pixel_values=pixels, return_loss=True, **inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert model.text_model.layers[0].mlp.up.weight.grad.abs().max() > 0
    assert model.vision_model.layers[0].mlp.up.weight.grad.abs().max() > 0


def test_decode_and_caption(ours, model, processor):
    pixels = hf_models.images(2, 32, 48)
    with torch.no_grad():
        tokens = ours.encode(pixels)
        torch.testing.assert_close(model.decode(tokens, (2, 3)), ours.decode(tokens, (2, 3)), atol=1e-4, rtol=0)
    for beams in (1, 3):
        ids = model.caption(pixels, num_beams=beams, max_length=8)
        assert processor.batch_decode(ids, skip_special_tokens=True) == ours.caption(
            pixels, num_beams=beams, max_length=8
        )


def test_a_part_that_lacks_is_named():
    ours = hf_models.whole_model(text_encoder=None, text_decoder=None)
    model = hf.to_transformers(ours)
    assert isinstance(model, hf.OpenVision3Model)
    model.decode(torch.zeros(1, 4, 32))
    with pytest.raises(OpenVisionError, match="no text tower.*demo"):
        model.get_text_features(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(OpenVisionError, match="no text decoder"):
        model.caption(hf_models.images())
    assert isinstance(hf.processor_for(ours), hf.OpenVision3ImageProcessor)


def test_tokenizer_has_the_layout_of_the_text_tower(ours, processor, tmp_path):
    tokenizer, words = processor.tokenizer, ours.tokenizer
    rows = tokenizer(TEXTS, padding=True, return_tensors="pt")
    expected = words.encode_contrastive(TEXTS, 32)
    assert torch.equal(rows["input_ids"], expected)
    assert torch.equal(rows["attention_mask"], (expected != words.pad_id).long())
    one = tokenizer("a panda")
    a, panda = words.encode("a panda")
    assert one["input_ids"] == [words.bos_id, a, panda, words.eos_id] + [words.pad_id] * 27 + [words.cls_id]
    assert one["attention_mask"] == [1] * 4 + [0] * 27 + [1]
    assert words.cls_id not in expected[2, :-1]  # "[CLS]" in a text is no special token
    assert tokenizer.encode("a panda", add_special_tokens=False) == [a, panda]
    assert tokenizer.decode(one["input_ids"], skip_special_tokens=True) == "a panda"
    with pytest.raises(ValueError, match="one text"):
        tokenizer("a", "b")
    tokenizer.save_pretrained(tmp_path)
    assert torch.equal(AutoTokenizer.from_pretrained(tmp_path)(TEXTS, return_tensors="pt")["input_ids"], expected)


@pytest.mark.parametrize("size", [(900, 130), (131, 900), (517, 389), (40, 33), (64, 64), (5, 1)])
def test_image_processor_is_preprocess(size):
    image = hf_models.picture().resize(size)
    processor = hf.OpenVision3ImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels[0], ov3.preprocess(image, 64), atol=1e-6, rtol=0)
    kept = processor(image, do_resize=False, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(kept[0], ov3.preprocess(image), atol=1e-6, rtol=0)


def test_image_processor_takes_other_pictures_and_refuses_other_crops():
    processor = hf.OpenVision3ImageProcessor()
    clear = Image.new("RGBA", (40, 300), (0, 0, 0, 0))
    assert (processor(clear, return_tensors="pt")["pixel_values"] == 1).all()  # over white
    assert processor([clear, Image.new("L", (300, 20))], return_tensors="pt")["pixel_values"].shape == (2, 3, 256, 256)
    with pytest.raises(ValueError, match="multiples of 16"):
        processor(clear, crop_size={"height": 30, "width": 32})


def test_pipelines_on_a_real_picture(folder, ours, tmp_path):
    image = hf_models.picture()
    pixels = ov3.preprocess(image, 32)[None]
    features = pipeline(
        "image-feature-extraction",
        model=hf.to_transformers(ours, vision_only=True),
        image_processor=AutoImageProcessor.from_pretrained(folder),
    )
    with torch.no_grad():
        tokens = ours.encode(pixels)
        probabilities = (
            ours.temperature() * ours.embed_image(pixels) @ ours.embed_text(["a sea", "a hill"]).T
        ).softmax(1)
    torch.testing.assert_close(torch.tensor(features(image)), tokens, atol=1e-4, rtol=0)
    pooled = torch.tensor(features(image, pool=True))
    torch.testing.assert_close(pooled, ours.pool(tokens, normalize=False), atol=1e-4, rtol=0)
    hf.save_transformers(ours, tmp_path / "vision", vision_only=True)
    of_folder: Any = pipeline("image-feature-extraction", model=str(tmp_path / "vision"), trust_remote_code=False)
    assert of_folder(image) == features(image)
    zero_shot = pipeline("zero-shot-image-classification", model=str(folder))
    found = zero_shot(image, candidate_labels=["sea", "hill"], hypothesis_template="a {}")
    scores = {answer["label"]: answer["score"] for answer in found}
    assert scores["sea"] == pytest.approx(probabilities[0, 0].item(), abs=1e-4)
    assert scores["hill"] == pytest.approx(probabilities[0, 1].item(), abs=1e-4)


def test_saving_refuses_what_it_should(ours, folder, tmp_path):
    (tmp_path / "diary.txt").write_text("dear diary")
    for there in (folder, tmp_path, tmp_path / "diary.txt"):
        with pytest.raises(OpenVisionError, match="exists already"):
            hf.save_transformers(ours, there)
    with pytest.raises(OpenVisionError, match=r"tests/tiny-kl \(licence: MIT\): pass include_vae"):
        hf.save_transformers(hf_models.diffusers_model(), tmp_path / "kl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["diary.txt"]
    hf.save_transformers(hf_models.diffusers_model(), tmp_path / "kl", include_vae=True)
    assert "MIT" in (tmp_path / "kl" / "README.md").read_text()
    assert isinstance(AutoModel.from_pretrained(tmp_path / "kl"), hf.OpenVision3VisionModel)


def test_push_to_hub_sends_weights_config_and_code(ours, monkeypatch):
    """The hub can't be had here: what would be committed is."""
    sent: list[str] = []

    class Hub:
        def create_repo(self, repo_id, **kwargs):
            return SimpleNamespace(repo_id=repo_id)

        def create_commit(self, operations, **kwargs):
            sent.extend(operation.path_in_repo for operation in operations)

    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: ModelCard(""))
    model: Any = hf.to_transformers(ours, vision_only=True)
    model.push_to_hub("someone/encoder")
    assert {"config.json", "model.safetensors", "modeling_openvision3.py", "configuration_openvision3.py"} <= set(sent)


def test_another_librarys_encoder_is_refused(ours):
    config = dataclasses.replace(ours.config, external=ExternalEncoderConfig("openai/clip"))
    with pytest.raises(OpenVisionError, match="openai/clip, another library's"):
        hf.to_transformers(OpenVision3(config))
