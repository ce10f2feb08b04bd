"""All that scores of generated pictures read out of one Inception: pooled features, class logits, a spatial map.

The spatial features of sFID (Nash et al., 2021) are those of ADM's evaluator: the first 7 channels of the 17 x 17 map
`mixed_6/conv` of TensorFlow's graph. torch-fidelity's conversion calls that block `Mixed_6d`, and the convolution, with
its norm and ReLU, `branch1x1`: also the first channels of the block's output.
"""

from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from openvision3.evaluation.fidelity import FeatureNetwork, Inception

POOLED, LOGITS, SPATIAL = 2048, 1008, 7 * 17 * 17


class InceptionParts(NamedTuple):
    """Features of N pictures in fp32: pooled (N, 2048), logits without bias (N, 1008), spatial (N, 2023)."""

    pooled: Tensor
    logits: Tensor
    spatial: Tensor


class GenerationInception(FeatureNetwork):
    """The network of FID with its logits and spatial features behind the pooled ones: (B, 5079) in one forward pass.

    The logits have no bias, as torch-fidelity's and ADM's Inception Score define them. Spatial features are flattened
    row by row with channels last, the order of ADM's stored statistics.
    """

    name = "Inception"
    protocol = Inception.protocol

    def __init__(self, inception: Inception) -> None:
        super().__init__()
        self.network: Any = inception.network
        self.network.features_list = ["2048", "logits_unbiased"]
        self._map: Tensor | None = None
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
        self._map = output[:, :7].float()

    def forward(self, images: Tensor) -> Tensor:
        pooled, logits = self.network(images)
        assert self._map is not None
        spatial, self._map = rearrange(self._map, "b c h w -> b (h w c)"), None
        assert (pooled.shape[1], logits.shape[1], spatial.shape[1]) == (POOLED, LOGITS, SPATIAL)
        return torch.cat([pooled, logits, spatial], dim=1)


def split_parts(features: Tensor) -> InceptionParts:
    """The three parts of a `GenerationInception`'s features (N, 5079)."""
    return InceptionParts(*features.split([POOLED, LOGITS, SPATIAL], dim=1))
