"""The fast form of AutoencoderKL against diffusers' own code: values, gradients, memory, and when it is used."""

import copy
import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openvision3 import vae_fast
from openvision3.config import VAEConfig
from openvision3.vae_diffusers import DiffusersVAE
from openvision3.vae_fast import fast_autoencoder, upsampling_kernel

diffusers: Any = importlib.import_module("diffusers")


def autoencoder(**options: Any) -> Any:
    torch.manual_seed(0)
    options = {
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "block_out_channels": [16, 16, 32],
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
    } | options
    model = diffusers.AutoencoderKL(**options).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():  # norms start at 1 and 0, which would hide a mistake
        if "norm" in name:
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return model


def gradients(decode: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    latents = latents.clone().requires_grad_()
    images = decode(latents)
    (gradient,) = torch.autograd.grad((images.double() * target(images)).sum(), latents)
    return images.detach(), gradient


def target(images: Tensor) -> Tensor:
    return torch.randn(images.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("quant_conv", [False, True])
def test_fp64_equals_diffusers(quant_conv: bool) -> None:
    model = autoencoder(use_quant_conv=quant_conv, use_post_quant_conv=quant_conv).double()
    fast = fast_autoencoder(model, torch.float64)
    assert fast is not None
    images = torch.rand(2, 3, 24, 32, dtype=torch.float64) * 2 - 1
    latents = torch.randn(2, 4, 6, 8, dtype=torch.float64)
    assert difference(fast.encode(images), model.encode(images).latent_dist.mode()) < 1e-12
    (decoded, gradient), (expected, expected_gradient) = (
        gradients(decode, latents) for decode in (fast.decode, lambda z: model.decode(z).sample)
    )
    assert difference(decoded, expected) < 1e-12 and difference(gradient, expected_gradient) < 1e-12


@pytest.mark.parametrize("compiled", [False, True])
def test_bf16_is_as_near_to_fp64_as_autocast_is(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # compiled by PyTorch it is the same functions; what counts here is their mathematics
    monkeypatch.setattr(vae_fast, "_compiled", lambda function: function)
    model = autoencoder()
    exact = copy.deepcopy(model).double()
    latents = torch.randn(2, 4, 6, 8)
    expected, expected_gradient = gradients(lambda z: exact.decode(z).sample, latents.double())

    def by_autocast(z: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model.decode(z).sample

    fast = fast_autoencoder(model, torch.bfloat16, compiled)
    assert fast is not None
    (images, gradient), (usual, usual_gradient) = (gradients(decode, latents) for decode in (fast.decode, by_autocast))
    assert difference(images, expected) < 1.5 * difference(usual, expected)
    assert difference(gradient, expected_gradient) < 1.5 * difference(usual_gradient, expected_gradient)


@pytest.mark.slow
def test_compiled_equals_plain() -> None:
    model, latents = autoencoder(), torch.randn(2, 4, 6, 8)
    plain, compiled = (fast_autoencoder(model, torch.bfloat16, flag) for flag in (False, True))
    assert plain is not None and compiled is not None
    (images, gradient), (expected, expected_gradient) = (gradients(f.decode, latents) for f in (compiled, plain))
    assert difference(images, expected) < 0.02 and difference(gradient, expected_gradient) < 0.05


def test_upsampling_kernel() -> None:
    weight, x = torch.randn(5, 3, 3, 3, dtype=torch.float64), torch.randn(2, 3, 4, 6, dtype=torch.float64)
    expected = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, padding=1)
    found = F.conv_transpose2d(x, upsampling_kernel(weight), stride=2, padding=1)
    torch.testing.assert_close(found, expected)


def test_backward_pass_keeps_little() -> None:
    model, latents = autoencoder(block_out_channels=[32, 32, 64]), torch.randn(1, 4, 16, 16)

    def kept(decode: Any) -> int:
        storages: dict[int, torch.UntypedStorage] = {}
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = decode(latents.clone().requires_grad_())
        assert result.requires_grad
        return sum(storage.nbytes() for key, storage in storages.items() if key not in own)

    def by_autocast(z: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model.decode(z).sample

    fast = fast_autoencoder(model, torch.bfloat16)
    assert fast is not None
    assert kept(fast.decode) < 0.4 * kept(by_autocast)


def test_it_is_used_where_it_is_known_and_follows_the_weights() -> None:
    config = VAEConfig(kind="diffusers", source="none", channels=4, factor=4, latent_scale=0.5)
    vae = DiffusersVAE(config, autoencoder())
    images = torch.rand(1, 3, 16, 16)
    latents = vae.encode(images)
    assert set(vae.prepared) == {torch.float32} and vae.prepared[torch.float32] is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert 0 < difference(vae.encode(images), latents) < 0.05
    assert set(vae.prepared) == {torch.float32, torch.bfloat16}
    assert not copy.deepcopy(vae).prepared
    state = {name: tensor * 1.1 for name, tensor in vae.state_dict().items()}
    vae.load_state_dict(state)
    assert difference(vae.encode(images), latents) > 0.01
    assert not vae.to(torch.float64).prepared


def test_an_unknown_part_leaves_the_module_to_itself() -> None:
    model = autoencoder()
    model.decoder.mid_block.resnets[0].output_scale_factor = 2.0
    assert fast_autoencoder(model, torch.float32) is None
    vae = DiffusersVAE(VAEConfig(kind="diffusers", source="none", channels=4, factor=4), model)
    latents = torch.randn(1, 4, 4, 4)
    torch.testing.assert_close(vae.decode(latents), model.decode(latents).sample)
