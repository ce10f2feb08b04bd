"""Text to ids and back."""

import json
import pickle
import string
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from openvision3.config import OpenVisionError, SceneConfig
from openvision3.data import demo, grammar
from openvision3.data.tokenizer import CaptionTokenizer, bert_tokenizer, demo_tokenizer

DEMO = demo_tokenizer()


def words(tokenizer: CaptionTokenizer, text: str) -> list[str | None]:
    return [tokenizer.tokenizer.id_to_token(i) for i in tokenizer.encode(text)]


def test_size_and_special_ids() -> None:
    """Weights depend on the ids: a change here breaks every saved demo model."""
    assert DEMO.vocab_size == 773 <= 2048
    assert (DEMO.pad_id, DEMO.unk_id, DEMO.bos_id, DEMO.eos_id, DEMO.cls_id) == (0, 1, 2, 3, 4)
    assert DEMO.encode("a panda, two apples") == [15, 540, 120, 747, 153, 101]


def test_contrastive_layout() -> None:
    """`[bos] words [eos] pad... [cls]`, the class token always last; too long a text is cut before `[eos]`."""
    pad, bos, eos, cls = DEMO.pad_id, DEMO.bos_id, DEMO.eos_id, DEMO.cls_id
    a, panda, tiger = (DEMO.encode(word)[0] for word in ("a", "panda", "tiger"))
    ids = DEMO.encode_contrastive(["a panda", "", "a panda a tiger a panda"], 7)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [
        [bos, a, panda, eos, pad, pad, cls],
        [bos, eos, pad, pad, pad, pad, cls],
        [bos, a, panda, a, tiger, eos, cls],
    ]


def test_caption_layout() -> None:
    """`[bos] words [eos] pad...`; truncation keeps `[eos]`, and the class token never occurs."""
    pad, bos, eos = DEMO.pad_id, DEMO.bos_id, DEMO.eos_id
    a, panda = (DEMO.encode(word)[0] for word in ("a", "panda"))
    ids = DEMO.encode_caption(["a panda", "", "a panda a panda"], 5)
    assert ids.tolist() == [[bos, a, panda, eos, pad], [bos, eos, pad, pad, pad], [bos, a, panda, a, eos]]
    with pytest.raises(ValueError, match="1 tokens"):
        DEMO.encode_caption(["a"], 1)


def test_special_names_in_a_text_are_plain_text() -> None:
    for text in ("[PAD] [CLS] [EOS] [BOS] [UNK]", "a ##s", "a ###es"):
        ids = DEMO.encode(text)
        assert not {DEMO.pad_id, DEMO.unk_id, DEMO.bos_id, DEMO.eos_id, DEMO.cls_id} & set(ids)
        assert DEMO.decode(ids) == DEMO.normalise(text)


def test_words_are_whole() -> None:
    assert words(DEMO, "two red apples and a t-rex, by the water") == [
        "two", "red", "apple", "##s", "and", "a", "t-rex", "##,", "by", "the", "water",
    ]  # fmt: skip
    assert words(DEMO, "boxes mice") == ["box", "##es", "mice"]


def test_no_name_is_unknown_or_spelt() -> None:
    """Each word of a name is one token, and a plural ending one more (two in "nuts and bolts")."""
    for name in demo.scene_names():
        for count in (1, 2):
            phrase = grammar.noun_phrase(name, count=count)
            ids = DEMO.encode(phrase)
            assert DEMO.unk_id not in ids and len(ids) <= len(phrase.split()) + 2 * (count - 1), phrase
            assert DEMO.decode(ids) == phrase


def test_captions_fit_in_30_tokens_and_come_back() -> None:
    crowded = SceneConfig(count_weights=(0.1, 0.1, 0.2, 0.6))
    for i in range(250):
        texts = grammar.captions(demo.scene(crowded, "train", 5, i))
        for text in (texts.alt, texts.caption):
            row = DEMO.encode_caption([text], 30)[0]
            assert DEMO.eos_id in row.tolist() and DEMO.decode(row) == text


def test_longest_alt_text_fits_in_30_tokens() -> None:
    longest = sorted((len(DEMO.encode(grammar.noun_phrase(name))) for name in demo.scene_names()), reverse=True)[:4]
    assert sum(longest) + 3 + 3 <= 30  # two commas and an "and"; bos, eos, cls


def test_decode_stops_at_eos() -> None:
    ids = [DEMO.bos_id, *DEMO.encode("a panda"), DEMO.eos_id, *DEMO.encode("a tiger")]
    assert DEMO.decode(ids) == DEMO.decode(torch.tensor(ids)) == "a panda"
    assert DEMO.decode([]) == ""


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from(string.printable), max_size=60))
def test_any_ascii_text_comes_back(text: str) -> None:
    ids = DEMO.encode(text)
    assert DEMO.unk_id not in ids and DEMO.decode(ids) == DEMO.normalise(text)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_any_text_gives_ids(text: str) -> None:
    assert DEMO.encode_contrastive([text], 16).shape == (1, 16)


def test_accents_and_long_texts() -> None:
    assert DEMO.decode(DEMO.encode("Café  ÉCLAIR")) == "cafe eclair"
    assert DEMO.encode_caption(["panda " * 2000], 32)[0, -1] == DEMO.eos_id
    assert DEMO.encode("x" * 10_000) == [DEMO.unk_id]


def test_save_and_load(tmp_path: Path) -> None:
    DEMO.save(tmp_path / "tokenizer.json")
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]
    loaded = CaptionTokenizer.load(tmp_path / "tokenizer.json")
    text = ["Two apples, a t-rex and scissors?"]
    assert torch.equal(loaded.encode_contrastive(text, 20), DEMO.encode_contrastive(text, 20))
    assert loaded.decode(loaded.encode(text[0])) == text[0].lower() and loaded.vocab_size == DEMO.vocab_size
    copied = pickle.loads(pickle.dumps(DEMO))  # data workers that are spawned get it so
    assert copied.encode(text[0]) == DEMO.encode(text[0])


def test_load_refuses_what_is_no_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(tmp_path / "foreign.json"))
    contents = {
        "does not exist|No such file": None,
        "not a tokenizer": b"{}",
        "not a tokenizer ": json.dumps({"model": {"type": "WordPiece", "vocab": "x"}}).encode(),
        "can't be read": b"\x80\x04pickle\xff",
        r"lacks \[PAD\]": (tmp_path / "foreign.json").read_bytes(),
    }
    for message, content in contents.items():
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(OpenVisionError, match=message) as caught:
            CaptionTokenizer.load(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_load_reads_no_huge_file(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(OpenVisionError, match="larger than 64 MiB"):
        CaptionTokenizer.load(path)


def test_bert_tokenizer_equals_the_published_ids() -> None:
    """The ids of BERT uncased for a known sentence, in both layouts."""
    bert = bert_tokenizer()
    assert bert.vocab_size == 30522
    assert (bert.pad_id, bert.unk_id, bert.bos_id, bert.eos_id, bert.cls_id) == (0, 100, 1, 102, 101)
    assert bert.encode("Hello, world! Unaffable.") == [7592, 1010, 2088, 999, 14477, 20961, 3468, 1012]
    assert bert.encode_contrastive(["hello world"], 6).tolist() == [[1, 7592, 2088, 102, 0, 101]]
    assert bert.decode(bert.encode("Hello, unaffable World!")) == "hello, unaffable world!"
