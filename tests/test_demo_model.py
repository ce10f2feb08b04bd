"""The embedded demo model: it loads, is as small as promised, and does what its card says on a few held-out scenes."""

import torch

import openvision3
from openvision3.evaluation.evaluate import evaluate_all
from openvision3.hub.load import DEMO_FOLDER


def test_the_embedded_demo_model_reconstructs_names_and_describes() -> None:
    model = openvision3.load("demo", device="cpu")
    assert (DEMO_FOLDER / "model.safetensors").stat().st_size <= 14_000_000
    figures = evaluate_all(model, parts=("zeroshot", "captioning"), samples=48)
    assert figures["zeroshot"]["bare_top1"] > 0.6 and figures["captioning"]["one_set"] > 0.6, figures
    assert figures["captioning"]["relation_right"] > 0.5, figures  # a random direction: 0.29
    images = torch.rand(1, 3, 64, 96) * 2 - 1
    assert model.decode(model.encode(images), grid=(4, 6)).shape == images.shape
