"""Text towers: the bidirectional encoder of the contrastive loss and the caption decoder."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openvision3.config import AttentionPath, OpenVisionError, TextDecoderConfig, TextEncoderConfig
from openvision3.losses import caption_loss
from openvision3.model.blocks import (
    EMBEDDING_STD,
    Block,
    KeyValue,
    Transformer,
    init_linear,
    init_projection,
    sincos_positions,
)
from openvision3.model.encoder import square_grid
from openvision3.model.packing import Packing

_POSITION_STD = 0.01  # learned positions, as CLIP's text tower


class TextEmbedding(nn.Module):
    """Token and learned position embeddings."""

    def __init__(self, vocab_size: int, context_length: int, width: int):
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(vocab_size, width))
        self.positions = nn.Parameter(torch.empty(context_length, width))
        nn.init.normal_(self.tokens, std=EMBEDDING_STD)
        nn.init.normal_(self.positions, std=_POSITION_STD)

    def forward(self, ids: Tensor, start: int = 0, keep: Tensor | None = None) -> Tensor:
        """Ids (B, L), the first at position `start`, -> (B, L, W); raises `OpenVisionError` where L is too long.

        With `keep`, boolean (L,), only those columns, at their own positions.
        """
        stop = start + ids.shape[1]
        if ids.ndim != 2 or stop > self.positions.shape[0]:
            raise OpenVisionError(f"text of {stop} tokens exceeds the context length {self.positions.shape[0]}")
        positions = self.positions[start:stop]
        if keep is not None:
            ids, positions = ids[:, keep], positions[keep]
        return F.embedding(ids, self.tokens) + positions

    def packed(self, ids: Tensor, packing: Packing) -> Tensor:
        """The packed tokens of ids (B, L), each at its own position: (T, W)."""
        return F.embedding(packing.take(ids), self.tokens) + F.embedding(packing.columns, self.positions)


class TextEncoder(nn.Module):
    """Bidirectional tower over `[bos] words [eos] pad... [cls]`; the feature is the last position (OpenVision 1).

    Unlike OpenVision's code, padding is masked out of the attention, so that a text's feature depends on the text
    alone.
    """

    def __init__(self, config: TextEncoderConfig, embed_dim: int, path: AttentionPath):
        super().__init__()
        size = config.transformer
        self.config = config
        self.embedding = TextEmbedding(config.vocab_size, config.context_length, size.width)
        self.transformer = Transformer(size, path)
        self.norm = nn.LayerNorm(size.width, eps=size.norm_eps)
        self.projection = nn.Linear(size.width, embed_dim, bias=False)
        init_projection(self.projection)

    def forward(self, ids: Tensor, packing: Packing | None = None) -> Tensor:
        """Ids (B, L), [cls] last -> projected feature (B, embed_dim), not L2-normalised.

        `packing`: of what is no padding in `ids`; the same result for less work.
        """
        if packing is not None:
            last = packing.used.shape[1] - 1
            x, mask = self.embedding.packed(ids, packing), packing.used[:, None, None, :]
            return self.projection(self.norm(self.transformer(x, mask, first_query=last, packing=packing)[:, 0]))
        used = ids != self.config.pad_id
        # Columns that are padding in every row change nothing. On a GPU finding them would wait for the device, and
        # tensors without values (of a dry run, or an export) can't be asked.
        keep = used.any(dim=0) if ids.device.type == "cpu" and type(ids) is Tensor else None
        x = self.embedding(ids, keep=keep)
        mask = (used if keep is None else used[:, keep])[:, None, None, :]
        x = self.transformer(x, mask, first_query=x.shape[1] - 1)
        return self.projection(self.norm(x[:, 0]))


@dataclass
class DecoderState:
    """What cached decoding keeps: each block's keys and values of the text (and prefix) so far, and of the image."""

    past: list[KeyValue | None]
    cross: list[KeyValue | None]
    length: int = 0  # text tokens read

    def reorder(self, index: Tensor) -> None:
        """Selects rows of the batch, with repeats allowed: beams that go on from another beam."""
        self.past = [None if pair is None else (pair[0][index], pair[1][index]) for pair in self.past]
        self.cross = [None if pair is None else (pair[0][index], pair[1][index]) for pair in self.cross]


class CaptionDecoder(nn.Module):
    """Autoregressive caption tower over the unified tokens; its output matrix is the token embedding.

    How the tokens enter is not stated in the paper. "cross": each block attends to the normalised tokens; "prefix":
    they are projected and put before the text, with full attention among themselves and causal attention over the
    text. With `image_positions`, the tokens' places (as the encoder's, see `ModelConfig.positions`), times that factor,
    are added to the normalised tokens.
    """

    def __init__(
        self,
        config: TextDecoderConfig,
        image_width: int,
        path: AttentionPath,
        position_extent: tuple[int, int] | None = None,
    ):
        super().__init__()
        size = config.transformer
        self.config, self.extent, cross = config, position_extent, config.image_input == "cross"
        self.image_norm = nn.LayerNorm(image_width, eps=size.norm_eps)
        self.image_projection = None if cross else nn.Linear(image_width, size.width)
        self.embedding = TextEmbedding(config.vocab_size, config.context_length, size.width)
        self.transformer = Transformer(size, path, context_width=image_width if cross else 0)
        self.norm = nn.LayerNorm(size.width, eps=size.norm_eps)
        if self.image_projection is not None:
            init_linear(self.image_projection)

    def forward(self, tokens: Tensor, ids: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Image tokens (B, N, W_enc) and input ids (B, L) -> logits (B, L, V) of the token after each input.

        `grid`: rows and columns of a picture that is not square; it matters to `image_positions` alone.
        """
        return F.linear(self._hidden(tokens, ids, grid), self.embedding.tokens)

    def loss(
        self,
        tokens: Tensor,
        ids: Tensor,
        targets: Tensor,
        normalizer: Tensor | int | float,
        packing: Packing | None = None,
    ) -> Tensor:
        """`losses.caption_loss` of `forward`'s logits, which are never all there; targets (B, L).

        `packing`: of what is no padding in `targets`; the same result for less work.
        """
        if packing is None:
            hidden = self._hidden(tokens, ids, None)
        else:
            hidden, targets = self._packed_hidden(tokens, ids, packing), packing.take(targets)
        return caption_loss(hidden, self.embedding.tokens, targets, self.config.pad_id, normalizer)

    def _packed_hidden(self, tokens: Tensor, ids: Tensor, packing: Packing) -> Tensor:
        """What the output matrix multiplies, of the packed tokens alone: (T, W)."""
        image, text = self._image(tokens, None), self.embedding.packed(ids, packing)
        length = packing.used.shape[1]
        if self.image_projection is None:
            mask = causal_mask(length, 0, text.device)
            return self.norm(self.transformer(text, mask, context=image, packing=packing))
        prefix = image.shape[1]
        x = torch.cat([self.image_projection(image).to(text.dtype).flatten(0, 1), text])
        behind = packing.after(prefix)
        x = self.transformer(x, causal_mask(length, prefix, text.device), first_query=prefix, packing=behind)
        return self.norm(packing.pack(x))

    def _hidden(self, tokens: Tensor, ids: Tensor, grid: tuple[int, int] | None) -> Tensor:
        """What the output matrix multiplies, (B, L, W)."""
        length = ids.shape[1]
        image, text = self._image(tokens, grid), self.embedding(ids)
        if self.image_projection is None:
            x = self.transformer(text, causal_mask(length, 0, text.device), context=image)
        else:
            prefix = image.shape[1]
            x = torch.cat([self.image_projection(image).to(text.dtype), text], dim=1)
            x = self.transformer(x, causal_mask(length, prefix, text.device), first_query=prefix)
        return self.norm(x)

    def start(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> DecoderState:
        """Reads the image tokens (B, N, W_enc) once; `grid` as in `forward`."""
        image, blocks = self._image(tokens, grid), self._blocks()
        if self.image_projection is None:
            cross: list[KeyValue | None] = [block.cross.project(image) for block in blocks if block.cross is not None]
            return DecoderState([None] * len(blocks), cross)
        x = self.image_projection(image).to(self.embedding.tokens.dtype)
        past: list[KeyValue | None] = []
        for block in blocks:
            x, kept = block.step(x)
            past.append(kept)
        return DecoderState(past, [None] * len(blocks))

    def step(self, ids: Tensor, state: DecoderState) -> Tensor:
        """The next ids (B,) -> logits (B, V) of the token after; extends `state`."""
        x = self.embedding(ids[:, None], start=state.length)
        for index, block in enumerate(self._blocks()):
            x, state.past[index] = block.step(x, cross=state.cross[index], past=state.past[index])
        state.length += 1
        return F.linear(self.norm(x), self.embedding.tokens)[:, 0]

    def _image(self, tokens: Tensor, grid: tuple[int, int] | None) -> Tensor:
        image = self.image_norm(tokens)
        if not self.config.image_positions:
            return image
        grid = grid or square_grid(tokens.shape[1])
        positions = sincos_positions(grid, image.shape[2], image.device, self.extent)
        return image + self.config.image_positions * positions.to(image.dtype)

    def _blocks(self) -> list[Block]:
        return [block for block in self.transformer.blocks if isinstance(block, Block)]


def causal_mask(length: int, prefix: int, device: torch.device) -> Tensor:
    """Boolean (prefix + length, prefix + length): a prefix that all see, then text that sees what came before.

    Row = query, true = may look.
    """
    total = prefix + length
    mask = torch.ones(total, total, dtype=torch.bool, device=device).tril()
    mask[:, :prefix] = True
    return mask
