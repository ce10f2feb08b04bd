"""The vision encoder as a transformers model: the golden checkpoint, switches, saving, and a frozen VAE inside."""

from pathlib import Path

import hf_models
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

import openvision3 as ov3
import openvision3.hub.hf as hf

GOLDEN = Path(__file__).parent / "golden" / "released-format-tiny"


@pytest.fixture(scope="module")
def ours():
    return hf_models.whole_model()


@pytest.fixture
def vision(ours):
    return hf.to_transformers(ours, vision_only=True)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_golden_checkpoint(attention, tmp_path):
    expected = load_file(GOLDEN / "expected.safetensors")
    model = hf.to_transformers(ov3.load(GOLDEN, vae=None, device="cpu"))
    assert isinstance(model, hf.OpenVision3VisionModel)
    model.save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    with torch.no_grad():
        output = model(latents=expected["latents"])
    assert (output.last_hidden_state - expected["tokens"]).abs().max() <= 1e-5
    assert (output.pooler_output - expected["pooled"]).abs().max() <= 1e-5
    assert model.config.patch_size == 16 and model.config.vae_config.latent_shift == 0.0
    with pytest.raises(ValueError, match="no autoencoder: pass latents"):
        model(hf_models.images(1, 64, 64))


@pytest.mark.parametrize("size", [(32, 32), (48, 80)])
def test_pixels_give_what_openvision3_gives(ours, vision, size):
    pixels = hf_models.images(2, *size)
    with torch.no_grad():
        tokens, output = ours.encode(pixels), vision(pixels)
        pooled = ours.pool(tokens, normalize=False)
    torch.testing.assert_close(output.last_hidden_state, tokens, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.pooler_output, pooled, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"positions": "scaled"},
        {"stored_positions": True},
        {"input": "pixels", "in_channels": 3, "patch_size": 16},
        {"encoder": hf_models.TransformerConfig(width=32, depth=1, num_heads=4, mlp_width=48, activation="gelu_tanh")},
    ],
)
def test_variants_of_the_encoder(changes):
    if "input" in changes:
        ours = hf_models.shaken(
            hf_models.OpenVision3(
                hf_models.ModelConfig(
                    image_size=32,
                    encoder=hf_models.TransformerConfig(32, 1, 2),
                    decoder=None,
                    text_encoder=None,
                    text_decoder=None,
                    **changes,
                )
            )
        )
    else:
        ours = hf_models.whole_model(**changes)
    model, pixels = hf.to_transformers(ours, vision_only=True), hf_models.images(2, 64, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels).last_hidden_state, ours.encode(pixels), atol=1e-5, rtol=0)


def test_a_diffusers_autoencoder_inside(tmp_path):
    ours, pixels = hf_models.diffusers_model(), hf_models.images()
    hf.to_transformers(ours).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        tokens = ours.encode(pixels)
        torch.testing.assert_close(model(pixels).last_hidden_state, tokens, atol=1e-5, rtol=0)
    names = [name for name in model.state_dict() if name.startswith("vae.")]
    assert names and not any(".decoder." in name for name in names)
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.float16)
    assert half.vae.autoencoder.dtype == torch.float32 and half.patch_embed.weight.dtype == torch.float16
    assert half(pixels).last_hidden_state.isfinite().all()
    with pytest.raises(ValueError, match="overflows in fp16"):
        half.half()(pixels)


def test_hidden_states_are_the_patches_alone(vision):
    vision.set_attn_implementation("eager")
    output = vision(hf_models.images(), output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 4, 32)] * 3
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 2, 5, 5)] * 2  # here with the class token
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(2, 2, 5))
    one = vision(hf_models.images(), output_hidden_states=-1).hidden_states
    assert one[0] is None and torch.equal(one[-1], output.last_hidden_state)


def test_sdpa_equals_eager(vision):
    pixels = hf_models.images()
    found = {}
    for attention in ("eager", "sdpa"):
        vision.set_attn_implementation(attention)
        found[attention] = vision(pixels).last_hidden_state
    assert not torch.equal(found["eager"], torch.zeros_like(found["eager"]))
    torch.testing.assert_close(found["sdpa"], found["eager"], atol=1e-5, rtol=1e-5)


def test_every_attention_function_of_transformers_can_be_chosen(vision):
    """Flash attention needs a GPU: what counts here is that the switch reaches the attention."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    calls = []

    def counted(*args, **kwargs):
        calls.append(args[1].shape)
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("counted", counted)
    assert vision._supports_flash_attn
    vision.set_attn_implementation("counted")
    vision(hf_models.images())
    assert calls == [(2, 2, 5, 16)] * 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_equal_gradients(vision, reentrant):
    pixels, gradients = hf_models.images(), []
    vision.train()
    for enabled in (False, True):
        if enabled:
            vision.activation_checkpointing_enable({"use_reentrant": reentrant})
        calls = []
        hooks = [layer.norm_1.register_forward_hook(lambda *_, calls=calls: calls.append(1)) for layer in vision.layers]
        vision.zero_grad()
        vision(pixels).pooler_output.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in vision.named_parameters() if p.requires_grad})
        for hook in hooks:
            hook.remove()
        assert len(calls) == (4 if enabled else 2)  # computed again in the backward pass
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient)


def test_the_autoencoder_stays_frozen(vision, tmp_path):
    vision.save_pretrained(tmp_path)
    for model in (vision, AutoModel.from_pretrained(tmp_path), AutoModel.from_config(vision.config)):
        model.train()
        assert not model.vae.training and not any(p.requires_grad for p in model.vae.parameters())
        assert all(p.requires_grad for name, p in model.named_parameters() if not name.startswith("vae."))
    pixels = hf_models.images().requires_grad_()
    vision(pixels).pooler_output.sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().max() > 0  # gradients still reach the pixels


def test_save_and_load(vision, tmp_path):
    vision.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is hf.OpenVision3VisionModel
    assert again.config.to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()
    assert again.state_dict().keys() == vision.state_dict().keys()
    for name, tensor in vision.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    pixels = hf_models.images()
    assert torch.equal(again(pixels).last_hidden_state, vision(pixels).last_hidden_state)


def test_bad_inputs_are_named(vision):
    for wrong, words in (
        ({}, "either"),
        ({"pixel_values": torch.zeros(1, 3, 30, 32)}, r"pixel_values \(B, 3, H, W\).*16"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, r"latents \(B, 16, H, W\).*2"),
    ):
        with pytest.raises(ValueError, match=words):
            vision(**wrong)
    with pytest.raises(StrictDataclassError, match="divisible by"):
        hf.OpenVision3VisionConfig(hidden_size=32, num_attention_heads=3)
    with pytest.raises(StrictDataclassError, match="multiple"):
        hf.OpenVision3VisionConfig(image_size=250)
    config = hf.OpenVision3VisionConfig(vae_config={"kind": "diffusers", "architecture": {"_class_name": "os"}})
    with pytest.raises(ValueError, match="no autoencoder of diffusers"):
        hf.OpenVision3VisionModel(config)
