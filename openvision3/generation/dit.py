"""DiT-DH: the diffusion transformer with a wide head that learns the velocity of unified tokens (arXiv 2510.11690)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openvision3.config import OpenVisionError
from openvision3.generation.condition import Condition, check_condition
from openvision3.generation.config import GeneratorConfig
from openvision3.generation.layers import (
    TIME_FREQUENCIES,
    DiTBlock,
    FinalLayer,
    RMSNorm,
    TimeEmbedding,
    fixed_positions,
    init_normal,
    rope_table,
)

__all__ = ["Condition", "DiT", "flops"]


class TextCondition(nn.Module):
    """Embeds a text for the backbone: its pooled embedding in place of a class, its tokens in front of the picture's.

    A learned token stands always in front of the text tokens, so that the backbone sees one of its own where there is
    no text. RAE has no text condition: this one is the house's.
    """

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        width = config.backbone.width
        self.norm_pooled = RMSNorm(config.text_embed_dim)
        self.up, self.down = nn.Linear(config.text_embed_dim, width), nn.Linear(width, width)
        self.null = nn.Parameter(torch.empty(width))
        init_normal(self.up.weight)
        init_normal(self.down.weight)
        init_normal(self.null)
        self.norm_tokens = self.tokens_in = self.register = None
        if config.text_width:
            self.norm_tokens = RMSNorm(config.text_width)
            self.tokens_in = _input_layer(config.text_width, width)
            self.register = nn.Parameter(torch.empty(width))
            init_normal(self.register)

    def embed(self, condition: Condition) -> Tensor:
        """The texts' pooled embeddings -> (B, W)"""
        assert condition.pooled is not None
        embedded = self.down(F.silu(self.up(self.norm_pooled(condition.pooled))))
        return torch.where(condition.is_null[:, None], self.null.to(embedded.dtype), embedded)

    def prefix(self, condition: Condition) -> tuple[Tensor, Tensor] | None:
        """The texts' tokens -> (B, 1 + L, W), and (B, 1 + L) bool that is true where there is one to look at."""
        if self.tokens_in is None or self.norm_tokens is None or self.register is None:
            return None
        assert condition.tokens is not None and condition.mask is not None
        # what is masked has the weight 0, and 0 * NaN is NaN
        features = condition.tokens.masked_fill(~condition.mask[..., None], 0)
        tokens = self.tokens_in(self.norm_tokens(features))
        first = self.register.to(tokens.dtype).expand(tokens.shape[0], 1, -1)
        seen = condition.mask & ~condition.is_null[:, None]
        return torch.cat([first, tokens], dim=1), F.pad(seen, (1, 0), value=True)


class DiT(nn.Module):
    """The velocity of noisy unified tokens, from a deep narrow backbone and a wide shallow head.

    The backbone, conditioned on time and class (or text), gives one vector a token; the head reads the same noisy
    tokens anew and is modulated, token by token, by those vectors. Only the backbone has fixed positions; both have
    RoPE. `checkpoint_blocks` recomputes each block in the backward pass. Initialised as RAE: the output and all
    modulations are zero.
    """

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.config, self.checkpoint_blocks = config, False
        width, head_width = config.backbone.width, config.head.width
        self.time = TimeEmbedding(width)
        self.classes = self.text = None
        if config.condition == "class":
            table = torch.empty(config.num_classes + 1, width)
            init_normal(table)
            self.classes = nn.Embedding.from_pretrained(table, freeze=False)
        else:
            self.text = TextCondition(config)
        self.backbone_in = _input_layer(config.token_width, width)
        self.backbone = _stack(config, "backbone")
        # RAE has no layer here where the widths are equal
        self.to_head = nn.Linear(width, head_width) if width != head_width else nn.Identity()
        self.head_in = _input_layer(config.token_width, head_width)
        self.head = _stack(config, "head")
        self.final = FinalLayer(head_width, config.token_width)

    def forward(self, x: Tensor, t: Tensor, condition: Condition, grid: tuple[int, int] | None = None) -> Tensor:
        """Noisy normalised tokens (B, N, D), row by row, and times (B,) in [0, 1], 1 = noise -> velocity (B, N, D).

        `grid` (rows, columns): the config's where None. Raises `OpenVisionError` where shapes do not fit.
        """
        grid = grid or self.config.grid
        if x.ndim != 3 or x.shape[1:] != (grid[0] * grid[1], self.config.token_width):
            raise OpenVisionError(
                f"expected tokens (B, {grid[0] * grid[1]}, {self.config.token_width}) for a grid of "
                f"{grid[0]}x{grid[1]}, got {tuple(x.shape)}; pass grid=(rows, columns) for another one"
            )
        check_condition(self.config, condition, x.shape[0])
        time = self.time(t)
        features = self._features(x, time, condition, grid)
        active = F.silu(self.to_head(F.silu(time[:, None] + features)))
        y = self.head_in(x).to(self.time.frequencies.dtype)
        rope = rope_table(grid, self.config.head.width // self.config.head.num_heads, device=x.device)
        for block in self.head:
            y = self._run(block, y, active, rope, None)
        return self.final(y, active)

    def _features(self, x: Tensor, time: Tensor, condition: Condition, grid: tuple[int, int]) -> Tensor:
        """The backbone's output (B, N, W) of the picture's tokens."""
        size = self.config.backbone
        # The residual stream stays in the buffers' dtype (fp32 in training), whatever the products are computed in.
        positions = fixed_positions(grid, size.width, x.device).to(self.time.frequencies.dtype)
        y = self.backbone_in(x) + positions
        embedded, prefix = self._embed(condition)
        active = F.silu(F.silu(time + embedded))[:, None]
        mask, count = None, 0
        if prefix is not None:
            tokens, seen = prefix
            count = tokens.shape[1]
            mask = F.pad(seen, (0, x.shape[1]), value=True)[:, None, None]
            y = torch.cat([tokens.to(y.dtype), y], dim=1)
        rope = rope_table(grid, size.width // size.num_heads, count, x.device)
        for block in self.backbone:
            y = self._run(block, y, active, rope, mask)
        return y[:, count:]

    def _embed(self, condition: Condition) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The condition's vector (B, W), and its tokens with their mask."""
        if self.text is not None:
            return self.text.embed(condition), self.text.prefix(condition)
        assert self.classes is not None and condition.labels is not None
        labels = condition.labels
        if condition.null is not None:
            labels = labels.masked_fill(condition.null, self.config.num_classes)
        return self.classes(labels), None

    def _run(self, block: nn.Module, x: Tensor, active: Tensor, rope: Tensor, mask: Tensor | None) -> Tensor:
        if self.checkpoint_blocks and torch.is_grad_enabled():
            return checkpoint(block, x, active, rope, mask, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]
        return block(x, active, rope, mask)


def _stack(config: GeneratorConfig, part: str) -> nn.ModuleList:
    size = config.backbone if part == "backbone" else config.head
    return nn.ModuleList(DiTBlock(size, config.qk_norm, config.attention) for _ in range(size.depth))


def _input_layer(inputs: int, outputs: int) -> nn.Linear:
    """The linear layer that RAE calls a patch embedding of patch 1: Xavier-uniform weight, zero bias."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def flops(
    config: GeneratorConfig, batch: int = 1, grid: tuple[int, int] | None = None, text_length: int | None = None
) -> float:
    """Floating-point operations of one forward pass of `batch` samples: two for each multiply-add of matrices.

    Norms, activations, RoPE, modulation's products and softmax are not counted, as is usual. `grid` and `text_length`
    are the config's where None.
    """
    rows, columns = grid or config.grid
    tokens, d = rows * columns, config.token_width
    width, head = config.backbone.width, config.head.width
    length = config.text_length if text_length is None else text_length
    total = 2.0 * width * (2 * TIME_FREQUENCIES + width)
    prefix = 0
    if config.condition == "text":
        total += 2.0 * width * (config.text_embed_dim + width)
        if config.text_width:
            prefix = 1 + length
            total += 2.0 * length * config.text_width * width

    def block(size: int, hidden: int, positions: int, conditions: int) -> float:
        layers = 2.0 * positions * size * (4 * size + 3 * hidden)  # qkv, output, w12 and w3
        return layers + 4.0 * positions**2 * size + 12.0 * conditions * size**2  # scores and mixing; modulation

    total += config.backbone.depth * block(width, config.backbone.hidden, prefix + tokens, 1)
    total += config.head.depth * block(head, config.head.hidden, tokens, tokens)
    total += 2.0 * tokens * d * (width + head)  # both input layers
    total += 2.0 * tokens * width * head * (width != head)
    return batch * (total + 2.0 * tokens * head * (2 * head + d))
