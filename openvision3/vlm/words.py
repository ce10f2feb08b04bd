"""A first alignment of a new projector, in minutes: which words of its caption each token of a picture stands for.

Captions are taken as bags of words, each said of one token of the picture chosen blindly: IBM's Model 1 of translation
(Brown et al. 1993, J93-2003), from picture to words. With N tokens p_i that the projector makes of a picture, and the
language model's own embedding e_w of a word w, seen from the embeddings' mean,

    P(w | picture) = 1/N sum_i softmax_w(s cos(p_i, e_w)),

whose logarithm is maximised over the words of the captions. No token is told what it shows; that follows from which
words come and go with it. Afterwards each token of a picture lies among the embeddings, near the words for what is
there, where a language model reads it almost as it reads text. LLaVA learns this through the language model itself,
from hundreds of thousands of captions; the language model takes no part here, so that thousands of pictures take
minutes. The recipes of LLaVA do not have it.
"""

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openvision3.config import OpenVisionError
from openvision3.files import save_tensors
from openvision3.training.monitor import Monitor
from openvision3.vlm.config import WordsConfig
from openvision3.vlm.conversation import UnusableConversation
from openvision3.vlm.data import Conversations
from openvision3.vlm.folder import VLM

_ENCODED = 32  # pictures that the encoder takes at once
_HELD_OUT = 512  # pictures that nothing is learned from, at most an eighth
_FIRST_SCALE = 10.0  # s above
_LOGGED = 50  # steps
_FLOOR = 1e-6  # of the largest variance of a direction of the tokens

WORDS = "projector.safetensors"  # of the folder of this stage

Progress = Callable[[int, dict[str, float]], None]


def words_of(text: str) -> list[str]:
    """In lower case, hyphens and apostrophes kept."""
    return re.findall(r"[^\W\d_]+(?:[-'][^\W\d_]+)*", text.lower())


def vocabulary(captions: Sequence[Sequence[str]], config: WordsConfig) -> list[str]:
    """The words that are learned: in at least `fewest` captions and in no more than the part `commonest` of them."""
    seen = Counter(word for caption in captions for word in set(caption))
    most = config.commonest * len(captions)
    found = [word for word, count in seen.items() if config.fewest <= count <= most]
    return sorted(sorted(found, key=lambda word: (-seen[word], word))[: config.most_words])


def captioned(conversations: Conversations, samples: int) -> Iterator[tuple[Any, list[str]]]:
    """Picture and words of the answers, of each conversation about one picture; others and unusable ones are passed."""
    for number in range(min(samples, len(conversations))):
        try:
            said = conversations.read(number)
        except UnusableConversation:
            continue
        answers = [message["content"] for message in said.messages if message["role"] == "assistant"]
        if len(said.pictures) == 1 and answers:
            yield said.pictures[0], words_of(" ".join(answers))


def learn_words(
    vlm: VLM,
    conversations: Conversations,
    config: WordsConfig,
    folder: Path,
    seed: int,
    device: torch.device,
    stop: Callable[[], bool],
) -> bool:
    """Encodes the pictures and aligns the new projector of a run, in one process; writes its weights to FOLDER/WORDS.

    `stop` is asked between batches; with a yes all is given up and False returned: minutes, that are the same again.
    """
    folder.mkdir(exist_ok=True)
    with Monitor(folder, config.samples * (1 + config.epochs), shown=("loss",)) as monitor:
        monitor.say(f"words: the projector learns the words of {config.samples:,} captions")

        steps = 0

        def progress(step: int, seen: int, figures: dict[str, float]) -> None:
            nonlocal steps
            steps = step
            if stop():
                raise _Stopped
            monitor.advance(seen)
            if figures and step % _LOGGED == 0:
                monitor.log(step, seen, figures)

        try:
            pairs = captioned(conversations, config.samples)
            tokens, words = encoded(vlm, pairs, device, lambda count: progress(0, count, {}))
            figures = align(
                vlm,
                tokens,
                words,
                config,
                seed,
                device,
                lambda step, row: progress(step, len(words) + step * config.batch_size, row),
            )
        except _Stopped:
            return False
        monitor.record("eval", steps, monitor.total, figures)
        monitor.say("words: " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    projector = vlm.model.model.multi_modal_projector
    save_tensors(folder / WORDS, {name: value.detach().cpu() for name, value in projector.state_dict().items()}, {})
    return True


class _Stopped(Exception):
    """A signal came."""


@torch.no_grad()
def encoded(
    vlm: VLM, pairs: Iterator[tuple[Any, list[str]]], device: torch.device, progress: Callable[[int], None]
) -> tuple[Tensor, list[list[str]]]:
    """The tower's tokens of pictures (n, N, D) as the projector gets them, fp16 on the CPU, and the words."""
    config, tower = vlm.model.config, vlm.model.model.vision_tower.to(device)
    parts, words, waiting = [], [], []

    def flush() -> None:
        pixels = vlm.processor.image_processor([picture for picture, _ in waiting], return_tensors="pt")["pixel_values"]
        pixels = pixels[:, 0] if pixels.ndim == 5 else pixels  # LLaVA-NeXT: the whole picture, without its tiles
        tokens = tower(pixels.to(device), output_hidden_states=True).hidden_states[config.vision_feature_layer]
        parts.append(tokens[:, int(config.vision_feature_select_strategy == "default") :].half().cpu())
        words.extend(said for _, said in waiting)
        waiting.clear()
        progress(len(words))

    for pair in pairs:
        waiting.append(pair)
        if len(waiting) == _ENCODED:
            flush()
    if waiting:
        flush()
    if len(words) < 16:
        raise OpenVisionError(f"{len(words)} captions of one picture each are too few to learn words from")
    return torch.cat(parts), words


def align(
    vlm: VLM,
    tokens: Tensor,
    words: Sequence[Sequence[str]],
    config: WordsConfig,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> dict[str, float]:
    """Fits the projector, in place, to tokens (n, N, D) of pictures and the words of their captions.

    The projector learns on whitened tokens; that and its outputs' size, that of the text's embeddings, are put into its
    two layers at the end. Returns, of pictures held out, the loss (nats a word), `recall`, the part of their words
    among as many first guesses (by the token that is surest of each), and the number of words. `progress` gets the
    step and the figures of training. Raises `OpenVisionError` where no word is neither rare nor common.
    """
    known = vocabulary(words, config)
    if not known:
        raise OpenVisionError(
            f"no word is in at least {config.fewest} captions and at most {config.commonest:g} of all"
        )
    table = vlm.model.get_input_embeddings().weight.detach().to(device).float()
    middle, tokenizer = table.mean(dim=0), vlm.processor.tokenizer
    ids = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in known]
    directions = torch.stack([table[torch.tensor(row, device=device)].mean(dim=0) for row in ids]) - middle
    of_words = F.normalize(directions, dim=-1)
    place = {word: k for k, word in enumerate(known)}
    said = torch.zeros(len(words), len(known), dtype=torch.bool)
    for row, caption in enumerate(words):
        said[row, [place[word] for word in caption if word in place]] = True

    mean, whiten = (tensor.to(device) for tensor in whitening(tokens))
    projector = vlm.model.model.multi_modal_projector
    learner = copy.deepcopy(projector).to(device).float()
    scale = torch.tensor(_FIRST_SCALE, device=device, requires_grad=True)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    for layer in (learner.linear_1, learner.linear_2):
        layer.reset_parameters()

    def likelihoods(rows: Tensor) -> Tensor:
        white = (tokens[rows].to(device).float() - mean) @ whiten
        return (F.normalize(learner(white), dim=-1) @ of_words.T * scale).log_softmax(dim=-1)

    def loss(likely: Tensor, rows: Tensor) -> Tensor:
        there = said[rows].to(device)
        return -(torch.logsumexp(likely, dim=1) - torch.tensor(likely.shape[1]).log())[there].mean()

    held = min(_HELD_OUT, len(words) // 8)
    learned = held + said[held:].any(dim=1).nonzero()[:, 0]
    steps = max(4, config.epochs * len(learned) // config.batch_size)  # the rate's rise takes at least two
    groups = [{"params": list(learner.parameters()), "weight_decay": 0.05}, {"params": [scale], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.peak_lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.peak_lr, total_steps=steps, pct_start=max(0.05, 2 / steps)
    )
    waiting = torch.empty(0, dtype=torch.long)
    for step in range(1, steps + 1):
        while len(waiting) < config.batch_size:
            waiting = torch.cat([waiting, learned[torch.randperm(len(learned), generator=generator)]])
        rows, waiting = waiting[: config.batch_size], waiting[config.batch_size :]
        value = loss(likelihoods(rows), rows)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        progress(step, {"loss": value.item(), "scale": scale.item()})
    with torch.no_grad():
        rows = said[:held].any(dim=1).nonzero()[:, 0]
        parts = [likelihoods(part) for part in rows.split(config.batch_size)]
        figures = {"words": float(len(known)), **_held_out(parts, said[rows].to(device))}
        _install(projector, learner, tokens[:_HELD_OUT].to(device).float(), mean, whiten, middle, directions)
    return figures


def _held_out(parts: list[Tensor], said: Tensor) -> dict[str, float]:
    """Loss and recall of pictures that nothing was learned from."""
    if not parts:
        return {}
    tokens = parts[0].shape[1]
    mixed = torch.cat([torch.logsumexp(part, dim=1) for part in parts]) - torch.tensor(tokens).log()
    surest = torch.cat([part.amax(dim=1) for part in parts]).argsort(dim=-1, descending=True).argsort(dim=-1)
    found = said & (surest < said.sum(dim=1, keepdim=True))
    return {"held_out_loss": -mixed[said].mean().item(), "recall": (found.sum() / said.sum()).item()}


def whitening(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D) and matrix (D, D) with which (x - mean) @ matrix has unit covariance, for tokens (n, N, D); fp32."""
    count, total = tokens.shape[0] * tokens.shape[1], torch.zeros(tokens.shape[2], dtype=torch.float64)
    squares = torch.zeros(tokens.shape[2], tokens.shape[2], dtype=torch.float64)
    for part in tokens.split(256):
        rows = part.flatten(0, 1).double()
        total, squares = total + rows.sum(dim=0), squares + rows.T @ rows
    mean = total / count
    values, directions = torch.linalg.eigh(squares / count - mean[:, None] * mean)
    return mean.float(), (directions * values.clamp(min=_FLOOR * values[-1]).rsqrt()).float()


def _install(
    projector: Any, learner: Any, tokens: Tensor, mean: Tensor, whiten: Tensor, middle: Tensor, directions: Tensor
) -> None:
    """Puts what was learned into the projector, for plain tokens, its outputs about `middle` and as large as words."""
    made = learner((tokens - mean) @ whiten)
    factor = directions.norm(dim=-1).mean() / made.norm(dim=-1).mean()
    first, second = learner.linear_1, learner.linear_2
    projector.linear_1.weight.copy_(first.weight @ whiten.T)
    projector.linear_1.bias.copy_(first.bias - first.weight @ (whiten.T @ mean))
    projector.linear_2.weight.copy_(second.weight * factor)
    projector.linear_2.bias.copy_(second.bias * factor + middle)
