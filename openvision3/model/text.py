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
    KeyValueCache,
    Transformer,
    init_linear,
    init_projection,
    sincos_positions,
)
from openvision3.model.encoder import square_grid
from openvision3.model.packing import Packing
from openvision3.model.prepacked import PackedLinear, can_pack, packed_copy

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
        assert ids.ndim == 2, ids.shape
        stop = start + ids.shape[1]
        self._check_length(stop)
        positions = self.positions[start:stop]
        if keep is not None:
            ids, positions = ids[:, keep], positions[keep]
        return F.embedding(ids, self.tokens) + positions

    def _check_length(self, length: int) -> None:
        if length > self.positions.shape[0]:
            raise OpenVisionError(f"text of {length} tokens exceeds the context length {self.positions.shape[0]}")

    def packed(self, ids: Tensor, packing: Packing) -> Tensor:
        """The packed tokens of ids (B, L), each at its own position: (T, W); raises as `forward`."""
        self._check_length(ids.shape[1])
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

    def features(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ids (B, L) -> what a generator reads of a text: projected feature (B, embed_dim), not L2-normalised, normed
        tokens (B, L', W), and which of these are no padding, bool (B, L'). On a CPU columns of padding are left out."""
        used = ids != self.config.pad_id
        keep = used.any(dim=0) if ids.device.type == "cpu" else None  # as in `forward`
        used = used if keep is None else used[:, keep]
        tokens = self.norm(self.transformer(self.embedding(ids, keep=keep), used[:, None, None, :]))
        return self.projection(tokens[:, -1]), tokens, used


@dataclass
class DecoderState:
    """What cached decoding keeps: each block's keys and values of the text (after any prefix), and of the image.

    The buffers have room for `capacity` text tokens from the start: a step copies nothing but its own token.
    """

    past: list[KeyValueCache]
    cross: list[KeyValue | None]
    prefix: int  # image tokens in front of the text
    capacity: int
    length: int = 0  # text tokens read

    def reorder(self, index: Tensor) -> None:
        """Selects rows of the batch, with repeats allowed: beams that go on from another beam of the same picture.

        What is of the image, the same for all of a picture's beams, stays.
        """
        for cache in self.past:
            cache.reorder(index, self.prefix, self.prefix + self.length)


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
        self.output: PackedLinear | None = None  # the output matrix of a decoder made `for_steps`
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

        `packing`: of `targets` up to each row's last that is no padding (`up_to_last`); the same result for less work.
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

    def for_steps(self) -> "CaptionDecoder":
        """What `start` and `step` are faster on: on the CPU a copy with packed weights, for one batch of captions.

        The copy does not follow changes of the weights; it is made anew for each batch, which costs about one step.
        """
        if not can_pack(self):
            return self
        decoder = packed_copy(self)
        decoder.output = PackedLinear(self.embedding.tokens)
        return decoder

    def start(
        self, tokens: Tensor, grid: tuple[int, int] | None = None, max_length: int | None = None, num_beams: int = 1
    ) -> DecoderState:
        """Reads the image tokens (B, N, W_enc) once, for `num_beams` rows a picture; `grid` as in `forward`.

        `max_length`: text tokens that there must be room for (None: the context length).
        """
        image, blocks, size = self._image(tokens, grid), self._blocks(), self.config.transformer
        projected = None if self.image_projection is None else self.image_projection(image)
        cross = [None if block.cross is None else _contiguous(block.cross.project(image)) for block in blocks]
        like = projected if cross[0] is None else cross[0][0]  # under autocast keys have its dtype, not the weights'
        assert like is not None
        prefix = 0 if projected is None else projected.shape[1]
        capacity = max_length or self.config.context_length
        shape = tokens.shape[0] * num_beams, size.num_heads, prefix + capacity, size.width // size.num_heads
        past = [KeyValueCache(shape, like) for _ in blocks]
        if projected is not None:
            x = projected.to(self.embedding.tokens.dtype).repeat_interleave(num_beams, dim=0)
            for block, cache in zip(blocks, past, strict=True):
                x = block.step(x, cache=cache)
        return DecoderState(past, cross, prefix, capacity)

    def step(self, ids: Tensor, state: DecoderState) -> Tensor:
        """The next ids (B,) -> logits (B, V) of the token after; extends `state`."""
        x = self.embedding(ids[:, None], start=state.length)
        for block, cache, cross in zip(self._blocks(), state.past, state.cross, strict=True):
            x = block.step(x, cross=cross, cache=cache, place=state.prefix + state.length)
        state.length += 1
        x = self.norm(x[:, 0])
        return F.linear(x, self.embedding.tokens) if self.output is None else self.output(x)

    def compiled_step(self, ids: Tensor, state: DecoderState) -> Tensor:
        """As `step`, by `torch.compile`, on CUDA as a CUDA graph: for many steps with a batch of one size.

        Each step attends to the whole buffer, its unwritten part masked, so that no shape changes.
        """
        if state.length >= state.capacity:
            raise OpenVisionError(f"text of {state.length + 1} tokens exceeds the room for {state.capacity}")
        mode = "reduce-overhead" if ids.device.type == "cuda" else None
        run = torch.compile(self._fixed_step, mode=mode, dynamic=False)
        place = torch.tensor([state.length], device=ids.device)
        logits = run(ids, place, state.past, state.cross, state.prefix)
        state.length += 1
        return logits.clone() if mode else logits  # a CUDA graph's outputs are overwritten by its next run

    def _fixed_step(
        self, ids: Tensor, place: Tensor, past: list[KeyValueCache], cross: list[KeyValue | None], prefix: int
    ) -> Tensor:
        x = F.embedding(ids[:, None], self.embedding.tokens) + self.embedding.positions[place]
        mask = torch.arange(past[0].keys.shape[2], device=ids.device)[None] <= prefix + place
        for block, cache, of_image in zip(self._blocks(), past, cross, strict=True):
            x = block.step(x, mask, of_image, cache=cache, place=prefix + place)
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


def _contiguous(pair: KeyValue) -> KeyValue:
    """Read at every step: a matrix product would copy what lies heads apart each time."""
    return pair[0].contiguous(), pair[1].contiguous()


def causal_mask(length: int, prefix: int, device: torch.device) -> Tensor:
    """Boolean (prefix + length, prefix + length): a prefix that all see, then text that sees what came before.

    Row = query, true = may look.
    """
    total = prefix + length
    mask = torch.ones(total, total, dtype=torch.bool, device=device).tril()
    mask[:, :prefix] = True
    return mask
