"""Pre-norm transformer blocks, the two attention paths, activations and sine-cosine positions.

Initialisation follows big_vision (google-research/big_vision, models/vit.py), on which OpenVision is built:
Xavier-uniform matrices (queries, keys and values each on their own), biases near zero. Embeddings and learned tokens:
normal, 0.02.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openvision3.config import Activation, AttentionPath, OpenVisionError, TransformerConfig
from openvision3.model.packing import Packing

SIZES: dict[str, TransformerConfig] = {
    "Ti": TransformerConfig(192, 12, 3),
    "S": TransformerConfig(384, 12, 6),
    "B": TransformerConfig(768, 12, 12),
    "L": TransformerConfig(1024, 24, 16),
    "So400m": TransformerConfig(1152, 27, 16, mlp_width=4304),  # head width 72
    "H": TransformerConfig(1280, 32, 16),  # head width 80
}
"""The encoder family by name; head width is 64 where nothing else is said."""

EMBEDDING_STD = 0.02

# A picture of 512 px and what is beside its 1,024 tokens; above, scores cost more memory than matmul saves time.
_MATMUL_MAX_KEYS = 1088

# Elements of a block of scores that training on a CPU keeps in its cache: the whole matrix of a batch would go out to
# memory and back between scores, softmax and mixing.
_CPU_SCORES = 2**20

KeyValue = tuple[Tensor, Tensor]
"""Keys and values of one attention layer, each (B, heads, N, head width)."""


class KeyValueCache:
    """Keys and values of one attention layer's earlier positions, in buffers that have room for all that will come."""

    def __init__(self, shape: tuple[int, int, int, int], like: Tensor) -> None:
        """`shape`: (B, heads, positions, head width); device and dtype are those of `like`."""
        # Zeros, not any memory: where the whole buffer is attended to, what is masked has the weight 0, and 0 * NaN is
        # NaN.
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)

    def extend(self, new: KeyValue, place: "int | Tensor") -> KeyValue:
        """Writes positions from `place` on, and returns all up to the last of them.

        With `place` a tensor (1,) on the device, one position is written and the whole buffers are returned: their
        shapes never change, which a compiled step and a CUDA graph need. What is beyond `place` is for a mask to hide.
        """
        if isinstance(place, Tensor):
            self.keys.index_copy_(2, place, new[0])
            self.values.index_copy_(2, place, new[1])
            return self.keys, self.values
        stop = place + new[0].shape[2]
        self.keys[:, :, place:stop] = new[0]
        self.values[:, :, place:stop] = new[1]
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def reorder(self, index: Tensor, start: int, stop: int) -> None:
        """Selects rows of the batch, with repeats allowed, in the positions from `start` to `stop`."""
        for buffer in (self.keys, self.values):
            buffer[:, :, start:stop] = buffer[index, :, start:stop]


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0) squared: the cheapest activation here, for models trained from scratch (Primer, arXiv 2109.08668)."""
    return F.relu(x).square()


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation, as JAX computes it by default."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu_squared": relu_squared,
}


def sincos_positions(
    grid: tuple[int, int],
    width: int,
    device: torch.device | str | None = None,
    extent: tuple[int, int] | None = None,
) -> Tensor:
    """Fixed 2-D sine-cosine positions (h * w, width), row by row, in fp32.

    Quarters of the width are sin x, cos x, sin y, cos y of x * 10000^(-k / (width / 4 - 1)). Source: big_vision's
    `posemb_sincos_2d` (MoCo v3), with which the released weights were trained. `width` must be a multiple of 4. By
    default a token's coordinates are its column and row; with `extent` (rows, columns) they are spread so that any grid
    covers what a grid of that size covers.
    """
    assert width % 4 == 0 and width > 4, width
    height, columns = grid
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float32, device=device) / (width // 4 - 1))
    rows, across = (
        torch.arange(count, dtype=torch.float32, device=device)
        if extent is None
        else (torch.arange(count, dtype=torch.float32, device=device) + 0.5) * (extent[axis] / count) - 0.5
        for axis, count in enumerate(grid)
    )
    y, x = rows[:, None] * frequency, across[:, None] * frequency
    x = torch.cat([x.sin(), x.cos()], dim=-1).expand(height, columns, -1)
    y = torch.cat([y.sin(), y.cos()], dim=-1)[:, None].expand(height, columns, -1)
    return rearrange(torch.cat([x, y], dim=-1), "h w d -> (h w) d")


def resize_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Interpolates a learned position table (h * w, width) from one grid to another: bicubic, antialiased."""
    picture = rearrange(table.float(), "(h w) d -> 1 d h w", h=old[0], w=old[1])
    picture = F.interpolate(picture, size=new, mode="bicubic", antialias=True, align_corners=False)
    return rearrange(picture, "1 d h w -> (h w) d")


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, path: AttentionPath) -> Tensor:
    """Scaled dot-product attention: (B, heads, N, d) x (B, heads, M, d) -> (B, heads, N, d).

    `mask` is boolean, broadcastable to (B, heads, N, M), true where a query may look. "matmul" writes the score matrix
    out and "sdpa" calls the fused kernel; both compute the same. "auto" takes matmul on the CPU, whose fused kernel
    has a backward pass that is several times slower at these sizes, and sdpa elsewhere and for long sequences.
    """
    if path == "auto":
        path = "matmul" if query.device.type == "cpu" and key.shape[2] <= _MATMUL_MAX_KEYS else "sdpa"
    if path == "sdpa":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    # Softmax keeps the inputs' dtype (it accumulates in fp32 inside): autocast would copy the scores to fp32 and back.
    with torch.autocast(query.device.type, enabled=False):
        rows = max(1, _CPU_SCORES // (query.shape[1] * query.shape[2] * key.shape[2]))
        # not without gradients: exports fix no batch size, and a dry run's tensors have no cache
        if query.device.type != "cpu" or not query.requires_grad or type(query) is not Tensor or rows >= len(query):
            return _mix(query, key, value, mask)
        masks: Sequence[Tensor | None] = [mask] * len(query)  # one for all samples
        if mask is not None and mask.ndim == 4 and len(mask) > 1:
            masks = mask.split(rows)
        parts = zip(query.split(rows), key.split(rows), value.split(rows), masks, strict=False)
        return torch.cat([_mix(*part) for part in parts])


def _mix(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1) @ value


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused projection to queries, keys and values."""

    def __init__(self, config: TransformerConfig, path: AttentionPath):
        super().__init__()
        self.num_heads = config.num_heads
        self.path: AttentionPath = path
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        for part in self.qkv.weight.chunk(3):
            nn.init.xavier_uniform_(part)
        nn.init.normal_(self.qkv.bias, std=1e-6)
        init_linear(self.out)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        first_query: int = 0,
        cache: KeyValueCache | None = None,
        place: int | Tensor = 0,
        packing: Packing | None = None,
    ) -> Tensor:
        """(B, N, W) -> the outputs of the positions from `first_query` on.

        With a `cache`, x comes at `place` after the positions that it holds, and is added to them. With `packing`, x is
        packed, (T, W), and so are the outputs, but for a `first_query` above 0.
        """
        projected = self.qkv(x)
        if packing is not None:
            projected = packing.unpack(projected)
        qkv = rearrange(projected, "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        query, key, value = qkv.unbind(0)
        if cache is not None:
            key, value = cache.extend((key, value), place)
        if mask is not None and mask.shape[-2] > 1:
            mask = mask[..., first_query:, :]
        mixed = rearrange(attend(query[:, :, first_query:], key, value, mask, self.path), "b h n d -> b n (h d)")
        if packing is not None and not first_query:
            mixed = packing.pack(mixed)
        return self.out(mixed)


class CrossAttention(nn.Module):
    """Multi-head attention of one sequence to another, whose keys and values can be computed once and kept."""

    def __init__(self, config: TransformerConfig, context_width: int, path: AttentionPath):
        super().__init__()
        self.num_heads = config.num_heads
        self.path: AttentionPath = path
        self.query = nn.Linear(config.width, config.width)
        self.key_value = nn.Linear(context_width, 2 * config.width)
        self.out = nn.Linear(config.width, config.width)
        init_linear(self.query)
        for part in self.key_value.weight.chunk(2):
            nn.init.xavier_uniform_(part)
        nn.init.normal_(self.key_value.bias, std=1e-6)
        init_linear(self.out)

    def project(self, context: Tensor) -> KeyValue:
        """(B, M, context width) -> keys and values."""
        pair = rearrange(self.key_value(context), "b n (two h d) -> two b h n d", two=2, h=self.num_heads)
        key, value = pair.unbind(0)
        return key, value

    def forward(self, x: Tensor, context: KeyValue, packing: Packing | None = None) -> Tensor:
        """(B * k, N, W) -> the same, for a context of B rows: k rows in turn look at each (beams of a picture).

        With `packing`, (T, W) -> (T, W).
        """
        rows = context[0].shape[0]
        query = self.query(x) if packing is None else packing.unpack(self.query(x))
        length = query.shape[1]
        query = rearrange(query, "(b k) n (h d) -> b h (k n) d", b=rows, h=self.num_heads)
        mixed = attend(query, *context, None, self.path)
        mixed = rearrange(mixed, "b h (k n) d -> (b k) n (h d)", n=length)
        return self.out(mixed if packing is None else packing.pack(mixed))


class Mlp(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        hidden = config.mlp_width or 4 * config.width
        self.up, self.down = nn.Linear(config.width, hidden), nn.Linear(hidden, config.width)
        self.activation = ACTIVATIONS[config.activation]
        init_linear(self.up)
        init_linear(self.down)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, W) -> (B, N, W)"""
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):
    """One pre-norm block: self-attention, optional cross-attention, MLP, each added to the residual stream."""

    def __init__(self, config: TransformerConfig, path: AttentionPath, context_width: int = 0):
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attention = SelfAttention(config, path)
        self.norm_cross = nn.LayerNorm(config.width, eps=config.norm_eps) if context_width else None
        self.cross = CrossAttention(config, context_width, path) if context_width else None
        self.norm_2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = Mlp(config)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        first_query: int = 0,
        packing: Packing | None = None,
    ) -> Tensor:
        """(B, N, W) -> (B, N - first_query, W); `context` (B, M, C) where the block has cross-attention.

        With `packing`, packed (T, W) -> (T, W); with a `first_query` above 0 too, -> (B, N - first_query, W), unpacked.
        """
        cross = self.cross.project(context) if self.cross is not None and context is not None else None
        return self.step(x, mask, cross, first_query, packing=packing)

    def step(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cross: KeyValue | None = None,
        first_query: int = 0,
        cache: KeyValueCache | None = None,
        place: int | Tensor = 0,
        packing: Packing | None = None,
    ) -> Tensor:
        """As `forward`, with projected context, and a cache of earlier positions that x, at `place`, is added to."""
        mixed = self.attention(self.norm_1(x), mask, first_query, cache, place, packing)
        if packing is not None and first_query:
            x, packing = packing.unpack(x), None
        x = (x[:, first_query:] if first_query else x) + mixed
        if self.cross is not None:
            assert cross is not None and self.norm_cross is not None
            x = x + self.cross(self.norm_cross(x), cross, packing)
        return x + self.mlp(self.norm_2(x))

    @torch.no_grad()
    def scale_outputs(self, factor: float) -> None:
        """Multiplies the weights that write to the residual stream: a small factor starts the block near identity."""
        for layer in (self.attention.out, self.mlp.down, *([self.cross.out] if self.cross is not None else [])):
            layer.weight.mul_(factor)


class Transformer(nn.Module):
    """A stack of blocks without embeddings or final norm. `checkpoint_blocks` recomputes each in the backward pass."""

    def __init__(self, config: TransformerConfig, path: AttentionPath = "auto", context_width: int = 0):
        super().__init__()
        check_transformer(config)
        self.config, self.context_width, self.checkpoint_blocks = config, context_width, False
        self.blocks = nn.ModuleList(Block(config, path, context_width) for _ in range(config.depth))
        for block in self.blocks:
            assert isinstance(block, Block)
            block.scale_outputs(config.residual_init)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        first_query: int = 0,
        packing: Packing | None = None,
    ) -> Tensor:
        """(B, N, W) -> (B, N - first_query, W); `packing` as for `Block`.

        The outputs of the positions before `first_query` are not needed by the caller; since they only matter as keys
        and values, the last block does not compute them.
        """
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            first = first_query if index == last else 0
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, context, first, packing, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, mask, context, first, packing)
        return x


def init_linear(layer: nn.Linear) -> None:
    """Xavier-uniform weight and a bias near zero, as big_vision's MLP and attention."""
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.normal_(layer.bias, std=1e-6)


def init_projection(layer: nn.Linear | nn.Conv2d) -> None:
    """Truncated normal of variance 1 / fan-in (flax's default for heads and patch embeddings), bias zero."""
    std = layer.weight[0].numel() ** -0.5 / 0.87962566103423978  # the cut at two sigmas takes this off
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def check_transformer(config: TransformerConfig) -> None:
    """Raises `OpenVisionError` where a stack of this size cannot be built."""
    if min(config.width, config.depth, config.num_heads) < 1 or config.mlp_width < 0:
        raise OpenVisionError(f"width, depth and num_heads must be positive, got {config}")
    if config.width % config.num_heads or config.width % 4 or config.width < 8:
        raise OpenVisionError(
            f"width {config.width} must be a multiple of 4, at least 8, and divisible by num_heads {config.num_heads}"
        )
    if config.depth > 1000 or max(config.width, config.mlp_width) > 262144:
        raise OpenVisionError(f"depth {config.depth} and width {config.width} are out of any sensible range")
