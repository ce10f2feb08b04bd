"""The encoder and the decoder: shapes, grids, positions, and equality with open_clip's own vision tower."""

import dataclasses

import pytest
import torch

from openvision3.config import ModelConfig, OpenVisionError, TransformerConfig
from openvision3.hub.released import released_names
from openvision3.model.blocks import SIZES, sincos_positions
from openvision3.model.decoder import LatentDecoder
from openvision3.model.encoder import VisionEncoder, square_grid

SMALL = TransformerConfig(32, 2, 2)
CONFIG = ModelConfig("small", image_size=64, embed_dim=24, encoder=SMALL, decoder=TransformerConfig(48, 2, 3))


def silence_blocks(module):
    """Takes attention and MLP out of the residual stream."""
    for name, parameter in module.named_parameters():
        if "attention.out" in name or "mlp.down" in name:
            torch.nn.init.zeros_(parameter)


@pytest.mark.parametrize("name", SIZES)
def test_family_forward_and_backward(name):
    """One block of each size: every parameter takes part, and the tokens' count and width are right."""
    size = dataclasses.replace(SIZES[name], depth=1)
    encoder = VisionEncoder(dataclasses.replace(CONFIG, encoder=size))
    tokens = encoder(torch.randn(1, 16, 4, 8))
    assert tokens.shape == (1, 2 * 4, size.width)
    (tokens.square().mean() + encoder.pool(tokens).square().mean()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


def test_released_base_has_150_tensors():
    with torch.device("meta"):
        config = ModelConfig(encoder=SIZES["B"], stored_positions=True)
        state = {f"encoder.{name}": tensor for name, tensor in VisionEncoder(config).state_dict().items()}
    assert len(state) == 150
    assert {ours for _, ours in released_names(12)} == set(state)
    assert state["encoder.positions"].shape == (257, 768)


def test_any_multiple_of_16_and_a_helpful_error_otherwise():
    encoder = VisionEncoder(CONFIG).eval()
    for rows, columns in ((2, 2), (2, 20), (14, 6)):
        assert encoder(torch.randn(1, 16, rows, columns)).shape == (1, rows * columns // 4, 32)
    for shape in ((1, 16, 3, 4), (1, 15, 4, 4), (16, 4, 4)):
        with pytest.raises(ValueError, match="multiples of 2"):
            encoder(torch.randn(shape))


def test_tokens_are_row_by_row():
    """The first token row comes from the first latent row: with attention and MLP off, tokens follow their patches."""
    encoder = VisionEncoder(CONFIG).eval()
    silence_blocks(encoder)
    latents = torch.zeros(1, 16, 4, 6)
    latents[0, :, 2:4, 0:2] = 1.0  # second row, first column of a 2 x 3 grid
    change = encoder(latents) - encoder(torch.zeros_like(latents))
    assert (change.abs().sum(dim=-1)[0] > 0).tolist() == [False, False, False, True, False, False]
    torch.testing.assert_close(encoder(torch.zeros_like(latents))[0], sincos_positions((2, 3), 32))


def test_scaled_positions_cover_the_extent_of_the_size_in_the_config():
    """A grid of twice the side has its tokens at a quarter before and after those of the size trained at."""
    own = sincos_positions((4, 4), 32)
    torch.testing.assert_close(sincos_positions((4, 4), 32, extent=(4, 4)), own)
    fine = sincos_positions((8, 2), 32, extent=(4, 4)).unflatten(0, (8, 2))
    y, x = 2.75, 0.5  # of row 6, column 0
    frequency = 10000.0 ** -(torch.arange(8) / 7)
    expected = torch.cat([(x * frequency).sin(), (x * frequency).cos(), (y * frequency).sin(), (y * frequency).cos()])
    torch.testing.assert_close(fine[6, 0], expected)
    scaled = VisionEncoder(dataclasses.replace(CONFIG, positions="scaled"))
    assert torch.equal(scaled.position_table((4, 4))[1], own)  # CONFIG's 64 pixels
    assert torch.equal(scaled.position_table((8, 2))[1], fine.flatten(0, 1))
    assert LatentDecoder(dataclasses.replace(CONFIG, positions="scaled"), SMALL).extent == (4, 4)


def test_stored_positions_are_used_as_stored_and_interpolated_for_other_grids():
    torch.manual_seed(0)
    formula = VisionEncoder(CONFIG).eval()
    stored = VisionEncoder(dataclasses.replace(CONFIG, stored_positions=True)).eval()
    table = torch.cat([torch.zeros(1, 32), sincos_positions((4, 4), 32)])
    stored.load_state_dict(formula.state_dict() | {"positions": table})
    latents = torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(stored(latents), formula(latents))
    assert stored.position_table((6, 3))[1].shape == (18, 32)
    assert stored(torch.randn(1, 16, 12, 6)).isfinite().all()
    assert stored.positions is not None
    stored.positions[0] += 1.0  # the class row counts too
    assert not torch.allclose(stored(latents), formula(latents))


def test_decoder_shapes_and_order():
    torch.manual_seed(0)
    decoder = LatentDecoder(CONFIG, TransformerConfig(48, 2, 3)).eval()
    assert decoder(torch.randn(2, 6, 32), (2, 3)).shape == (2, 16, 4, 6)
    with pytest.raises(OpenVisionError, match="grid of 2 x 2"):
        decoder(torch.randn(2, 6, 32), (2, 2))
    silence_blocks(decoder)
    tokens = torch.randn(1, 6, 32)
    moved = tokens.clone()
    moved[0, 4] += torch.randn(32)  # second row, second column
    changed = (decoder(moved, (2, 3)) - decoder(tokens, (2, 3))).abs().sum(dim=1)[0] > 0
    assert changed.int().tolist() == [[0, 0, 0, 0, 0, 0]] * 2 + [[0, 0, 1, 1, 0, 0]] * 2


def test_decoder_knows_where_a_token_is():
    decoder = LatentDecoder(CONFIG, TransformerConfig(48, 1, 3)).eval()
    corners = decoder(torch.randn(1, 1, 32).expand(1, 4, 32), (2, 2))[0, 0, ::2, ::2].flatten()
    assert len(set(corners.tolist())) == 4  # equal tokens, different outputs


def test_square_grid():
    assert square_grid(64) == (8, 8)
    with pytest.raises(OpenVisionError, match="grid="):
        square_grid(6)


def test_equal_to_open_clips_vision_transformer():
    """Random weights through open_clip's own code, loaded under the names of the released files."""
    tower = pytest.importorskip("open_clip.transformer")
    torch.manual_seed(0)
    norm = lambda width: torch.nn.LayerNorm(width, eps=1e-6)  # noqa: E731
    theirs = tower.VisionTransformer(
        image_size=8, patch_size=2, width=32, layers=2, heads=2, mlp_ratio=4.0, output_dim=24, no_ln_pre=True,
        pool_type="avg", final_ln_after_pool=True, output_tokens=True, norm_layer=norm,
    )  # fmt: skip
    theirs.conv1 = torch.nn.Conv2d(16, 32, 2, stride=2, bias=False)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    state = {ours.removeprefix("encoder."): theirs.state_dict()[name] for name, ours in released_names(2)}
    state["projection.weight"] = state["projection.weight"].T
    ours = VisionEncoder(dataclasses.replace(CONFIG, stored_positions=True))
    ours.load_state_dict(state)
    assert len(state) == len(theirs.state_dict())
    latents = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        pooled, tokens = theirs.eval()(latents)
        torch.testing.assert_close(ours.eval()(latents), tokens, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.pool(tokens), pooled, atol=1e-5, rtol=1e-5)
