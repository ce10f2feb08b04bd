"""Scores of generated pictures, against torch-fidelity's own where it has them and direct computations elsewhere."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inception_weights import random_inception
from PIL import Image
from torch import Tensor

from openvision3.config import OpenVisionError, SceneConfig
from openvision3.data import demo
from openvision3.evaluation import fidelity, inception, picture_sets
from openvision3.evaluation.bootstrap import kernel_estimate
from openvision3.evaluation.fidelity import FeatureNetwork, extract_features, kernel_distance, load_inception
from openvision3.evaluation.generated import evaluate_generated, inception_score
from openvision3.evaluation.inception import GenerationInception, split_parts
from openvision3.evaluation.manifold import precision_recall
from openvision3.evaluation.picture_sets import open_generated, open_reference

SIZE, COUNT = 64, 12


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders of scenes: generated ones stand-ins, and real ones."""
    made = []
    for name in ("generated", "real"):
        folder = tmp_path_factory.mktemp(name)
        for i in range(COUNT):
            scene = demo.scene(SceneConfig(), f"test-{name}", 0, i)
            Image.fromarray(demo.render(scene, SIZE)).save(folder / f"{i:03}.png")
        made.append(folder)
    return made[0], made[1]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, folders: tuple[Path, Path]) -> tuple[Path, str]:
    pytest.importorskip("torch_fidelity")
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    pictures = torch.stack([torch.from_numpy(sample.image).permute(2, 0, 1) for sample in open_generated(folders[1])])
    return path, random_inception(path, pictures[:6])


@pytest.fixture(scope="module")
def network(weights: tuple[Path, str]) -> GenerationInception:
    return GenerationInception(load_inception(weights[0], sha256=weights[1]))


@pytest.fixture(scope="module")
def measured(folders: tuple[Path, Path], network: GenerationInception) -> tuple[dict[str, Any], np.ndarray]:
    """The scores, and all that the block Mixed_6d gave on the way: (2 * COUNT, 768, 17, 17), generated ones first."""
    maps: list[Tensor] = []
    handle = network.network.Mixed_6d.register_forward_hook(lambda *args: maps.append(args[2]))
    scores = evaluate_generated(open_generated(folders[0]), open_reference(folders[1], SIZE), network)
    handle.remove()
    return scores, torch.cat(maps).double().numpy()


def test_figures_equal_torch_fidelity(
    folders: tuple[Path, Path], weights: tuple[Path, str], measured: tuple[dict[str, Any], np.ndarray]
) -> None:
    """On the same random Inception: its real weights can't be had here. Relative 1e-5 for FID, 1e-9 for the score.

    KID within 1e-6, for theirs is computed in fp32. Their FID takes the root of covariances of few pictures, which are
    singular, with an error of some 1e-6; ours is closer to the exact one (see the test of sFID).
    """
    import torch_fidelity

    theirs = torch_fidelity.calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        cuda=False,
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        kid_subsets=1,
        kid_subset_size=COUNT,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights[0]),
        batch_size=COUNT,
        cache=False,
        verbose=False,
    )
    ours = measured[0]["figures"]
    assert ours["gFID"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    assert ours["Inception Score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert ours["Inception Score, std of parts"] == pytest.approx(theirs["inception_score_std"], rel=1e-9)
    assert ours["KID"] == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-6)
    assert ours["precision (Inception)"] == pytest.approx(theirs["precision"], abs=1e-7)
    assert ours["recall (Inception)"] == pytest.approx(theirs["recall"], abs=1e-7)
    assert ours["gFID"] > 1 and ours["Inception Score"] > 1.05  # there is something to agree on


def test_inception_score_equals_torch_fidelity() -> None:
    metric_isc = pytest.importorskip("torch_fidelity.metric_isc")
    logits = normal(103, 20, seed=0) * 3
    theirs = metric_isc.isc_features_to_metric(logits)
    expected = (theirs["inception_score_mean"], theirs["inception_score_std"])
    assert inception_score(logits) == pytest.approx(expected, rel=1e-9) and expected[0] > 3


def test_sfid_equals_a_direct_computation(measured: tuple[dict[str, Any], np.ndarray]) -> None:
    """From the whole block's output, channels first; the root's trace as singular values of the two sets' product."""
    scores, maps = measured
    assert maps.shape == (2 * COUNT, 768, 17, 17)
    made, real = maps[:COUNT, :7].reshape(COUNT, 2023), maps[COUNT:, :7].reshape(COUNT, 2023)
    a, b = ((x - x.mean(axis=0)) / math.sqrt(COUNT - 1) for x in (made, real))
    root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    expected = np.square(made.mean(axis=0) - real.mean(axis=0)).sum()
    expected += np.square(a).sum() + np.square(b).sum() - 2 * root
    assert scores["figures"]["sFID"] == pytest.approx(expected, rel=1e-6)
    assert expected > 1


def test_features_do_not_depend_on_batches_and_lie_as_adm_has_them(
    network: GenerationInception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fidelity, "CHUNK", 2)
    images = torch.randint(256, (3, 3, 24, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    maps: list[Tensor] = []
    handle = network.network.Mixed_6d.register_forward_hook(lambda *args: maps.append(args[2]))
    whole = extract_features([images], network)
    handle.remove()
    assert torch.equal(whole, extract_features(images.split(1), network))
    parts = split_parts(whole)
    assert [part.shape[1] for part in parts] == [2048, 1008, 2023] and all(part.std() > 0 for part in parts)
    last = torch.cat(maps).permute(0, 2, 3, 1)[..., :7]  # mu_s of ADM's file is in this order
    assert torch.equal(parts.spatial, last.reshape(3, -1))
    logits = parts.pooled @ network.network.fc.weight.T
    torch.testing.assert_close(parts.logits, logits, rtol=1e-4, atol=1e-4)


class SmallInception(GenerationInception):
    """Stands for it with a few features: moments of colours as pooled ones, logits and spatial ones."""

    def __init__(self) -> None:
        FeatureNetwork.__init__(self)
        self.colours = Colours()

    def forward(self, images: Tensor) -> Tensor:
        colours = self.colours(images)
        return torch.cat([colours, colours[:, :4], colours[:, 1:4] * 2], dim=1)


def test_stored_statistics_stand_for_the_pictures(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Statistics in a file such as ADM's; with its pictures beside them, and without."""
    for module, name, width in ((inception, "POOLED", 6), (inception, "LOGITS", 4), (inception, "SPATIAL", 3)):
        monkeypatch.setattr(module, name, width)
        if hasattr(picture_sets, name):
            monkeypatch.setattr(picture_sets, name, width)
    network = SmallInception()

    def scores(reference: Path) -> dict[str, Any]:
        return evaluate_generated(open_generated(folders[0]), open_reference(reference, SIZE), network)

    expected = scores(folders[1])["figures"]
    real = np.stack([sample.image for sample in open_generated(folders[1])])
    parts = split_parts(extract_features([torch.from_numpy(real).permute(0, 3, 1, 2)], network))
    stored: dict[str, np.ndarray] = {}
    for suffix, features in (("", parts.pooled), ("_s", parts.spatial)):
        stored[f"mu{suffix}"] = features.double().mean(dim=0).numpy()
        stored[f"sigma{suffix}"] = np.cov(features.double().numpy(), rowvar=False)
    np.savez(tmp_path / "stored.npz", **stored)  # pyright: ignore[reportArgumentType]
    found = scores(tmp_path / "stored.npz")
    for name in ("gFID", "sFID"):
        assert found["figures"][name] == pytest.approx(expected[name], rel=1e-9)
    assert "precision, recall, KID" in found["left_out"] and "KID" not in found["figures"]
    assert found["reference"]["n"] == 0 and found["reference"]["stored_statistics"]
    with pytest.raises(OpenVisionError, match="weights are needed"):
        evaluate_generated(open_generated(folders[0]), open_reference(tmp_path / "stored.npz", SIZE), Colours())
    shifted = stored | {"mu": stored["mu"] + 100}
    del shifted["mu_s"]
    np.savez(tmp_path / "both.npz", real, **shifted)  # pyright: ignore[reportArgumentType]
    found = scores(tmp_path / "both.npz")
    assert found["figures"]["gFID"] > expected["gFID"] + 10_000  # the file's own statistics count
    assert "sFID" in found["left_out"]
    for name in ("KID", "precision (Inception)", "recall (Inception)"):
        assert found["figures"][name] == expected[name]


class Colours(FeatureNetwork):
    """Mean and spread of each colour."""

    name, protocol = "Colours", "colours"

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.float().flatten(2)
        return torch.cat([pixels.mean(dim=2), pixels.std(dim=2)], dim=1)


def test_without_inception_the_names_change(folders: tuple[Path, Path]) -> None:
    figures = evaluate_generated(open_generated(folders[0]), open_reference(folders[1], SIZE), Colours())
    assert list(figures["figures"]) == [
        "FD-Colours",
        "precision (Colours)",
        "recall (Colours)",
        "KID-Colours",
        "KID-Colours, low end of 95 %",
        "KID-Colours, high end of 95 %",
    ]
    assert "gFID" in str(figures["left_out"]) and "colours" in figures["protocol"]
    assert figures["samples"]["n"] == figures["reference"]["n"] == COUNT and len(figures["samples"]["sha256"]) == 64
    assert {"openvision3", "torch", "numpy"} <= set(figures["versions"])


def test_inception_score_of_known_logits() -> None:
    certain = torch.eye(10).repeat(10, 1) * 1000  # each of 10 classes for certain, equally often: the score is 10
    assert inception_score(certain, splits=1) == (pytest.approx(10, rel=1e-12), 0)
    assert inception_score(torch.zeros(50, 7))[0] == pytest.approx(1)
    two = torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0]])  # p = (1/4, 3/4) and (3/4, 1/4), marginal 1/2 each
    expected = math.exp(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert inception_score(two, splits=1)[0] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(OpenVisionError, match="10 parts"):
        inception_score(torch.zeros(9, 3))


def test_class_ordered_files_do_not_deflate_the_inception_score() -> None:
    ordered = torch.eye(10).repeat_interleave(100, dim=0) * 1000  # without shuffling each part holds one class: 1
    assert inception_score(ordered)[0] > 9


def brute_force(reference: np.ndarray, samples: np.ndarray, k: int) -> tuple[float, float]:
    """By the definition: a loop over pictures and plain distances."""

    def radius(points: np.ndarray, i: int) -> float:
        return float(sorted(np.linalg.norm(points - points[i], axis=1)[np.arange(len(points)) != i])[k - 1])

    def share(points: np.ndarray, balls: np.ndarray) -> float:
        radii = [radius(balls, i) for i in range(len(balls))]
        inside = [any(np.linalg.norm(p - b) <= r for b, r in zip(balls, radii, strict=True)) for p in points]
        return float(np.mean(inside))

    return share(samples, reference), share(reference, samples)


@pytest.mark.parametrize("block", [4, 7, 2048])
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_equal_brute_force(block: int, k: int) -> None:
    reference, samples = normal(40, 3, seed=0), normal(25, 3, seed=1) * 0.7 + 0.8
    expected = brute_force(reference.double().numpy(), samples.double().numpy(), k)
    assert 0 < expected[1] < expected[0] < 1
    assert precision_recall(reference, samples, k, block) == pytest.approx(expected, abs=1e-12)
    assert precision_recall(samples, reference, k, block) == pytest.approx(expected[::-1], abs=1e-12)


def test_precision_and_recall_of_a_literal_case() -> None:
    """On a line, k = 1. Real radii: 1, 1, 9; generated radii: 0, 0, 98. A ball's edge belongs to it."""
    real, made = torch.tensor([[0.0], [1.0], [10.0]]), torch.tensor([[2.0], [2.0], [100.0]])
    # 2 and 2 lie on the edge of 1's ball, 100 in none; 10 is within 98 of 100, and 0 and 1 are not
    assert precision_recall(real, made, k=1) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    same = (normal(9, 50, seed=3) + 100).repeat(2, 1)  # every picture twice: radii are 0, and so must distances be
    assert precision_recall(same, same.flip(0)[:11], k=1, block=5) == (1, 1)
    assert precision_recall(same, same + 1e-3, k=1, block=5) == (0, 0)
    with pytest.raises(OpenVisionError, match="more than 3"):
        precision_recall(real, made)


def test_kernel_estimate_is_the_kernel_distance_of_whole_sets() -> None:
    a, b = normal(60, 8, seed=0), normal(45, 8, seed=1) + 0.3
    estimate = kernel_estimate(a, b)
    assert estimate.value == pytest.approx(kernel_distance(a, b)[0], rel=1e-9)
    assert estimate.low < estimate.value < estimate.high and (estimate.n, estimate.m) == (60, 45)
    assert kernel_estimate(a, b) == estimate
    alike = kernel_estimate(torch.ones(9, 4), torch.ones(7, 4))  # whatever is drawn, nothing differs
    assert (alike.value, alike.low, alike.high) == pytest.approx((0, 0, 0), abs=1e-12)
    few = kernel_estimate(a, b, most=30)
    assert (few.n, few.m) == (30, 30) and few.value != estimate.value


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """100 pairs of sets from two known distributions, whose distance a large pair of sets gives."""
    shift = 0.5
    truth = kernel_estimate(normal(3000, 4, seed=1001), normal(3000, 4, seed=1002) + shift, replicates=1).value
    inside, estimate = 0, partial(kernel_estimate, replicates=200)
    for seed in range(100):
        found = estimate(normal(80, 4, seed=2 * seed), normal(80, 4, seed=2 * seed + 1) + shift)
        inside += found.low <= truth <= found.high
    assert 85 <= inside <= 100
