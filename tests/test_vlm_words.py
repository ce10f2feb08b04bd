"""The projector's first alignment with words: whitening, what counts as a word, and that tokens find theirs."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import vlm_models
from PIL import Image
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from openvision3.config import OpenVisionError
from openvision3.vlm.assemble import assemble, open_tower
from openvision3.vlm.config import WordsConfig
from openvision3.vlm.data import Conversation
from openvision3.vlm.words import WORDS, align, learn_words, vocabulary, whitening, words_of

CPU = torch.device("cpu")
NAMES = ["key", "dragon", "panda", "apple", "lion"]


@pytest.fixture
def vlm(tmp_path):
    tower = open_tower(str(vlm_models.save_tower(tmp_path / "tower")))
    language_model = LlamaForCausalLM.from_pretrained(vlm_models.save_language_model(tmp_path / "lm"))
    return assemble(tower, language_model, vlm_models.tokenizer())


def pictures(vlm, count):
    """Tokens of pictures of two things each, where each thing has a direction of its own, far from the origin."""
    width = vlm.model.model.multi_modal_projector.linear_1.in_features
    generator = torch.Generator().manual_seed(0)
    looks = 3 * torch.randn(len(NAMES), width, generator=generator)
    shown = torch.stack([torch.randperm(len(NAMES), generator=generator)[:2] for _ in range(count)])
    which = shown.repeat_interleave(2, dim=1)  # (n, 4)
    tokens = looks[which] + 5 + 0.3 * torch.randn(count, 4, width, generator=generator)
    return tokens.half(), [["a", NAMES[a], "and", "a", NAMES[b]] for a, b in shown.tolist()], which


def test_words_of():
    assert words_of("A sea-lion, 2 apples: the dog's bone!") == ["a", "sea-lion", "apples", "the", "dog's", "bone"]


def test_vocabulary():
    """Neither what is everywhere nor what is hardly anywhere; of the rest the commonest."""
    captions = [["a", "key"]] * 5 + [["a", "lion"]] * 3 + [["a", "panda", "panda"]]
    config = WordsConfig(commonest=0.6, fewest=2)
    assert vocabulary(captions, config) == ["key", "lion"]
    assert vocabulary(captions, replace(config, fewest=1)) == ["key", "lion", "panda"]
    assert vocabulary(captions, replace(config, most_words=1)) == ["key"]


def test_whitening():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(600, 4, 8, generator=generator) @ torch.randn(8, 8, generator=generator) + 20
    mean, matrix = whitening(tokens)
    white = ((tokens - mean) @ matrix).flatten(0, 1)
    torch.testing.assert_close(torch.cov(white.T), torch.eye(8), atol=1e-2, rtol=0)
    torch.testing.assert_close(white.mean(0), torch.zeros(8), atol=1e-4, rtol=0)


def test_tokens_find_their_words(vlm):
    """Only captions are known, not which token shows what; yet each token ends next to the word for what it shows."""
    tokens, words, which = pictures(vlm, 400)
    steps = []
    config = WordsConfig(samples=400, epochs=20, batch_size=32, commonest=0.5, peak_lr=1e-2)
    figures = align(vlm, tokens, words, config, 0, CPU, lambda step, row: steps.append((step, row["loss"])))
    assert figures["words"] == len(NAMES) and figures["recall"] > 0.95
    assert steps[0][1] > 1.5 and figures["held_out_loss"] < 1.0  # at best log 2, two words of equal chance
    with torch.no_grad():
        made = vlm.model.model.multi_modal_projector(tokens[:100].float())
    table = vlm.model.get_input_embeddings().weight.detach()
    ids = vlm.processor.tokenizer.convert_tokens_to_ids(NAMES)
    middle = table.mean(dim=0)
    nearest = torch.cosine_similarity((made - middle)[..., None, :], (table[ids] - middle), dim=-1).argmax(dim=-1)
    assert (nearest == which[:100]).float().mean() > 0.95
    size = (table[ids] - middle).norm(dim=-1).mean()
    assert (made - middle).norm(dim=-1).mean() == pytest.approx(size.item(), rel=0.1)


def test_same_again(vlm):
    tokens, words, _ = pictures(vlm, 64)
    config = WordsConfig(samples=64, epochs=1, batch_size=16, commonest=0.6)
    found = []
    for _ in range(2):
        align(vlm, tokens, words, config, 3, CPU, lambda step, row: None)
        found.append([weight.clone() for weight in vlm.model.model.multi_modal_projector.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("captions", [16, 112])  # one step, and the twenty of which a twentieth is one
def test_few_steps(vlm, captions):
    tokens, words, _ = pictures(vlm, captions)
    steps = []
    config = WordsConfig(samples=captions, epochs=20 if captions > 16 else 1, batch_size=98, commonest=0.9, fewest=1)
    figures = align(vlm, tokens, words, config, 0, CPU, lambda step, row: steps.append(row["loss"]))
    assert len(steps) == (20 if captions > 16 else 4) and figures["words"] > 1


def test_without_words(vlm):
    tokens, words, _ = pictures(vlm, 32)
    with pytest.raises(OpenVisionError, match="no word is in at least 100 captions"):
        align(vlm, tokens, words, WordsConfig(samples=32, fewest=100), 0, CPU, lambda step, row: None)


class Pictures:
    """Conversations: one picture each, but for one of two and a text."""

    def __len__(self):
        return 34

    def read(self, number):
        shown = [Image.new("RGB", (32, 32), (7 * number, 200, 10))] * {3: 2, 5: 0}.get(number, 1)
        said = {"role": "assistant", "content": f"a {NAMES[number % 5]} and a {NAMES[number % 3]}"}
        return Conversation(str(number), [{"role": "user", "content": "what"}, said], shown)


def test_learn_words(vlm, tmp_path):
    """The weights are those of the model, the records say what came of it; stopped, nothing is left to be taken up."""
    config = WordsConfig(samples=34, epochs=2, batch_size=8, commonest=0.8)
    data: Any = Pictures()
    assert not learn_words(vlm, data, config, tmp_path / "stopped", 0, CPU, lambda: True)
    assert not (tmp_path / "stopped" / WORDS).exists()
    assert learn_words(vlm, data, config, tmp_path / "words", 0, CPU, lambda: False)
    found, mine = load_file(tmp_path / "words" / WORDS), vlm.model.model.multi_modal_projector.state_dict()
    assert found.keys() == mine.keys() and all(torch.equal(found[name], mine[name]) for name in found)
    rows = [json.loads(line) for line in (tmp_path / "words" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["kind"] == "eval" and rows[-1]["words"] == len(NAMES)
