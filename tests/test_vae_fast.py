"""The fast form of AutoencoderKL against diffusers' own code: values, gradients, memory, and when it is used."""

import copy
import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openvision3.config import VAEConfig
from openvision3.vae_diffusers import DiffusersVAE
from openvision3.vae_fast import Convolution, fast_autoencoder, upsampling_kernel
from openvision3.vae_norm import GroupNorm

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
def test_bf16_is_as_near_to_fp64_as_autocast_is(compiled: bool) -> None:
    model = autoencoder()
    exact = copy.deepcopy(model).double()
    latents = torch.randn(2, 4, 6, 8)
    expected, expected_gradient = gradients(lambda z: exact.decode(z).sample, latents.double())

    def by_autocast(z: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model.decode(z).sample

    fast = fast_autoencoder(model, torch.bfloat16, compiled)
    assert fast is not None
    with torch.compiler.set_stance("force_eager"):  # the compiled functions themselves: compiling takes minutes
        images, gradient = gradients(fast.decode, latents)
    usual, usual_gradient = gradients(by_autocast, latents)
    assert difference(images, expected) < 1.5 * difference(usual, expected)
    assert difference(gradient, expected_gradient) < 1.5 * difference(usual_gradient, expected_gradient)


def check_norm(dtype: torch.dtype, silu: bool, compiled: bool, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(5)
    x = (torch.randn(2, 16, 64, 48, generator=generator, dtype=torch.float64) + 100).to(dtype)
    weight, bias = torch.randn(16, generator=generator), torch.randn(16, generator=generator)

    def exact(x: Tensor) -> Tensor:
        normed = F.group_norm(x.double(), 4, weight.double(), bias.double(), 1e-6)
        return F.silu(normed) if silu else normed

    full = torch.promote_types(dtype, torch.float32)
    layer = GroupNorm(4, weight.to(full), bias.to(full), 1e-6, silu, compiled)
    (found, gradient), (expected, expected_gradient) = gradients(layer, x), gradients(exact, x.double())
    assert found.dtype == gradient.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert difference(found, expected) < tolerance and difference(gradient, expected_gradient) < tolerance


TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.005}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_norm_is_exact_far_from_zero(dtype: torch.dtype, silu: bool, compiled: bool) -> None:
    with torch.compiler.set_stance("force_eager"):
        check_norm(dtype, silu, compiled, TOLERANCES[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_norm_is_exact_far_from_zero(dtype: torch.dtype) -> None:
    check_norm(dtype, True, True, TOLERANCES[dtype])


def test_two_graphs_at_once() -> None:
    model = autoencoder().double()
    fast = fast_autoencoder(model, torch.float64)
    assert fast is not None
    first, second = (torch.randn(1, 4, 4, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    images = [fast.decode(latents) for latents in (first, second)]
    torch.stack([(each * target(each)).sum() for each in images]).sum().backward()
    for latents in (first, second):
        assert latents.grad is not None
        assert difference(latents.grad, gradients(lambda z: model.decode(z).sample, latents.detach())[1]) < 1e-12


@pytest.mark.parametrize("inside", ["preparing", "making"])
def test_gradients_after_inference_mode(inside: str) -> None:
    with torch.inference_mode(inside == "making"):
        model = autoencoder()
    config = VAEConfig(kind="diffusers", source="none", channels=4, factor=4)
    vae, exact = DiffusersVAE(config, model), autoencoder().double()
    with torch.inference_mode():
        vae.encode(torch.rand(1, 3, 16, 16))
    latents = torch.randn(1, 4, 4, 4)
    expected = gradients(lambda z: exact.decode(z).sample, latents.double())
    for found, wanted in zip(gradients(vae.decode, latents), expected, strict=True):
        assert difference(found, wanted) < 1e-4


@pytest.mark.parametrize("transposed", [False, True])
def test_backward_pass_of_a_convolution_under_autocast(transposed: bool) -> None:
    layer, x = Convolution(torch.randn(8, 8, 3, 3), None, padding=1, transposed=transposed), torch.randn(1, 8, 6, 6)
    y = layer(x.requires_grad_())
    (expected,) = torch.autograd.grad(y, x, y.detach(), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad(y, x, y.detach())
    assert torch.equal(found, expected)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_pass_keeps_little(dtype: torch.dtype) -> None:
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
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return model.decode(z).sample

    fast = fast_autoencoder(model, dtype)
    assert fast is not None
    assert kept(fast.decode) < 0.4 * kept(by_autocast)


def test_it_is_used_where_it_is_known_and_follows_the_weights() -> None:
    config = VAEConfig(kind="diffusers", source="none", channels=4, factor=4, latent_scale=0.5)
    vae = DiffusersVAE(config, autoencoder())
    images = torch.rand(1, 3, 16, 16)
    latents = vae.encode(images)
    assert set(vae.prepared) == {torch.float32} and vae.fast(images) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert 0 < difference(vae.encode(images), latents) < 0.05
    assert set(vae.prepared) == {torch.float32, torch.bfloat16}
    assert not copy.deepcopy(vae).prepared
    state = {name: tensor * 1.1 for name, tensor in vae.state_dict().items()}
    vae.load_state_dict(state)
    assert difference(vae.encode(images), latents) > 0.01
    assert not vae.to(torch.float64).prepared


@pytest.mark.parametrize("change", ["load", "in place", "to", "replaced"])
def test_weights_may_change_below(change: str) -> None:
    config = VAEConfig(kind="diffusers", source="none", channels=4, factor=4)
    vae, images = DiffusersVAE(config, autoencoder()), torch.rand(1, 3, 16, 16)
    model = vae.autoencoder
    before = vae.encode(images)
    if change == "load":
        model.load_state_dict({name: tensor * 1.1 for name, tensor in model.state_dict().items()})
    elif change == "in place":
        model.encoder.conv_out.weight.mul_(2)
    elif change == "to":
        model.to(torch.bfloat16).to(torch.float32)
    else:
        model.encoder.conv_out = torch.nn.Conv2d(32, 8, 3, padding=1).requires_grad_(False)
    expected = model.encode(images).latent_dist.mode()
    assert difference(vae.encode(images), expected) < 1e-5 < difference(before, expected)


@pytest.mark.parametrize("name", ["slicing", "tiling"])
def test_tiling_and_slicing_are_diffusers_own(name: str) -> None:
    config = VAEConfig(kind="diffusers", source="none", channels=4, factor=4)
    vae, images = DiffusersVAE(config, autoencoder(sample_size=16)), torch.rand(2, 3, 32, 32)
    assert vae.fast(images) is not None
    getattr(vae.autoencoder, f"enable_{name}")()
    assert vae.fast(images) is None
    torch.testing.assert_close(vae.encode(images), vae.autoencoder.encode(images).latent_dist.mode())
    getattr(vae.autoencoder, f"disable_{name}")()
    assert vae.fast(images) is not None


class Wrapped(torch.nn.Conv2d):
    """As an adapter makes of a layer."""


class WrappedLinear(torch.nn.Linear):
    """As an adapter makes of a layer."""


@pytest.mark.parametrize("place", ["conv", "down", "up", "linear", "out", "hook", "dilation"])
def test_changed_layers_have_no_fast_form(place: str) -> None:
    model = autoencoder()
    attention = model.encoder.mid_block.attentions[0]
    if place == "conv":
        model.encoder.conv_in.__class__ = Wrapped
    elif place == "down":
        model.encoder.down_blocks[0].downsamplers[0].conv.__class__ = Wrapped
    elif place == "up":
        model.decoder.up_blocks[0].upsamplers[0].conv.__class__ = Wrapped
    elif place == "linear":
        attention.to_k.__class__ = WrappedLinear
    elif place == "out":
        attention.to_out[0].__class__ = WrappedLinear
    elif place == "hook":
        attention.to_q.register_forward_hook(lambda *_: None)
    else:
        model.decoder.up_blocks[0].upsamplers[0].conv.dilation = (2, 2)
    assert fast_autoencoder(model, torch.float32) is None


def test_an_unknown_part_leaves_the_module_to_itself() -> None:
    model = autoencoder()
    model.decoder.mid_block.resnets[0].output_scale_factor = 2.0
    assert fast_autoencoder(model, torch.float32) is None
    vae = DiffusersVAE(VAEConfig(kind="diffusers", source="none", channels=4, factor=4), model)
    latents = torch.randn(1, 4, 4, 4)
    torch.testing.assert_close(vae.decode(latents), model.decode(latents).sample)
