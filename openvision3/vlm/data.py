"""Conversations about pictures, encoded for LLaVA: LLaVA's JSON with a folder or tars, or the demo's scenes.

The order is a function of the seed alone; batches hold conversations of about the same length (as LLaVA's).
"""

import io
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from openvision3.config import OpenVisionError, SceneConfig
from openvision3.data import demo, grammar
from openvision3.data.store import expand
from openvision3.data.tar_index import open_index
from openvision3.data.transforms import decode_image
from openvision3.vlm.config import VLMDataConfig
from openvision3.vlm.conversation import IGNORED, IMAGE, Message, UnusableConversation, encode, encode_apart

MAX_JSON_BYTES = 4 * 2**30
_NOBODY = -1  # turn of padding
_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}


@dataclass
class Conversation:
    """A conversation whose texts hold "<image>" where a picture stands, and the pictures, RGB, in order."""

    key: str
    messages: list[Message]
    pictures: list[Image.Image] = field(default_factory=list)


class Conversations(Protocol):
    """Conversations by number."""

    def __len__(self) -> int: ...

    def read(self, number: int) -> Conversation:
        """Raises `OpenVisionError` for one that can't be used."""
        ...

    def words(self, number: int) -> int:
        """About how long its text is."""
        ...

    def pictures(self, number: int) -> int:
        """How many it has."""
        ...


class SceneConversations(Conversations):
    """Scenes with their caption, or with questions of all kinds in one conversation; scenes do not end."""

    def __init__(self, config: SceneConfig, kind: str, side: int, seed: int, count: int, split: str = "train"):
        self.config, self.kind, self.side, self.seed, self.count, self.split = config, kind, side, seed, count, split

    def __len__(self) -> int:
        return self.count

    def words(self, number: int) -> int:
        """Of the whole conversation."""
        return sum(len(question.split()) + len(answer.split()) for question, answer in self._asked(self._scene(number)))

    def pictures(self, number: int) -> int:
        """One."""
        return 1

    def read(self, number: int) -> Conversation:
        """Of the scene with that number."""
        scene = self._scene(number)
        messages: list[Message] = []
        for question, answer in self._asked(scene):
            content = question if messages else f"{IMAGE}\n{question}"
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        return Conversation(scene.key, messages, [Image.fromarray(demo.render(scene, self.side))])

    def _scene(self, number: int) -> demo.Scene:
        return demo.scene(self.config, self.split, self.seed, number)

    def _asked(self, scene: demo.Scene) -> list[tuple[str, str]]:
        if self.kind == "captions":
            return [(grammar.CAPTION_QUESTION, grammar.captions(scene).caption)]
        names = demo.names(self.config.num_names)
        return scene_questions(scene, random.Random(f"conversation {scene.key}"), names)


def scene_questions(scene: demo.Scene, rng: random.Random, names: Sequence[str]) -> list[tuple[str, str]]:
    """Questions with their answers in a random order: presence (as many yes as no), counts, relations, place, caption.

    Of `names` are those asked for in vain, half of them of the group of one that is there.
    """
    groups = Counter(thing.name for thing in scene.things)
    group = demo.groups()[next(iter(groups))]
    asked = [(grammar.presence_question(name), "yes") for name in groups]
    kin = [name for name in names if demo.groups()[name] == group and name not in groups]
    while sum(answer == "no" for _, answer in asked) < len(groups):
        name = rng.choice(kin if kin and rng.random() < 0.5 else names)
        question = (grammar.presence_question(name), "no")
        if name not in groups and question not in asked:
            asked.append(question)
    asked += [(grammar.count_question(name), grammar.NUMBERS[count - 1]) for name, count in groups.items()]
    statable = grammar.statable_relations(scene)
    rng.shuffle(statable)
    for a, relation, b in statable[:4]:
        right = rng.random() < 0.5
        question = grammar.relation_question(a, relation if right else grammar.OPPOSITE[relation], b)
        asked.append((question, "yes" if right else "no"))
    if word := grammar.scene_word(scene):
        asked.append((grammar.SCENE_QUESTION, grammar.SCENE_PHRASES[word]))
    asked.append((grammar.CAPTION_QUESTION, grammar.captions(scene).caption))
    rng.shuffle(asked)
    return asked


class JsonConversations(Conversations):
    """LLaVA's JSON: a list of {id, image: path or list of paths (or none), conversations: [{from, value}]}."""

    def __init__(self, path: Path, images: str):
        self.path, self.entries = path, _read_list(path)
        self.pictures_of = _open_pictures(images) if any(map(_names, self.entries)) else None

    def __len__(self) -> int:
        return len(self.entries)

    def words(self, number: int) -> int:
        """Of all its turns."""
        turns = self.entries[number].get("conversations")
        return sum(len(str(turn.get("value", "")).split()) for turn in turns) if isinstance(turns, list) else 0

    def pictures(self, number: int) -> int:
        """How many it names."""
        return len(_names(self.entries[number]))

    def read(self, number: int) -> Conversation:
        """With its pictures decoded. Raises `OpenVisionError` that names the entry."""
        entry = self.entries[number]
        key = f"{self.path.name}, entry {number} ({str(entry.get('id', ''))[:80]!r})"
        try:
            turns = entry["conversations"]
            messages = [{"role": _ROLES[turn["from"]], "content": str(turn["value"])} for turn in turns]
        except (KeyError, TypeError):
            raise UnusableConversation(f'{key}: expected "conversations": [{{"from": ..., "value": ...}}]') from None
        if messages and messages[0]["role"] == "assistant":  # as LLaVA: some of ShareGPT's begin with an answer
            del messages[0]
        try:
            pictures = [self.pictures_of.read(name) for name in _names(entry)] if self.pictures_of else []
        except OpenVisionError as error:
            raise UnusableConversation(f"{key}: {error}") from None
        missing = len(pictures) - sum(message["content"].count(IMAGE) for message in messages)
        if missing > 0 and messages:  # as LLaVA: pictures that no text places stand first
            messages[0] = {**messages[0], "content": f"{IMAGE}\n" * missing + messages[0]["content"]}
        return Conversation(key, messages, pictures)


def _read_list(path: Path) -> list[dict[str, Any]]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise OpenVisionError(f"{path} is larger than {MAX_JSON_BYTES // 2**30} GiB")
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OpenVisionError(f"can't read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise OpenVisionError(f"{path} is no JSON: expected LLaVA's list of conversations") from None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise OpenVisionError(f"{path}: expected LLaVA's list of conversations, at least one")
    return entries


def _names(entry: dict[str, Any]) -> list[str]:
    image = entry.get("image")
    return [] if not image else [str(name) for name in image] if isinstance(image, list) else [str(image)]


class _Folder:
    def __init__(self, root: Path):
        self.root = root

    def read(self, name: str) -> Image.Image:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts:
            raise OpenVisionError(f"picture {name[:80]!r} lies outside of {self.root}")
        try:
            with open(self.root / pure, "rb") as file:
                return decode_image(file, f"picture {name[:80]}")
        except OSError as error:
            raise OpenVisionError(f"picture {name[:80]}: {error.strerror or error}") from None


class _Tars:
    """Pictures by their names in tars, found by the tars' indexes."""

    def __init__(self, paths: Sequence[Any]):
        self.places: dict[str, tuple[Path, int, int]] = {}
        for path in paths:
            if not isinstance(path, Path):
                raise OpenVisionError(f"{path}: tars of pictures must be local files")
            for entry in open_index(path).entries:
                for extension, (offset, size) in entry.members.items():
                    self.places[f"{entry.key}.{extension}"] = (path, offset, size)

    def read(self, name: str) -> Image.Image:
        try:
            path, offset, size = self.places[name.removeprefix("./")]
        except KeyError:
            raise OpenVisionError(f"picture {name[:80]!r} is in none of the tars") from None
        with open(path, "rb") as file:
            file.seek(offset)
            return decode_image(io.BytesIO(file.read(size)), f"picture {name[:80]}")


def _open_pictures(images: str) -> _Folder | _Tars:
    if images.endswith(".tar"):
        return _Tars(expand(images))
    folder = Path(images).expanduser()
    if not images or not folder.is_dir():
        raise OpenVisionError(f"images is {images!r}: expected the folder, or the tars, that hold the JSON's pictures")
    return _Folder(folder)


def open_conversations(config: VLMDataConfig, side: int, seed: int, count: int) -> Conversations:
    """What a stage learns from; `count` scenes of `side` pixels where it is scenes."""
    if config.source == "scenes":
        return SceneConversations(config.scenes, config.ask, side, seed, count)
    return JsonConversations(Path(config.source).expanduser(), config.images)


def order(conversations: Conversations, samples: int, batch_size: int, picture_tokens: int, seed: int) -> list[int]:
    """The numbers of `samples` conversations, epoch after epoch, grouped by length into batches in a random order."""
    from transformers.trainer_pt_utils import get_length_grouped_indices

    count = len(conversations)
    lengths = [conversations.words(n) + picture_tokens * conversations.pictures(n) for n in range(count)]
    generator, numbers = torch.Generator().manual_seed(seed), []
    while len(numbers) < samples:
        if max(lengths) == min(lengths):
            numbers += torch.randperm(count, generator=generator).tolist()
        else:
            numbers += get_length_grouped_indices(lengths, batch_size, generator=generator)
    return numbers[:samples]


class EncodedConversations(Dataset[dict[str, Any]]):
    """Positions of a stage to what LLaVA takes. What can't be used gives way to what comes next, and is named."""

    def __init__(
        self,
        conversations: Conversations,
        numbers: Sequence[int],
        processor: Any,
        max_length: int,
        config: VLMDataConfig,
    ):
        self.conversations, self.numbers, self.processor = conversations, numbers, processor
        self.max_length, self.config = max_length, config

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """ids, labels and, of turns apart, turns and positions (L,); pictures as the processor makes them; "bad"."""
        bad: list[str] = []
        for step in range(min(100, len(self.numbers))):
            try:
                conversation = self.conversations.read(self.numbers[(position + step) % len(self.numbers)])
                try:
                    return {**self.encoded(conversation), "bad": bad}
                except UnusableConversation as error:
                    raise UnusableConversation(f"{conversation.key}: {error}") from None
            except UnusableConversation as error:
                bad.append(str(error))
        raise OpenVisionError(f"{len(bad)} conversations in a row can't be used, such as {bad[-1]}")

    def encoded(self, conversation: Conversation) -> dict[str, Any]:
        """Of one conversation."""
        pictures = {}
        if conversation.pictures:
            pictures = dict(self.processor.image_processor(conversation.pictures, return_tensors="pt"))
        counts = picture_tokens(self.processor, conversation.pictures, pictures)
        tokenizer, messages = self.processor.tokenizer, conversation.messages
        if self.config.apart:
            found = encode_apart(tokenizer, messages, counts, self.max_length)
        else:
            found = encode(tokenizer, messages, counts, self.max_length, self.config.template)
        row = {"input_ids": torch.tensor(found.ids), "labels": torch.tensor(found.labels)}
        if found.turns:
            row |= {"turns": torch.tensor(found.turns), "position_ids": torch.tensor(found.positions())}
        return {**row, **pictures}


def picture_tokens(processor: Any, pictures: Sequence[Image.Image], made: dict[str, Any]) -> list[int]:
    """How many tokens each picture stands for, as transformers' processor counts them."""
    if not pictures:
        return []
    height, width = made["pixel_values"].shape[-2:]
    if hasattr(processor, "_get_number_of_features"):  # LLaVA-NeXT
        sizes = [(picture.height, picture.width) for picture in pictures]
        drop = processor.vision_feature_select_strategy == "default"
        return [processor._get_number_of_features(h, w, height, width) - drop for h, w in sizes]
    count = (height // processor.patch_size) * (width // processor.patch_size) + processor.num_additional_image_tokens
    return [count - (processor.vision_feature_select_strategy == "default")] * len(pictures)


class Collate:
    """Encoded conversations to one batch, padded on the right.

    Where turns are apart, the mask says of each token which ones it sees: (B, 1, L, L), for scaled dot products.

    "logits_to_keep" are the columns after which some row has something to learn: the language model's output matrix,
    the largest of all, is applied there alone. A batch without pictures gets a grey one whose tokens nothing looks at,
    so that all processes run the same layers (an FSDP process that skips one waits for ever).
    """

    def __init__(self, processor: Any):
        self.pad_id = processor.tokenizer.pad_token_id
        self.image_id = processor.tokenizer.convert_tokens_to_ids(IMAGE)
        if self.pad_id is None:
            raise OpenVisionError("the language model's tokenizer has no padding token")
        grey = Image.new("RGB", (64, 64), (127, 127, 127))
        made = dict(processor.image_processor([grey], return_tensors="pt"))
        self.grey, (self.grey_tokens,) = made, picture_tokens(processor, [grey], made)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Returns input_ids, labels, attention_mask (B, L) or (B, 1, L, L), logits_to_keep, pictures, and "bad"."""
        ids, labels = [row["input_ids"] for row in rows], [row["labels"] for row in rows]
        with_pictures = [row for row in rows if "pixel_values" in row]
        masks = [torch.ones_like(row) for row in ids]
        turns = [row.get("turns", torch.zeros_like(row["input_ids"])) for row in rows]
        places = [row.get("position_ids", torch.arange(len(row["input_ids"]))) for row in rows]
        if not with_pictures:
            with_pictures = [self.grey]
            extra = self.grey_tokens
            ids[0] = torch.cat([ids[0], torch.full((extra,), self.image_id)])
            labels[0], masks[0] = pad(labels[0], (0, extra), value=IGNORED), pad(masks[0], (0, extra))
            turns[0], places[0] = pad(turns[0], (0, extra), value=_NOBODY), pad(places[0], (0, extra))
        batch: dict[str, Any] = {
            "input_ids": _padded(ids, self.pad_id),
            "labels": _padded(labels, IGNORED),
            "attention_mask": _padded(masks, 0),
            "pixel_values": _stacked([row["pixel_values"] for row in with_pictures]),
            "bad": [reason for row in rows for reason in row.get("bad", [])],
        }
        if "image_sizes" in self.grey:
            batch["image_sizes"] = torch.cat([torch.as_tensor(row["image_sizes"]) for row in with_pictures])
        if any("turns" in row for row in rows):
            batch["position_ids"] = _padded(places, 0)
            batch["attention_mask"] = seen(_padded(turns, _NOBODY))
        batch["logits_to_keep"] = (batch["labels"][:, 1:] != IGNORED).any(dim=0).nonzero()[:, 0]
        return batch


def seen(turns: Tensor) -> Tensor:
    """What each token sees (B, 1, L, L), for turns (B, L) of `EncodedConversation`; padding sees itself alone."""
    length = turns.shape[1]
    of, by = turns[:, None, :], turns[:, :, None]
    before = torch.ones(length, length, dtype=torch.bool).tril()
    itself = torch.eye(length, dtype=torch.bool)
    return (((of == by) | ((of == 0) & (by != _NOBODY))) & before & ((by != _NOBODY) | itself))[:, None]


def _padded(rows: Sequence[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def _stacked(pictures: Sequence[Tensor]) -> Tensor:
    """Pictures (n, 3, H, W), or (n, tiles, 3, H, W) with as many tiles as the picture with most of them."""
    if pictures[0].ndim == 4:
        return torch.cat(list(pictures))
    most = max(tensor.shape[1] for tensor in pictures)
    return torch.cat([pad(tensor, (0, 0, 0, 0, 0, 0, 0, most - tensor.shape[1])) for tensor in pictures])
