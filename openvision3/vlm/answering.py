"""A vision-language model's answers: greedy, in batches, or piece by piece as they come."""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image

from openvision3.config import OpenVisionError
from openvision3.vlm.folder import VLM

Pictures = Image.Image | Sequence[Image.Image] | None  # of one question
GREY = (127, 127, 127)


def grey_picture(side: int) -> Image.Image:
    """What a blind model is shown in every picture's place: RGB, `side` pixels each way."""
    return Image.new("RGB", (side, side), GREY)


def question(text: str, pictures: int = 1) -> dict[str, Any]:
    """A user's message as the processor's chat template takes it: so many pictures, then the text."""
    return {"role": "user", "content": [{"type": "image"}] * pictures + [{"type": "text", "text": text}]}


def answer(
    vlm: VLM,
    pictures: Sequence[Pictures],
    questions: Sequence[str],
    max_new_tokens: int = 64,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """The greedy answer to each question about its picture, pictures, or none; without special tokens, stripped.

    Rows of a batch are padded on the left, so that an answer does not depend on the batch it is in but for rounding.
    `progress` is called with the number of questions done. Raises `OpenVisionError` for a question that holds the
    token of a picture, or that leaves no room for an answer in the language model's context.
    """
    if len(pictures) != len(questions):
        raise ValueError(f"{len(pictures)} pictures, but {len(questions)} questions")
    if batch_size < 1 or max_new_tokens < 1:
        raise OpenVisionError(f"batch size is {batch_size} and max_new_tokens {max_new_tokens}: expected at least 1")
    answers: list[str] = []
    for start in range(0, len(questions), batch_size):
        shown = [_listed(row) for row in pictures[start : start + batch_size]]
        texts = questions[start : start + batch_size]
        rows = [[question(text, len(row))] for text, row in zip(texts, shown, strict=True)]
        inputs = _inputs(vlm, rows, [picture for row in shown for picture in row], max_new_tokens)
        with torch.inference_mode():
            ids = vlm.model.generate(**inputs, **_greedy(vlm, max_new_tokens))
        new = ids[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in vlm.tokenizer.batch_decode(new, skip_special_tokens=True)]
        if progress:
            progress(len(answers))
    return answers


def stream(
    vlm: VLM, messages: Sequence[dict[str, Any]], pictures: Sequence[Image.Image], max_new_tokens: int = 256
) -> Iterator[str]:
    """Pieces of the greedy answer to a conversation, as they are made; together they are the answer.

    `messages` are of the chat template's form (see `question`), `pictures` those of all messages in order. Where the
    caller stops reading, the model stops too. Raises as `answer` does.
    """
    from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

    class Abandoned(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:  # type: ignore[override]
            return torch.full((len(input_ids),), abandoned.is_set(), device=input_ids.device)

    inputs = _inputs(vlm, [messages], pictures, max_new_tokens)
    streamer: Any = TextIteratorStreamer(vlm.tokenizer, skip_prompt=True, skip_special_tokens=True)
    abandoned, failures = threading.Event(), []
    stopping = StoppingCriteriaList([Abandoned()])

    def work() -> None:
        try:
            with torch.inference_mode():
                vlm.model.generate(
                    **inputs, **_greedy(vlm, max_new_tokens), streamer=streamer, stopping_criteria=stopping
                )
        except BaseException as error:  # the reader's to raise; without an end it would wait for ever
            failures.append(error)
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        abandoned.set()
        thread.join()
    if failures:
        raise failures[0]


def picture_side(vlm: VLM) -> int:
    """Side in pixels of the squares that the vision tower sees: of a picture, or of a tile."""
    images = vlm.processor.image_processor
    for size in (getattr(images, "crop_size", None), images.size):
        sides = [size[name] for name in ("height", "shortest_edge") if size and name in size and size[name]]
        if sides:
            return int(sides[0])
    raise OpenVisionError(f"{vlm.name}: its processor does not say how large its pictures are")


def _listed(pictures: Pictures) -> list[Image.Image]:
    return [] if pictures is None else [pictures] if isinstance(pictures, Image.Image) else list(pictures)


def _inputs(
    vlm: VLM, conversations: Sequence[Sequence[dict[str, Any]]], pictures: Sequence[Image.Image], max_new_tokens: int
) -> dict[str, Any]:
    """What the model's `generate` takes: one row a conversation, padded on the left."""
    processor, tokenizer = vlm.processor, vlm.tokenizer
    if not processor.chat_template:
        raise OpenVisionError(f"{vlm.name} has no chat template: it can't be asked")
    if tokenizer.pad_token_id is None:
        raise OpenVisionError(f"{vlm.name}: its tokenizer has no padding token")
    for messages in conversations:
        for message in messages:
            _check_text(message["content"], processor.image_token)
    texts = [
        processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        for messages in conversations
    ]
    inputs = processor(
        images=list(pictures) or None,
        text=texts,
        padding=True,
        padding_side="left",
        add_special_tokens=False,  # the template writes them
        return_tensors="pt",
    )
    length = inputs["input_ids"].shape[1]
    limit = getattr(vlm.model.config.get_text_config(), "max_position_embeddings", None)
    if limit and length + max_new_tokens > limit:
        raise OpenVisionError(
            f"the conversation has {length} tokens, and the language model reads {limit}, its answer of up to "
            f"{max_new_tokens} included: ask less"
        )
    inputs = inputs.to(vlm.model.device)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(vlm.model.dtype)
    return dict(inputs)


def _check_text(content: Any, image_token: str) -> None:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if any(part["type"] == "text" and image_token in part["text"] for part in parts):
        raise OpenVisionError(f"the text holds {image_token}, which stands for a picture: leave it out")


def _greedy(vlm: VLM, max_new_tokens: int) -> dict[str, Any]:
    """Settings of `generate`, whatever the folder's own are; the tokenizer's end is an end, too: training uses it."""
    own = vlm.model.generation_config.eos_token_id
    ends = {vlm.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    return {
        "do_sample": False,
        "num_beams": 1,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": 0,
        "pad_token_id": vlm.tokenizer.pad_token_id,
        "eos_token_id": sorted(ends) or None,
    }
