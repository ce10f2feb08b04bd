"""Feature networks and distances between sets of pictures."""

import hashlib
import io
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from openvision3.config import OpenVisionError
from openvision3.evaluation import fidelity
from openvision3.evaluation.fidelity import (
    EffNetLite0,
    FeatureNetwork,
    Statistics,
    extract_features,
    frechet_distance,
    kernel_distance,
    load_classifier,
    load_effnet_lite0,
    load_inception,
    statistics,
)

SPRITES = Path(fidelity.__file__).parents[1] / "data/assets/sprites"


@pytest.fixture(scope="module")
def effnet() -> EffNetLite0:
    return load_effnet_lite0()


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def sprite(name: str, size: int) -> torch.Tensor:
    """A cut-out picture on white, uint8 (1, 3, size, size)."""
    cut_out = Image.open(SPRITES / f"{name}.webp").convert("RGBA")
    side = max(cut_out.size)
    picture = Image.new("RGBA", (side, side), "white")
    picture.alpha_composite(cut_out, ((side - cut_out.width) // 2, (side - cut_out.height) // 2))
    return torch.from_numpy(np.array(picture.convert("RGB").resize((size, size)))).permute(2, 0, 1)[None]


def test_weights_lie_where_they_belong() -> None:
    """The network names what it sees, which a wrong order of the weights or a wrong normalisation would spoil."""
    beach = Image.open(SPRITES.parent / "backgrounds/beach1.webp").convert("RGB").resize((224, 224))
    pictures = [sprite("teapot", 224), sprite("lemon", 224), torch.from_numpy(np.array(beach)).permute(2, 0, 1)[None]]
    with torch.no_grad():
        probabilities = load_classifier()(torch.cat(pictures) / 127.5 - 1).softmax(dim=1)
    teapot, lemon, coast = 849, 951, [972, 976, 977, 978]  # classes of ImageNet; a cliff, promontory, sandbar, seashore
    assert probabilities.argmax(dim=1)[:2].tolist() == [teapot, lemon]
    assert probabilities[2, coast].sum() > 0.8


def test_features_are_the_classifiers_pooled_input(effnet: EffNetLite0) -> None:
    classifier, picture = load_classifier(), sprite("zebra", 224)  # at 224 px nothing is resized
    with torch.no_grad():
        features = effnet(picture)
        torch.testing.assert_close(classifier.classifier(features), classifier(picture / 127.5 - 1))
    assert features.shape == (1, 1280) and features.dtype == torch.float32
    assert not any(module.training for module in effnet.train().modules())


def test_features_do_not_depend_on_batches(effnet: EffNetLite0) -> None:
    images = noise(19, 3, 40, 40)
    whole = extract_features([images], effnet)
    assert whole.shape == (19, 1280)
    assert torch.equal(whole, extract_features(images.split(1), effnet))
    assert torch.equal(whole, extract_features(images.split(7), effnet))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(whole, extract_features([images], effnet))


class Pixels(FeatureNetwork):
    """The picture itself as the feature vector."""

    name, protocol = "Pixels", ""

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.uint8
        return images.flatten(1).float()


def test_pictures_are_rounded_not_truncated() -> None:
    levels = torch.tensor([0.0, 0.4, 0.6, 254.4, 254.6, 255.0, 300.0, -20.0, 127.4])
    images = (levels / 127.5 - 1).reshape(1, 1, 3, 3).expand(2, 3, 3, 3)
    features = extract_features([images], Pixels())
    assert features[0, :9].tolist() == [0, 0, 1, 254, 255, 255, 255, 0, 127]
    as_uint8 = torch.arange(54, dtype=torch.uint8).reshape(2, 3, 3, 3)
    assert torch.equal(extract_features([as_uint8], Pixels()), as_uint8.flatten(1).float())


@pytest.mark.parametrize(
    "batches",
    [
        [],
        [torch.zeros(1, 3, 4, 4)],
        [torch.zeros(2, 1, 4, 4)],
        [torch.zeros(2, 3, 4, 6)],
        [torch.zeros(3, 4, 4)],
        [torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 8, 8)],
        [torch.full((2, 3, 4, 4), math.nan)],
    ],
)
def test_sets_that_can_not_be_compared(batches: list[torch.Tensor]) -> None:
    with pytest.raises(OpenVisionError):
        extract_features(batches, Pixels())


def test_frechet_distance_of_known_gaussians() -> None:
    a = Statistics(torch.tensor([0.0, 0.0]).double(), torch.diag(torch.tensor([1.0, 4.0])).double(), 9)
    b = Statistics(torch.tensor([3.0, 4.0]).double(), torch.diag(torch.tensor([9.0, 1.0])).double(), 9)
    # |m|^2 = 25; per axis (sigma1 - sigma2)^2 = (1 - 3)^2 + (2 - 1)^2
    assert frechet_distance(a, b) == pytest.approx(30.0, abs=1e-12)
    assert frechet_distance(b, a) == pytest.approx(30.0, abs=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("count", [200, 20])  # the latter: fewer pictures than features, singular covariances
def test_frechet_distance_equals_the_textbook_formula(count: int) -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(count, 32)), generator.normal(size=(count, 32)) @ generator.normal(size=(32, 32)) + 1
    c1, c2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.real(np.asarray(scipy.linalg.sqrtm(c1 @ c2)))
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(c1 + c2 - 2 * root)
    a, b = statistics(torch.from_numpy(x)), statistics(torch.from_numpy(y))
    assert a.count == count and a.covariance.dtype == torch.float64
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-5)


def test_statistics_are_float64() -> None:
    """A small spread around a large mean is lost when summed in fp32."""
    features = 1000 + torch.tensor([[0.0], [0.25]]).repeat(5000, 1)
    assert statistics(features).mean.item() == 1000.125
    assert statistics(features).covariance.item() == pytest.approx(0.125**2 * 10000 / 9999, rel=1e-9)


def test_kernel_distance_of_a_hand_computed_case() -> None:
    a, b = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [3.0]])
    # k(x, y) = (xy + 1)^3: k(1,2) = 27; k(0,3) = 1; across: 1, 64, 1, 343 with mean 102.25
    assert kernel_distance(a, b) == (27 + 1 - 2 * 102.25, 0.0)


def test_kernel_distance_by_subsets() -> None:
    a, b = noise(300, 8), noise(300, 8, seed=1) + 0.5
    exact, none = kernel_distance(a, b)
    mean, std = kernel_distance(a, b, subset_size=100, num_subsets=50)
    assert none == 0 and std > 0
    assert mean == pytest.approx(exact, rel=0.1)
    assert kernel_distance(a, b, subset_size=100, num_subsets=50) == (mean, std)
    same, _ = kernel_distance(a, noise(300, 8, seed=2))
    assert abs(same) < exact / 50


def test_scores_grow_with_the_damage_and_are_named_after_their_network(effnet: EffNetLite0) -> None:
    names = ["lion", "zebra", "banana", "tiger", "panda"]
    originals = torch.cat([sprite(name, 96) for name in names])
    blurred = torch.nn.functional.avg_pool2d(originals.float(), 3, 1, 1).to(torch.uint8)
    worse = torch.nn.functional.avg_pool2d(originals.float(), 9, 1, 4).to(torch.uint8)
    a, b, c = (extract_features([images], effnet) for images in (originals, blurred, worse))
    equal, near, far = (fidelity.fidelity(a, other, effnet) for other in (a, b, c))
    assert list(near) == ["FD-EffNetLite0", "KID-EffNetLite0"]
    assert equal["FD-EffNetLite0"] == pytest.approx(0, abs=1e-4)
    assert 0.01 < near["FD-EffNetLite0"] < far["FD-EffNetLite0"]
    assert near["KID-EffNetLite0"] < far["KID-EffNetLite0"]
    assert "5 originals" in fidelity.fidelity_protocol(a, b, effnet)


def test_inception_says_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OV3_CACHE", str(tmp_path))
    monkeypatch.delenv("OV3_ASSETS", raising=False)
    with pytest.raises(OpenVisionError, match=rf"weights-inception.*https://.*{tmp_path}"):
        load_inception()
    with pytest.raises(OpenVisionError, match="no Inception weights at"):
        load_inception(tmp_path / "nowhere.pth")
    (tmp_path / fidelity.INCEPTION_FILE).write_bytes(b"another file")
    with pytest.raises(OpenVisionError, match="sha256"):
        load_inception()


def test_inception_through_torch_fidelity(tmp_path: Path) -> None:
    """With random weights in the shape of the real ones, which no package index has."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    empty = module.FeatureExtractorInceptionV3.__new__(module.FeatureExtractorInceptionV3)
    saved: dict[str, torch.Tensor] = {}

    def keep(self: torch.nn.Module, state: object) -> None:
        saved.update(self.state_dict())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", keep)
        patch.setattr(module.torch, "load", lambda *args, **kwargs: {})
        empty.__init__("random", ["2048"], feature_extractor_weights_path="unused")
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    path = tmp_path / "inception.pth"
    path.write_bytes(buffer.getvalue())
    state = torch.get_rng_state()
    network = load_inception(path, sha256=hashlib.sha256(buffer.getvalue()).hexdigest())
    assert torch.equal(state, torch.get_rng_state())
    features = extract_features([noise(3, 3, 32, 32)], network)
    assert features.shape == (3, 2048)
    assert list(fidelity.fidelity(features, features, network)) == ["FID", "KID"]


def test_inception_weights_that_are_a_program_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity")
    path = tmp_path / "inception.pth"
    torch.save({"weight": print}, path)
    with pytest.raises(OpenVisionError, match="not plain weights"):
        load_inception(path, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
