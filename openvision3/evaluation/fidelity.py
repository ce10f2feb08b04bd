"""Fréchet and kernel distances between two sets of pictures, on named feature networks.

FID (Heusel et al., 2017) is the Fréchet distance on one certain Inception network, whose weights must be given. Where
they can't be had, the same distances on EfficientNet-Lite0 have names of their own, FD-EffNetLite0 and KID-EffNetLite0:
their scale is another, so they compare models with each other and never with a published FID.
"""

import hashlib
import io
import os
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from openvision3.assets import cache_dir, fetch
from openvision3.config import OpenVisionError
from openvision3.evaluation.samples import to_uint8

CHUNK = 16  # pictures a forward pass, whatever the caller's batches: features then can't depend on these
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class FeatureNetwork(nn.Module):
    """A frozen network from pictures to feature vectors; `name` is what scores on it are called after."""

    name: str
    protocol: str

    def train(self, mode: bool = True) -> "FeatureNetwork":
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in uint8 to features (B, D) in fp32."""
        raise NotImplementedError


class EffNetLite0(FeatureNetwork):
    """EfficientNet-Lite0's 1,280 pooled features, before its classifier."""

    name = "EffNetLite0"
    protocol = "EfficientNet-Lite0 (ImageNet), 1280 pooled features, pictures resized to 224 px antialiased bicubic"

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        # Enlarging or shrinking can overshoot 0 and 255: rounding to a picture again, as an image library would.
        resized = F.interpolate(images.float(), size=(224, 224), mode="bicubic", align_corners=False, antialias=True)
        pixels = resized.round().clamp(0, 255) / 127.5 - 1
        return self.network(pixels).float()


class Inception(FeatureNetwork):
    """Inception's 2,048 pooled features as FID defines them, through torch-fidelity."""

    name = "Inception"
    protocol = "torch-fidelity's Inception of 2015-12-05, 2048 pooled features, its own resizing to 299 px"

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[0].float()


def load_effnet_lite0(device: torch.device | str = "cpu") -> EffNetLite0:
    """EfficientNet-Lite0 with its ImageNet weights, fetched at the first use. Raises `OpenVisionError` without them."""
    network = load_classifier()
    network.reset_classifier(0)  # its output: the pooled features
    return EffNetLite0(network).to(device)


def load_classifier() -> Any:
    """EfficientNet-Lite0 as timm's module, still with its 1,000 ImageNet classes, in evaluation mode.

    Takes pictures (B, 3, 224, 224) in [-1, 1].
    """
    stored = load_file(fetch("efficientnet-lite0"))
    import timm  # slow to import

    with torch.device("meta"):
        network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    # The stored names are another library's; their order, kept by a number in front of each, is timm's.
    values = [stored[name] for name in sorted(stored)]
    network.load_state_dict(dict(zip(network.state_dict(), values, strict=True)), assign=True)
    return network.eval()


def inception_path(path: str | Path = "") -> Path | None:
    """Where Inception's weights are: the path given, else the file of that name in the cache or in `OV3_ASSETS`.

    None where no path is given and neither folder has it. Raises `OpenVisionError` where the path given is no file.
    """
    if path:
        if not (given := Path(path).expanduser()).is_file():
            raise OpenVisionError(f"there are no Inception weights at {given}; {_how_to_get_inception()}")
        return given
    folders = [cache_dir(), *([Path(assets).expanduser()] if (assets := os.environ.get("OV3_ASSETS")) else [])]
    return next((folder / INCEPTION_FILE for folder in folders if (folder / INCEPTION_FILE).is_file()), None)


def load_inception(
    path: str | Path = "", device: torch.device | str = "cpu", sha256: str = INCEPTION_SHA256
) -> Inception:
    """The network of FID from a file of its weights (`inception_path`), which is never downloaded.

    Raises `OpenVisionError` without the file or without torch-fidelity, or where the sha256 differs.
    """
    found = inception_path(path)
    if found is None:
        raise OpenVisionError(f"FID needs Inception's weights: {_how_to_get_inception()}")
    content = found.read_bytes()
    if (digest := hashlib.sha256(content).hexdigest()) != sha256:
        raise OpenVisionError(f"{found} is not the network of FID: its sha256 is {digest}, expected {sha256}")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise OpenVisionError("FID needs torch-fidelity: pip install 'openvision3[eval]'") from None
    # torch-fidelity reads with the unsafe unpickler: first see that the same bytes hold nothing but tensors.
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError):
        raise OpenVisionError(f"{found} holds something that is not plain weights: refused") from None
    with torch.random.fork_rng(devices=[]):
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=io.BytesIO(content)
        )
    return Inception(network).to(device)


class FeatureCollector:
    """Gathers the features of pictures that come in batches of any size.

    Pictures wait until `CHUNK` of them go through the network together, so that features do not depend on the
    caller's batches, not even in the last bit.
    """

    def __init__(self, network: FeatureNetwork) -> None:
        self.network = network
        self.device = next(network.parameters()).device
        self._shape: torch.Size | None = None
        self._waiting: list[Tensor] = []
        self._features: list[Tensor] = []

    def update(self, images: Tensor) -> None:
        """Takes pictures (B, 3, S, S), in [-1, 1] or uint8; raises `OpenVisionError` where they are not square."""
        if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
            raise OpenVisionError(f"expected a batch of square pictures (B, 3, S, S), got {tuple(images.shape)}")
        self._shape = self._shape or images.shape[1:]
        if images.shape[1:] != self._shape:
            raise OpenVisionError(f"pictures of one set must have one size, got {tuple(images.shape)} after others")
        pixels = images if images.dtype == torch.uint8 else to_uint8(images)
        self._waiting.extend(pixels.cpu())
        while len(self._waiting) >= CHUNK:
            self._run()

    def features(self) -> Tensor:
        """All features (N, D) in fp32 on the CPU, in the pictures' order. Raises `OpenVisionError` below 2 pictures."""
        if self._waiting:
            self._run()
        if (count := sum(map(len, self._features))) < 2:
            raise OpenVisionError(f"distances between sets of pictures need at least 2 pictures, got {count}")
        return torch.cat(self._features)

    @torch.no_grad()
    def _run(self) -> None:
        images = torch.stack(self._waiting[:CHUNK]).to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            self._features.append(self.network(images).cpu())
        del self._waiting[:CHUNK]


def extract_features(batches: Iterable[Tensor], network: FeatureNetwork) -> Tensor:
    """Features (N, D) in fp32, on the CPU, of all pictures in the batches: see `FeatureCollector`."""
    collector = FeatureCollector(network)
    for batch in batches:
        collector.update(batch)
    return collector.features()


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and covariance (D, D) of features, in float64, and the number of pictures behind them."""

    mean: Tensor
    covariance: Tensor
    count: int


def statistics(features: Tensor) -> Statistics:
    """Mean and unbiased covariance, in float64, of features (N, D), N >= 2."""
    features = features.double()
    return Statistics(features.mean(dim=0), torch.atleast_2d(torch.cov(features.T)), len(features))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Fréchet distance of two Gaussians: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), in float64; 0 or more.

    Source: Heusel et al., 2017 (https://arxiv.org/abs/1706.08500), Eq. 6.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # C1 C2 has the eigenvalues of the symmetric C1^(1/2) C2 C1^(1/2), whose square root's trace is real and stable.
    product = root @ b.covariance @ root
    trace_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * trace_root
    return max(float(distance), 0.0)  # rounding can leave equal sets just below 0


def kernel_distance(
    a: Tensor, b: Tensor, subset_size: int = 1000, num_subsets: int = 100, seed: int = 0
) -> tuple[float, float]:
    """Kernel distance (unbiased squared MMD, cubic kernel) of features (N, D) and (M, D): mean and std over subsets.

    Each subset draws `subset_size` pictures of either set without repetition. Where a set has no more, both are used
    whole, once, and the std is 0. May be slightly negative: it is unbiased. Computed in float64.
    Source: Binkowski et al., 2018 (https://arxiv.org/abs/1801.01401), Eq. 4.
    """
    a, b = a.double(), b.double()
    if min(len(a), len(b)) <= subset_size:
        return _squared_mmd(a, b), 0.0
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor(
        [
            _squared_mmd(
                a[torch.randperm(len(a), generator=generator)[:subset_size]],
                b[torch.randperm(len(b), generator=generator)[:subset_size]],
            )
            for _ in range(num_subsets)
        ],
        dtype=torch.float64,
    )
    return float(values.mean()), float(values.std(correction=0))


def fidelity(a: Tensor, b: Tensor, network: FeatureNetwork) -> dict[str, float]:
    """Fréchet and kernel distance of the features (N, D) and (M, D) of two sets of pictures, N and M >= 2.

    The keys name the network: `FD-EffNetLite0` and `KID-EffNetLite0`, or, on Inception only, `FID` and `KID`.
    """
    frechet, kernel = f"FD-{network.name}", f"KID-{network.name}"
    if isinstance(network, Inception):
        frechet, kernel = "FID", "KID"
    return {frechet: frechet_distance(statistics(a), statistics(b)), kernel: kernel_distance(a, b)[0]}


def fidelity_protocol(a: Tensor, b: Tensor, network: FeatureNetwork) -> str:
    """How `fidelity` measures, in words, to stand beside its figures."""
    return (
        f"{len(a)} originals against {len(b)} outputs, rounded to uint8; {network.protocol}; features in fp32, "
        "statistics in float64; kernel distance: cubic kernel, unbiased, mean of 100 subsets of 1000 (one of all where "
        "a set has no more), seed 0"
    )


def _squared_mmd(a: Tensor, b: Tensor) -> float:
    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def mean_of_pairs(x: Tensor) -> Tensor:
        gram = kernel(x, x)
        return (gram.sum() - gram.diagonal().sum()) / (len(x) * (len(x) - 1))

    return float(mean_of_pairs(a) + mean_of_pairs(b) - 2 * kernel(a, b).mean())


def _how_to_get_inception() -> str:
    return (
        f"put {INCEPTION_FILE} ({INCEPTION_URL}, sha256 {INCEPTION_SHA256[:8]}...) into {cache_dir()}, or give its path"
    )
