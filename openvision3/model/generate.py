"""Greedy and beam search over the caption decoder, with its key-value cache."""

import math

import torch
from torch import Tensor

from openvision3.config import OpenVisionError
from openvision3.model.text import CaptionDecoder

# On a GPU, to ask whether all have ended waits for the device; a few steps too many cost less than waiting at each.
_STEPS_BETWEEN_QUESTIONS = 8


@torch.no_grad()
def greedy_search(
    decoder: CaptionDecoder,
    tokens: Tensor,
    bos_id: int,
    eos_id: int,
    max_length: int | None = None,
    grid: tuple[int, int] | None = None,
    compile: bool = False,
) -> Tensor:
    """The most probable next token, again and again, until every caption of the batch has ended.

    Image tokens (B, N, W_enc) -> ids (B, L): `[bos] words [eos]`, then padding; at most `max_length` (default and upper
    limit: the context length) with [bos] and [eos]. `grid`: (rows, columns) of tokens that are not a square. `compile`:
    see `CaptionDecoder.compiled_step`.
    """
    pad_id, limit = decoder.config.pad_id, _limit(decoder, max_length)
    decoder = decoder if compile else decoder.for_steps()
    state = decoder.start(tokens, grid, limit)
    step = decoder.compiled_step if compile else decoder.step
    ids = torch.full((tokens.shape[0], limit), pad_id, dtype=torch.long, device=tokens.device)
    ids[:, 0] = bos_id
    finished = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    for place in range(1, limit):
        logits = _rule_out(step(ids[:, place - 1], state), pad_id, bos_id)
        following = logits.argmax(dim=-1).masked_fill(finished, pad_id)
        ids[:, place] = following
        finished |= following == eos_id
        if _all_ended(finished, place):
            break
    return ids[:, : _longest(ids, pad_id)]


@torch.no_grad()
def beam_search(
    decoder: CaptionDecoder,
    tokens: Tensor,
    bos_id: int,
    eos_id: int,
    num_beams: int,
    max_length: int | None = None,
    length_penalty: float = 1.0,
    grid: tuple[int, int] | None = None,
) -> Tensor:
    """Keeps the `num_beams` best captions at every length; returns the best of each picture, as `greedy_search`.

    Captions are ranked by log-probability / length ** length_penalty, length counted without [bos]. A finished caption
    stays in its beam and competes on; the search stops when all beams of the batch have finished.
    """
    if num_beams < 1:
        raise OpenVisionError(f"num_beams must be at least 1, got {num_beams}")
    pad_id, limit, device = decoder.config.pad_id, _limit(decoder, max_length), tokens.device
    batch = tokens.shape[0]
    rows = torch.arange(batch, device=device)[:, None] * num_beams
    decoder = decoder.for_steps()
    state = decoder.start(tokens, grid, limit, num_beams)
    ids = torch.full((batch * num_beams, limit), pad_id, dtype=torch.long, device=device)
    ids[:, 0] = bos_id
    finished = torch.zeros(batch, num_beams, dtype=torch.bool, device=device)
    lengths = torch.zeros(batch, num_beams, device=device)
    totals = torch.full((batch, num_beams), -math.inf, device=device)
    totals[:, 0] = 0.0  # all beams are equal at first: go on from one of them
    for place in range(1, limit):
        logits = _rule_out(decoder.step(ids[:, place - 1], state).float(), pad_id, bos_id)
        scores = logits.log_softmax(dim=-1).view(batch, num_beams, -1)
        vocab = scores.shape[-1]
        scores = scores.masked_fill(finished[..., None], -math.inf)
        scores[..., pad_id] = torch.where(finished, 0.0, -math.inf)  # a finished caption goes on as itself
        candidates = totals[..., None] + scores
        following_lengths = lengths + (~finished).float()
        ranking = candidates / following_lengths[..., None] ** length_penalty
        best = ranking.view(batch, -1).topk(num_beams, dim=-1).indices
        parent, word = best // vocab, best % vocab
        totals = candidates.view(batch, -1).gather(1, best)
        lengths = following_lengths.gather(1, parent)
        index = (rows + parent).flatten()
        state.reorder(index)
        ids[:, :place] = ids[index, :place]
        ids[:, place] = word.flatten()
        finished = finished.gather(1, parent) | (word == eos_id)
        if _all_ended(finished, place):
            break
    winner = (totals / lengths.clamp(min=1) ** length_penalty).argmax(dim=-1)
    return ids[rows[:, 0] + winner, : _longest(ids, pad_id)]


def _limit(decoder: CaptionDecoder, max_length: int | None) -> int:
    context = decoder.config.context_length
    if max_length is None:
        return context
    if not 2 <= max_length <= context:
        raise OpenVisionError(f"max_length must be from 2 to the context length {context}, got {max_length}")
    return max_length


def _rule_out(logits: Tensor, pad_id: int, bos_id: int) -> Tensor:
    """Rules out padding, which stands for a finished caption, and a second [bos]; in place."""
    logits[:, pad_id] = -math.inf
    logits[:, bos_id] = -math.inf
    return logits


def _all_ended(finished: Tensor, place: int) -> bool:
    return (finished.device.type == "cpu" or place % _STEPS_BETWEEN_QUESTIONS == 0) and bool(finished.all())


def _longest(ids: Tensor, pad_id: int) -> int:
    """Columns up to the last that holds more than padding: a search may have gone on when all had ended."""
    return int((ids != pad_id).any(dim=0).sum())
