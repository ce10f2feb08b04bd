"""Text to token ids and back: WordPiece, with the layouts of the contrastive tower and of the caption decoder."""

import functools
import os
import string
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from openvision3.config import OpenVisionError
from openvision3.data import grammar

MAX_FILE_BYTES = 64 * 2**20  # of a saved tokenizer
MAX_WORD = 100  # letters; a longer word becomes unknown
_SPECIALS = ("[PAD]", "[UNK]", "[BOS]", "[EOS]", "[CLS]")
_BERT_SPECIALS = ("[PAD]", "[UNK]", "[unused0]", "[SEP]", "[CLS]")
# beside the grammar's words, so that a user's prompt in everyday words is not spelt letter by letter
_PROMPT_WORDS = "photo picture image drawing of is are there this that it on at near behind one some many photograph"


class CaptionTokenizer:
    """A WordPiece tokenizer and the ids of its five special tokens: pad, unknown, bos, eos, cls."""

    def __init__(self, tokenizer: Tokenizer):
        """Raises `OpenVisionError` where the vocabulary lacks a special token."""
        self.tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        specials = _SPECIALS if "[BOS]" in vocabulary else _BERT_SPECIALS
        missing = [name for name in specials if name not in vocabulary]
        if missing:
            raise OpenVisionError(f"the tokenizer's vocabulary lacks {', '.join(missing)}")
        self.pad_id, self.unk_id, self.bos_id, self.eos_id, self.cls_id = (vocabulary[name] for name in specials)
        self.vocab_size = max(vocabulary.values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of a text's words alone, of any number."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_contrastive(self, texts: Sequence[str], length: int) -> Tensor:
        """Ids (B, length), int64, laid out `[bos] words [eos] pad... [cls]` (OpenVision 1); what is too long is cut."""
        ids = self._rows(texts, length - 1)
        return torch.nn.functional.pad(ids, (0, 1), value=self.cls_id)

    def encode_caption(self, texts: Sequence[str], length: int) -> Tensor:
        """Ids (B, length), int64, laid out `[bos] words [eos] pad...`; what is too long is cut, but `[eos]` kept."""
        return self._rows(texts, length)

    def _rows(self, texts: Sequence[str], length: int) -> Tensor:
        if length < 2:
            raise ValueError(f"no text fits in {length} tokens")
        rows = torch.full((len(texts), length), self.pad_id, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            ids = [self.bos_id, *self.encode(text)[: length - 2], self.eos_id]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of one row of ids, up to `[eos]`; of what `encode` gave, the normalised text."""
        words = []
        for i in torch.as_tensor(ids).tolist():
            if i == self.eos_id:
                break
            if i not in (self.pad_id, self.bos_id, self.cls_id):
                words.append(i)
        return self.tokenizer.decode(words, skip_special_tokens=False)

    def normalise(self, text: str) -> str:
        """The text as the tokenizer sees it: lower case, no accents, single spaces."""
        normalizer = self.tokenizer.normalizer
        return " ".join((normalizer.normalize_str(text) if normalizer else text).split())

    def save(self, path: str | Path) -> None:
        """Writes the tokenizer as JSON, whole or not at all."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(self.tokenizer.to_str(pretty=False) + "\n", encoding="utf-8")
        temporary.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "CaptionTokenizer":
        """Reads what `save` wrote; raises `OpenVisionError` for a file that is missing, too large, or no tokenizer."""
        path = Path(path)
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise OpenVisionError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB, which no tokenizer is")
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise OpenVisionError(f"{path}: can't be read as a tokenizer ({error})") from None
        try:
            tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the tokenizers package raises bare Exceptions
            raise OpenVisionError(f"{path}: not a tokenizer ({' '.join(str(error).split())[:200]})") from None
        try:
            return cls(tokenizer)
        except OpenVisionError as error:
            raise OpenVisionError(f"{path}: {error}") from None


@functools.cache
def demo_tokenizer() -> CaptionTokenizer:
    """The demo's tokenizer: at most 2,048 entries, made from the scene grammar's words.

    Every word of the grammar is one token, a regular plural two; any other text in ASCII falls back to its characters,
    so that decoding gives back the normalised text.
    """
    characters = [c for c in string.printable if not c.isspace() and not c.isupper()]
    words = sorted(grammar.vocabulary() | set(_PROMPT_WORDS.split()))
    pieces = [*_SPECIALS, *characters, *(f"##{c}" for c in characters), "##es", *(w for w in words if len(w) > 1)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    assert len(vocabulary) == len(pieces) <= 2048
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=MAX_WORD))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=False, strip_accents=True, lowercase=True),
            normalizers.Replace(Regex("#(?=#)"), "# "),  # "##s" in a text is not the piece ##s
        ]
    )
    # words end at spaces alone: punctuation becomes a continuing piece, and so finds its place again when decoded
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return CaptionTokenizer(tokenizer)


def bert_tokenizer() -> CaptionTokenizer:
    """The uncased BERT WordPiece of the paper's recipes, 30,522 entries, its vocabulary fetched through `assets`.

    `[unused0]` serves as bos and `[SEP]` as eos. Raises `OpenVisionError` where the vocabulary can't be had.
    """
    from openvision3.assets import fetch

    path = fetch("bert-vocab")
    vocabulary = {piece: i for i, piece in enumerate(path.read_text(encoding="utf-8").splitlines())}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=MAX_WORD))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return CaptionTokenizer(tokenizer)
