"""LPIPS (Zhang et al., 2018, version 0.1) as a loss and as a measure.

The network is the `lpips` package's; its weights come through `openvision3.assets`. Only the last step, comparing the
features, is done here: in fp32 even under autocast, where close pictures would differ by less than bf16 resolves.
"""

import warnings
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import nn

from openvision3.assets import fetch
from openvision3.chunked import at_least_fp32
from openvision3.config import OpenVisionError

SMALLEST_SIDE = {"alex": 31, "vgg": 16}  # pixels; a smaller picture vanishes in the network's poolings


class Perceptual(nn.Module):
    """LPIPS distance between two batches of images; frozen, and always in evaluation mode."""

    def __init__(self, network: Any, net: str) -> None:
        super().__init__()
        self.network = network
        self.net = net
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "Perceptual":
        """Stays in evaluation mode: the heads' dropout would turn the measure into noise."""
        return super().train(False)

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The five feature maps of images (B, 3, H, W) in [-1, 1], each a unit vector over channels, fp32 at least."""
        return [_unit(at_least_fp32(features)) for features in self.network.net(self.network.scaling_layer(images))]

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Distances (B,) between images `a` and `b`, both (B, 3, H, W) in [-1, 1]; 0 for equal pictures.

        Gradients flow to whichever input asks for them. Raises `OpenVisionError` for shapes that differ, or sides
        below `SMALLEST_SIDE`. Source: https://arxiv.org/abs/1801.03924, Eq. 1, with the published linear heads.
        """
        if a.shape != b.shape or a.dim() != 4 or a.shape[1] != 3:
            raise OpenVisionError(
                f"LPIPS compares two batches of shape (B, 3, H, W), got {tuple(a.shape)} and {tuple(b.shape)}"
            )
        smallest = SMALLEST_SIDE[self.net]
        if min(a.shape[-2:]) < smallest:
            raise OpenVisionError(
                f"LPIPS-{self.net} needs pictures of at least {smallest} px a side, got {a.shape[-2]} x {a.shape[-1]}"
            )
        distance = at_least_fp32(a.new_zeros(a.shape[0]))
        for head, unit_a, unit_b in zip(self.network.lins, self.features(a), self.features(b), strict=True):
            weight = at_least_fp32(head.model[-1].weight)  # (1, C, 1, 1)
            distance = distance + ((unit_a - unit_b).square() * weight).sum(dim=1).mean(dim=(1, 2))
        return distance


def load_lpips(net: Literal["alex", "vgg"] = "alex") -> Perceptual:
    """Loads LPIPS v0.1 on an AlexNet or VGG16, frozen, in evaluation mode, on the CPU in fp32.

    The weights are fetched at the first use (`openvision3.assets`). Draws nothing from torch's random generators.
    Raises `OpenVisionError` for an unknown network, or where the weights can't be had.
    """
    if net not in SMALLEST_SIDE:
        raise OpenVisionError(f"LPIPS has no network {net!r}; it has {', '.join(SMALLEST_SIDE)}")
    weights = load_file(fetch(f"lpips-{net}"))
    for index in range(5):  # the package registers each head under two names
        weights[f"lins.{index}.model.1.weight"] = weights[f"lin{index}.model.1.weight"]
    # Read by the package from a constant, not from a file; given here because the meta device holds no values.
    weights["scaling_layer.shift"] = torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None]
    weights["scaling_layer.scale"] = torch.tensor([0.458, 0.448, 0.450])[None, :, None, None]
    import lpips  # imports torchvision's models: slow, and not needed by those who never measure

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # torchvision's about the package's use of `pretrained`
        network = lpips.LPIPS(pretrained=False, net=net, pnet_rand=True, verbose=False)
    network.load_state_dict(weights, assign=True)
    return Perceptual(network, net)


def _unit(features: torch.Tensor) -> torch.Tensor:
    # All channels can be 0: the square root's infinite gradient there ends at the ReLU that made them so.
    return features / (features.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
