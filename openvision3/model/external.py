"""The place of the unified encoder in a model that reads the tokens of another library's frozen encoder."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from openvision3.config import ModelConfig, OpenVisionError
from openvision3.model.blocks import init_projection

if TYPE_CHECKING:
    from openvision3.hub.encoders import FrozenEncoder


class ExternalEncoder(nn.Module):
    """Tokens of an attached frozen encoder; the pooled embedding is ours: mean -> LayerNorm -> projection without bias.

    A picture has `downsampling` pixels for each token, and is resized to the encoder's own size: 256 pixels where that
    has 16 x 16 tokens of 14 pixels. The tower has its own files and is no part of this module's state.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.encoder.width
        self.name, self.image_size, self.width = config.name, config.image_size, width
        self.grid = (config.image_size // config.downsampling,) * 2
        self.pool_norm = nn.LayerNorm(width, eps=config.encoder.norm_eps)
        self.projection = nn.Linear(width, config.embed_dim, bias=False)
        init_projection(self.projection)
        self._towers: list[FrozenEncoder] = []  # in a list, so that it is neither saved nor trained

    def attach(self, tower: "FrozenEncoder") -> None:
        """Gives the module its frozen encoder; raises `OpenVisionError` where the tokens would not fit."""
        grid = tower.grid(self.image_size, self.image_size)
        if (tower.width, grid) != (self.width, self.grid):
            raise OpenVisionError(
                f"encoder {tower.name} gives {grid[0]} x {grid[1]} tokens of width {tower.width}, model {self.name!r} "
                f"reads {self.grid[0]} x {self.grid[1]} of width {self.width}"
            )
        self._towers = [tower]

    @property
    def tower(self) -> "FrozenEncoder":
        """The attached encoder; raises `OpenVisionError` without one."""
        if not self._towers:
            raise OpenVisionError(f"model {self.name!r} was loaded without its encoder: load it with openvision3.load")
        return self._towers[0]

    def tower_parameters(self) -> int:
        """Number of the attached encoder's weights; 0 without one."""
        return sum(parameter.numel() for tower in self._towers for parameter in tower.parameters())

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [-1, 1] of the model's own size S -> tokens (B, N, D).

        Raises `OpenVisionError` for another size: a picture's tokens are always as many.
        """
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise OpenVisionError(
                f"model {self.name!r} reads pictures of {self.image_size} x {self.image_size} pixels alone, "
                f"got {images.shape[-2]} x {images.shape[-1]}: pass --size {self.image_size}"
            )
        return self.tower(images)

    def pool(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, D) -> pooled, projected embedding (B, embed_dim), not L2-normalised."""
        return self.projection(self.pool_norm(tokens.mean(dim=1)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ExternalEncoder":
        super()._apply(fn, recurse)
        for tower in self._towers:
            tower._apply(fn, recurse)
        return self
