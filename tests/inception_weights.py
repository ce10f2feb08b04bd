"""Weights in the shape of FID's Inception, for machines that can't have the real ones: random, and alive.

Plain random weights let every picture come out almost alike. Here the norms are set by real pictures, and the last
layer is enlarged, so that features vary and classes are told apart.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def random_inception(path: Path, pictures: Tensor) -> str:
    """Writes random weights to a file and returns its sha256; `pictures` (N, 3, S, S) in uint8 set the norms."""
    import torch_fidelity.feature_extractor_inceptionv3 as module

    made: list[Any] = []
    load = torch.nn.Module.load_state_dict
    module_class: Any = module.FeatureExtractorInceptionV3
    read = module.torch.load
    try:
        module_class.load_state_dict = lambda self, state: made.append(self)
        module.torch.load = lambda *args, **kwargs: {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = module_class("random", ["logits_unbiased"], feature_extractor_weights_path="unused")
    finally:
        module_class.load_state_dict = load
        module.torch.load = read
    norms = [part for part in network.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        logits = network(pictures)[0]
        network.fc.weight.mul_(3 / logits.std())
    for norm in norms:
        norm.eval()
    torch.save(network.state_dict(), path)
    return hashlib.sha256(path.read_bytes()).hexdigest()
