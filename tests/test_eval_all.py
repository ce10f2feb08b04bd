"""The linear probe, and all figures together: equal at each run, whatever the batches, honest about what is missing."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_models import Oracle, random_model
from PIL import Image

from openvision3.config import OpenVisionError, SceneConfig
from openvision3.evaluation.evaluate import PARTS, evaluate_all, flat_figures
from openvision3.evaluation.perceptual import SMALLEST_SIDE
from openvision3.evaluation.probe import fit_and_score, held_out, probe
from openvision3.evaluation.samples import open_samples, scene_samples

FEW = SceneConfig(num_names=4)


class MeanDistance(torch.nn.Module):
    """Stands in for LPIPS where its number does not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a - b).abs().mean(dim=(1, 2, 3)) * self.weight


def figures_of(batch_size: int = 8, **changes: object) -> dict:
    options: dict = {"samples": 20, "scenes": FEW, "probe_per_label": 4, "perceptual": MeanDistance(), **changes}
    return evaluate_all(random_model(), batch_size=batch_size, **options)


def test_probe_finds_what_is_linear() -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 20)
    features = generator.normal(size=(60, 5)) + 6 * np.eye(3, 5)[labels]
    scores = fit_and_score((features[::2], labels[::2]), (features[1::2], labels[1::2]))
    assert scores["top1"] > 0.9
    shuffled = fit_and_score((features[::2], generator.permutation(labels[::2])), (features[1::2], labels[1::2]))
    assert shuffled["top1"] < 0.7
    with pytest.raises(OpenVisionError, match="two labels"):
        fit_and_score((features[:5], labels[:5]), (features, labels))


def test_probe_on_scenes_beats_chance_even_on_random_weights() -> None:
    samples = scene_samples(40, 32, FEW)
    figures = probe(random_model(), samples, per_label=12)
    assert figures["chance_top1"] == 0.25 and figures["n_train"] == 48
    assert figures["n"] == sum(sample.label >= 0 for sample in samples)
    assert figures["train_top1"] > 0.4
    assert "seed 2000" in figures["protocol"]


def test_probe_on_a_labelled_folder(tmp_path: Path) -> None:
    for name, colour in (("red", (200, 20, 20)), ("blue", (20, 20, 200))):
        (tmp_path / name).mkdir()
        for i in range(12):
            Image.new("RGB", (40, 32), tuple(c + i for c in colour)).save(tmp_path / name / f"{i}.png")
    samples = open_samples(str(tmp_path), 32)
    assert samples.labels == ("blue", "red")
    assert held_out(np.asarray([5, 5, 7, 5, 5, 7])).tolist() == [False] * 4 + [True, False]
    figures = probe(random_model(), samples)
    assert (figures["n"], figures["n_train"]) == (6, 18)
    assert figures["top1"] == 1.0


def test_every_part_in_one_pass_and_the_same_again() -> None:
    figures = figures_of()
    assert set(PARTS) <= set(figures) and "reconstruction_landscapes" in figures
    assert figures == figures_of()
    for part in PARTS:
        assert figures[part]["protocol"] and figures[part]["n"] > 0, part
    assert figures["data"]["seed"] == 1000 and figures["data"]["n"] == 20
    assert "demo scenes of 4 names, split scenes-v1, seed 1000" in figures["data"]["protocol"]
    json.loads(json.dumps(figures, allow_nan=False))  # no NaN, which JSON has not
    flat = flat_figures(figures)
    assert flat["reconstruction/psnr"] == figures["reconstruction"]["psnr"]
    assert all(isinstance(value, float) for value in flat.values())


def test_batches_do_not_change_the_figures() -> None:
    one, other = flat_figures(figures_of(batch_size=20)), flat_figures(figures_of(batch_size=3))
    assert one.keys() == other.keys()
    for name in one:
        assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-4), name


def test_each_picture_is_encoded_once_and_the_model_left_as_it_was() -> None:
    samples = scene_samples(20, 32, FEW)
    oracle = Oracle(samples)
    oracle.train()
    evaluate_all(oracle, samples, ["reconstruction", "retrieval", "captioning"], batch_size=8, landscapes=False)
    assert oracle.batch_sizes == [8, 8, 4]
    assert oracle.training and torch.is_grad_enabled()


def test_progress_counts_samples() -> None:
    seen: list[int] = []
    figures_of(parts=["captioning"], progress=seen.append)
    assert seen == [8, 16, 20]


def test_missing_parts_are_left_out_with_their_reason() -> None:
    model = random_model(decoder=None, text_encoder=None)
    figures = evaluate_all(model, samples=8, scenes=FEW, probe_per_label=4)
    assert set(figures) == {"data", "model", "captioning", "probe", "left_out"}
    assert set(figures["left_out"]) == {"reconstruction", "zeroshot", "retrieval"}
    with pytest.raises(OpenVisionError, match="no latent decoder"):
        evaluate_all(model, samples=8, parts=["reconstruction"])


def test_wrong_wishes() -> None:
    model = random_model()
    with pytest.raises(OpenVisionError, match="no part 'captions'"):
        evaluate_all(model, parts=["captions"])
    with pytest.raises(OpenVisionError, match="multiple of 16"):
        evaluate_all(model, size=40)
    with pytest.raises(OpenVisionError, match="no data to evaluate on"):
        evaluate_all(model, "/nowhere/at-all")
    with pytest.raises(OpenVisionError, match="batch size"):
        evaluate_all(model, batch_size=0, samples=2, parts=["captioning"])


def test_lpips_of_real_weights_where_they_can_be_had() -> None:
    from openvision3.assets import fetch

    try:
        fetch("lpips-alex")
    except OpenVisionError as error:
        pytest.skip(str(error))
    assert SMALLEST_SIDE["alex"] <= 32
    figures = evaluate_all(random_model(), samples=4, parts=["reconstruction"], landscapes=False)
    part = figures["reconstruction"]
    assert 0 < part["lpips"] < 2 and 0 < part["vae_lpips"] < 2
    assert part["lpips_gap"] == pytest.approx(part["lpips"] - part["vae_lpips"])


def test_frozen_benchmark_is_named_only_when_it_is() -> None:
    assert "frozen benchmark" in scene_samples(3, 16).protocol
    for config in (replace(SceneConfig(), size_min=0.3), FEW):
        assert "frozen benchmark" not in scene_samples(3, 16, config).protocol


def test_tars_give_the_figures_of_the_scenes_they_hold(tmp_path: Path) -> None:
    from openvision3.data import grammar
    from openvision3.data.samples import Sample
    from openvision3.data.writing import write_shards

    scenes = scene_samples(12, 32, FEW)
    written = []
    for sample in scenes:
        assert sample.scene is not None
        written.append(Sample(sample.key, sample.image, sample.alt, sample.caption, grammar.describe(sample.scene)))
    write_shards(written, tmp_path / "tars", samples_per_shard=5)
    tars = open_samples(str(tmp_path / "tars"), 32)
    assert [sample.key for sample in tars] == [sample.key for sample in scenes]
    parts = ["reconstruction", "retrieval", "captioning"]
    of_tars, of_scenes = (
        evaluate_all(Oracle(scenes), data, parts, landscapes=False, perceptual=MeanDistance())
        for data in (tars, scenes)
    )
    assert [of_tars[part] for part in parts] == [of_scenes[part] for part in parts]
    assert [sample.key for sample in open_samples(str(tmp_path / "tars"), 16, samples=3)] == [
        scene.key for i, scene in enumerate(scenes) if i in (0, 4, 8)
    ]
    cut = tmp_path / "tars" / "000002.tar"
    cut.write_bytes(cut.read_bytes()[:-12_000])
    (tmp_path / "tars" / "000002.idx.json").unlink(missing_ok=True)
    broken = open_samples(str(tmp_path / "tars"), 32)
    assert len(list(broken)) < 12 and "000002.tar" in broken.failed[0][0]
