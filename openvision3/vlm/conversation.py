"""A conversation as token ids with labels on the answers alone, by the tokenizer's own chat template."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from openvision3.config import OpenVisionError

IMAGE = "<image>"  # stands for a picture in a text, as in LLaVA's data
IGNORED = -100  # label of what is not learned

# Vicuna's form of a conversation, v1.1, which LLaVA-1.5 is trained with; Vicuna's own tokenizer has no template
VICUNA_TEMPLATE = (
    "{{ bos_token }}{% if messages and messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}"
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions.{% endif %}{{ ' ' }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {{ message['content'] }}{{ ' ' }}"
    "{% elif message['role'] == 'assistant' %}ASSISTANT: {{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

Message = dict[str, str]  # role ("system", "user", "assistant") and content
Template = Literal["chat", "plain"]


class UnusableConversation(OpenVisionError):
    """A conversation that can't be trained on; the others can."""


@dataclass(frozen=True)
class EncodedConversation:
    """Token ids, and of each the label: its own id where it is part of an answer, else -100.

    `turns` is empty where each token sees all before it. Else it has a number for each token: one of turn 0 sees what
    is before it of turn 0, one of another turn that and what is before it of its own turn.
    """

    ids: list[int]
    labels: list[int]
    turns: list[int] = field(default_factory=list)

    def positions(self) -> list[int]:
        """Of each token, in what it sees: each turn goes on where turn 0 ends."""
        shared = self.turns.count(0)
        begins = {turn: self.turns.index(turn) - shared for turn in set(self.turns) - {0}}
        return [place - begins.get(turn, 0) for place, turn in enumerate(self.turns)]


def encode(
    tokenizer: Any, messages: Sequence[Message], pictures: Sequence[int], max_length: int, template: Template = "chat"
) -> EncodedConversation:
    """Ids and labels of a conversation whose texts hold "<image>" where a picture stands.

    `pictures` are the numbers of tokens of the pictures, in order. "chat" is the tokenizer's chat template; what is
    learned of an answer is its text and the token that ends it. "plain" is LLaVA's form of the projector's stage:
    pictures, then the answer alone, whatever was asked. What is longer than `max_length` is cut at the end. Raises
    `UnusableConversation` where texts and pictures do not agree, where the cut goes through a picture, or where nothing
    is left to learn, and `OpenVisionError` for a template that does not write a conversation from left to right.
    """
    if template == "plain":
        messages = _plain(messages)
    expanded = _expanded(messages, pictures)
    whole, spans = _plain_text(tokenizer, expanded) if template == "plain" else _chat_text(tokenizer, expanded)
    found = tokenizer(whole, add_special_tokens=template == "plain", return_offsets_mapping=True)
    ids, offsets = list(found["input_ids"]), found["offset_mapping"]
    labels = [IGNORED] * len(ids)
    place = 0
    for number, (start, end) in enumerate(offsets):
        while place < len(spans) and start >= spans[place][1]:
            place += 1
        if place < len(spans) and end > start >= spans[place][0]:
            labels[number] = ids[number]
    if template == "plain" and ids[-1] != tokenizer.eos_token_id:
        ids, labels = [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    if ids.count(image_id) != sum(pictures):
        raise OpenVisionError(f"the tokenizer does not keep {IMAGE} as one token")
    if len(ids) > max_length:
        if image_id in ids[max_length:]:
            raise UnusableConversation(f"its pictures reach beyond max_length {max_length}")
        ids, labels = ids[:max_length], labels[:max_length]
    if all(label == IGNORED for label in labels[1:]):
        raise UnusableConversation(f"no answer is left of it within max_length {max_length}")
    return EncodedConversation(ids, labels)


def encode_apart(
    tokenizer: Any, messages: Sequence[Message], pictures: Sequence[int], max_length: int
) -> EncodedConversation:
    """As `encode`, with turns that do not see each other: as many conversations of one turn, their beginning read once.

    All pictures stand in the first question, or `UnusableConversation` is raised; so it is where messages are not
    questions and answers by turns. Turns that do not fit into `max_length` are left out.
    """
    if [message["role"] for message in messages] != ["user", "assistant"] * (len(messages) // 2):
        raise UnusableConversation("its messages are not questions and answers by turns")
    if any(IMAGE in message["content"] for message in messages[2::2]):
        raise UnusableConversation("a picture stands after the first question, but turns are apart")
    first = messages[0]["content"]
    at = first.rfind(IMAGE) + len(IMAGE) if IMAGE in first else 0
    shown = first[:at] + first[at : len(first) - len(first[at:].lstrip())]
    asked = [first[len(shown) :], *(message["content"] for message in messages[2::2])]
    turns = [
        encode(tokenizer, [{"role": "user", "content": shown + question}, answer], pictures, max_length)
        for question, answer in zip(asked, messages[1::2], strict=True)
    ]
    shared = min(len(turn.ids) for turn in turns)
    for turn in turns:
        same = (a == b and label == IGNORED for a, b, label in zip(turn.ids, turns[0].ids, turn.labels, strict=False))
        shared = min(shared, next((place for place, alike in enumerate(same) if not alike), shared))
    if len(turns) == 1:
        return turns[0]
    ids, labels, numbers = turns[0].ids[:shared], [IGNORED] * shared, [0] * shared
    for number, turn in enumerate(turns, 1):
        if number > 1 and len(ids) + len(turn.ids) - shared > max_length:
            continue
        ids, labels = ids + turn.ids[shared:], labels + turn.labels[shared:]
        numbers += [number] * (len(turn.ids) - shared)
    return EncodedConversation(ids, labels, numbers)


def render(tokenizer: Any, messages: Sequence[Message], open_answer: bool = False) -> str:
    """The text of a conversation by the tokenizer's chat template; with `open_answer`, up to where an answer begins.

    Raises `UnusableConversation` where the template refuses it, as many do where roles do not take turns.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise OpenVisionError("the language model's tokenizer has no chat template: choose an instruction-tuned one")
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=open_answer)
    except TemplateError as error:
        raise UnusableConversation(f"the chat template refuses it: {error}") from None


def _plain(messages: Sequence[Message]) -> list[Message]:
    """The pictures and the first answer."""
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if not answers:
        raise UnusableConversation("it has no answer")
    pictures = sum(message["content"].count(IMAGE) for message in messages)
    return [{"role": "user", "content": IMAGE * pictures}, {"role": "assistant", "content": answers[0]}]


def _expanded(messages: Sequence[Message], pictures: Sequence[int]) -> list[Message]:
    """Each "<image>" as often as its picture has tokens."""
    there = sum(message["content"].count(IMAGE) for message in messages)
    if there != len(pictures):
        raise UnusableConversation(f"its texts hold {there} of {IMAGE}, its pictures are {len(pictures)}")
    if any(IMAGE in message["content"] for message in messages if message["role"] == "assistant"):
        raise UnusableConversation(f"an answer holds {IMAGE}")
    counts = iter(pictures)
    expanded = []
    for message in messages:
        first, *rest = message["content"].split(IMAGE)
        expanded.append({**message, "content": first + "".join(IMAGE * next(counts) + part for part in rest)})
    return expanded


def _plain_text(tokenizer: Any, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
    prompt, answer = messages[0]["content"], messages[1]["content"]
    return prompt + answer, [(len(prompt), len(prompt) + len(answer))]


def _chat_text(tokenizer: Any, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
    """The whole text, and where each answer lies in it, from its first letter to the end of the token that ends it."""
    whole, spans = render(tokenizer, messages), []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(tokenizer, messages[:number], True), render(tokenizer, messages[: number + 1])
        if not (whole.startswith(after.rstrip()) and after.startswith(before)):
            raise OpenVisionError(
                "the language model's chat template writes earlier turns differently once later ones follow: there is "
                "no place to learn its answers from; give the tokenizer a template that writes from left to right"
            )
        said = after[len(before) :]
        at = said.find(tokenizer.eos_token) if tokenizer.eos_token else -1
        length = at + len(tokenizer.eos_token) if at >= 0 else len(said.rstrip())
        spans.append((len(before), len(before) + length))
    return whole, spans
