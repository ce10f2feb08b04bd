"""PSNR, SSIM and LPIPS against other libraries' numbers, and their policy at the edges."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_models import Oracle, random_model
from PIL import Image
from torch import Tensor

from openvision3.config import OpenVisionError
from openvision3.evaluation.reconstruction import PSNR_CAP, psnr, reconstruction, ssim
from openvision3.evaluation.samples import folder_samples, landscape_samples, scene_samples, to_uint8


def picture(seed: int, height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    channels = [(x * 7 + y * 3 + seed * 11 * c + (x * y * (c + 1)) % 23 * 5) % 256 for c in range(3)]
    return np.stack(channels, -1).astype(np.uint8)


def tensor(*pictures: np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def test_numbers_of_scikit_image() -> None:
    # structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255) and
    # peak_signal_noise_ratio of scikit-image 0.26
    a, c = picture(1, 24, 17), picture(2, 11, 40)
    b = ((a.astype(int) * 9 + picture(5, 24, 17)) // 10).astype(np.uint8)
    d = 255 - c
    assert ssim(tensor(a), tensor(b)).item() == pytest.approx(0.9717205256470649, abs=1e-12)
    assert psnr(tensor(a), tensor(b)).item() == pytest.approx(29.19609618022337, abs=1e-10)
    assert ssim(tensor(c), tensor(d)).item() == pytest.approx(-0.8379675548067661, abs=1e-12)
    assert psnr(tensor(c), tensor(d)).item() == pytest.approx(4.71788556067884, abs=1e-10)


def test_identical_pictures_and_the_smallest_difference() -> None:
    a = picture(3, 16, 16)
    b = a.copy()
    b[3, 4, 1] ^= 1
    values = psnr(tensor(a, a), tensor(a, b))
    assert values.tolist() == [PSNR_CAP, pytest.approx(10 * math.log10(255**2 * 16 * 16 * 3))]
    assert ssim(tensor(a), tensor(a)).item() == 1.0


def test_each_picture_has_its_own_value() -> None:
    a, b, c = picture(1, 16, 16), picture(2, 16, 16), picture(3, 16, 16)
    both = ssim(tensor(a, b), tensor(c, c))
    assert both.tolist() == [ssim(tensor(a), tensor(c)).item(), ssim(tensor(b), tensor(c)).item()]
    assert psnr(tensor(a, b), tensor(c, c))[1] == psnr(tensor(b), tensor(c))[0]


def test_ssim_says_that_a_picture_is_too_small() -> None:
    with pytest.raises(OpenVisionError, match="at least 11 px"):
        ssim(tensor(picture(1, 10, 30)), tensor(picture(1, 10, 30)))


def test_rounding_to_8_bits_never_truncates() -> None:
    images = torch.tensor([-1.7, -1.0, 0.9962, 0.9999, 1.3, 0.0])
    assert to_uint8(images).tolist() == [0, 0, 255, 255, 255, 128]
    with pytest.raises(OpenVisionError, match="NaN"):
        to_uint8(torch.tensor([0.0, math.nan]))


def test_exact_reconstruction_is_capped_and_counted() -> None:
    samples = scene_samples(5, 32)
    figures = reconstruction(Oracle(samples), samples, batch_size=2)
    assert (figures["psnr"], figures["ssim"], figures["identical"], figures["n"]) == (PSNR_CAP, 1.0, 5, 5)
    assert "vae_psnr" not in figures  # the oracle has no VAE
    assert "capped at 100 dB" in figures["protocol"]


def test_model_beside_its_vae() -> None:
    model, samples = random_model(), scene_samples(5, 32)
    figures = reconstruction(model, samples, batch_size=2)
    images = torch.from_numpy(np.stack([sample.image for sample in samples])).permute(0, 3, 1, 2)
    with torch.no_grad():
        inputs = images.float() / 127.5 - 1
        by_hand = to_uint8(model.decode(model.encode(inputs))), to_uint8(model.vae.decode(model.vae.encode(inputs)))  # type: ignore[union-attr]
    assert figures["psnr"] == pytest.approx(psnr(images, by_hand[0]).mean().item(), abs=1e-3)
    assert figures["vae_psnr"] == pytest.approx(psnr(images, by_hand[1]).mean().item(), abs=1e-3)
    assert figures["vae_ssim"] == pytest.approx(ssim(images, by_hand[1]).mean().item(), abs=1e-4)
    assert figures["psnr_gap"] == figures["vae_psnr"] - figures["psnr"]
    assert figures["psnr"] != figures["vae_psnr"]


def test_distances_of_sets_do_not_depend_on_batches() -> None:
    from openvision3.evaluation.fidelity import FeatureNetwork, extract_features, fidelity

    class Colours(FeatureNetwork):
        name, protocol = "Colours", "mean colours"

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, images: Tensor) -> Tensor:
            return images.float().mean(dim=(2, 3)) * self.weight

    model, samples = random_model(), scene_samples(20, 32)
    with torch.no_grad():
        network = Colours()
        one, other = (reconstruction(model, samples, size, network=network) for size in (5, 20))
        originals = torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2)
        vae = model.vae
        assert vae is not None
        outputs = vae.decode(vae.encode(originals.float() / 127.5 - 1))
        features = [extract_features([pictures], network) for pictures in (originals, outputs)]
        expected = fidelity(features[0], features[1], network)
    assert one["FD-Colours"] == pytest.approx(other["FD-Colours"], rel=1e-3)
    assert one["vae_FD-Colours"] == pytest.approx(expected["FD-Colours"], rel=1e-3)
    assert one["vae_KID-Colours"] == pytest.approx(expected["KID-Colours"], rel=1e-3)
    assert "mean colours" in one["protocol"]


def test_a_model_without_decoder_says_so() -> None:
    with pytest.raises(OpenVisionError, match="no latent decoder"):
        reconstruction(random_model(decoder=None), scene_samples(2, 32))


def test_landscapes_are_102_pictures() -> None:
    samples = landscape_samples(32)
    keys = [sample.key for sample in samples]
    assert len(keys) == len(set(keys)) == 102
    assert [sample.key for sample in samples] == keys  # can be gone through again


def test_folder_of_any_pictures(tmp_path: Path) -> None:
    wide = np.zeros((40, 90, 3), np.uint8)
    wide[:, 15:75] = 200  # the centre square and a margin
    Image.fromarray(wide).save(tmp_path / "wide.png")
    (tmp_path / "cat").mkdir()
    Image.fromarray(wide.transpose(1, 0, 2).copy()).save(tmp_path / "cat" / "tall.PNG")
    (tmp_path / "cat" / "tall.txt").write_text("a cat\n")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    samples = folder_samples(tmp_path, 16)
    found = list(samples)
    assert [sample.key for sample in found] == ["cat/tall.PNG", "wide.png"]
    assert [sample.label for sample in found] == [0, -1] and samples.labels == ("cat",)
    assert found[0].caption == "a cat"
    assert all(sample.image.shape == (16, 16, 3) and (sample.image == 200).all() for sample in found)
    ((path, reason),) = samples.failed
    assert path.endswith("broken.jpg") and "\n" not in reason
    assert [sample.key for sample in folder_samples(tmp_path, 16, samples=2)] == ["cat/tall.PNG"]  # 0 and 1 of 3


def test_folder_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(OpenVisionError, match="holds no pictures"):
        folder_samples(tmp_path, 16)
    (tmp_path / "broken.jpg").write_bytes(b"")
    with pytest.raises(OpenVisionError, match="not one picture"):
        reconstruction(random_model(), folder_samples(tmp_path, 16))
