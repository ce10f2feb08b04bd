"""A frozen VAE dressed as a model, so that the same meter measures it alone."""

from types import SimpleNamespace

from torch import Tensor, nn

from openvision3.vae import FrozenVAE


class VAEAlone(nn.Module):
    """Encodes pictures to latents and back: what `ReconstructionMeter` and `encode_batches` need of a model."""

    def __init__(self, vae: FrozenVAE) -> None:
        super().__init__()
        self.autoencoder = vae
        self.vae = None  # no ceiling beside it: it is the ceiling
        self.config = SimpleNamespace(name=f"VAE {vae.config.source}", decoder=True, downsampling=vae.config.factor)

    @property
    def device(self) -> object:
        """Where the weights are."""
        return next(self.parameters()).device

    def num_parameters(self) -> dict[str, int]:
        """Parameters, all of them the VAE's."""
        return {"vae": sum(parameter.numel() for parameter in self.autoencoder.parameters())}

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> latents (B, C, H/f, W/f)."""
        return self.autoencoder.encode(images)

    def decode(self, latents: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, f h, f w); they know their grid."""
        return self.autoencoder.decode(latents)
