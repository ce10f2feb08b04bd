"""Our vision-language models in lmms-eval, which finds them by the entry point `lmms_eval.models`.

With lmms-eval installed beside openvision3, its own command runs them, too: `lmms-eval --model openvision3
--model_args model=FOLDER --tasks pope`. Nothing here is imported without lmms-eval.
"""

# lmms-eval and what it needs are in an environment of their own
# pyright: reportMissingImports=false

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from loguru import logger
from PIL import Image

from openvision3.config import OpenVisionError
from openvision3.training.precision import resolve_device
from openvision3.vlm.answering import answer, question
from openvision3.vlm.folder import VLM, load_vlm

NAME = "openvision3"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def manifest() -> ModelManifest:
    """What the entry point gives lmms-eval: a name and a class."""
    return ModelManifest(NAME, simple_class_path=f"{__name__}.{LMMSModel.__qualname__}")


@dataclass(frozen=True)
class AnswerError:
    """A question without an answer, which lmms-eval scores as a wrong one (or, in MMMU, as one drawn by chance)."""

    task: str
    sample: int
    reason: str


class LMMSModel(lmms):
    """Answers lmms-eval's requests with a vision-language model of a folder; answers are greedy.

    `errors` lists the answers that are empty or failed. Each is warned of as it comes, counted at the end of each
    call, and given to lmms-eval as an empty string, since its scorers take nothing else.
    """

    is_simple = True

    def __init__(
        self,
        model: str | VLM = "demo",
        device: str | None = "auto",
        dtype: str = "fp32",
        batch_size: int | str | None = 1,
        max_new_tokens: int | str = 128,
        max_batch_size: int | None = None,
    ) -> None:
        """`model`: "demo", a folder, or one that is loaded. `max_new_tokens`: where a task does not say.

        `max_batch_size` is lmms-eval's for a search of the batch size, which there is none of here. Raises
        `OpenVisionError` for a model that can't be loaded, and for other settings than these.
        """
        super().__init__()
        if dtype not in _DTYPES:
            raise OpenVisionError(f"dtype is {dtype!r}: expected one of {', '.join(_DTYPES)}")
        self.batch_size, self.max_new_tokens = (
            _count("batch_size", batch_size or 1),
            _count("max_new_tokens", max_new_tokens),
        )
        loaded = isinstance(model, VLM)
        self.vlm = model if loaded else load_vlm(str(model), resolve_device(device or "auto"), _DTYPES[dtype])
        self.errors: list[AnswerError] = []
        self.asked = 0

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answers in the requests' order, each cut before the first of its task's stop strings."""
        answers, before = [""] * len(requests), len(self.errors)
        self.asked += len(requests)
        by_length: dict[int, list[int]] = {}
        for number, request in enumerate(requests):
            by_length.setdefault(self._length(request.args[1] or {}), []).append(number)
        for length, numbers in by_length.items():
            for start in range(0, len(numbers), self.batch_size):
                batch = numbers[start : start + self.batch_size]
                for number, found in zip(batch, self._answers([requests[n] for n in batch], length), strict=True):
                    answers[number] = found
        if found := len(self.errors) - before:
            logger.error(f"{found} of {len(requests)} answers are empty or failed; they count as wrong")
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Of each continuation: its negative log-likelihood (nats, summed), and whether it is the greedy answer.

        Negative, against what lmms-eval's documentation says: its scorer of multiple choices takes the smallest, since
        its own models return a loss. Raises `OpenVisionError` for a continuation without a token.
        """
        return [self._likelihood(request) for request in requests]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise OpenVisionError("openvision3 does not run lmms-eval's tasks of several rounds")

    def _length(self, settings: dict[str, Any]) -> int:
        """The largest number of tokens of an answer."""
        if settings.get("do_sample") or settings.get("temperature") or (settings.get("num_beams") or 1) != 1:
            raise OpenVisionError(f"the task wants answers by chance or by beams ({settings}): ours are greedy")
        return _count("max_new_tokens", settings.get("max_new_tokens") or self.max_new_tokens)

    def _answers(self, requests: Sequence[Instance], length: int) -> list[str]:
        """Of one batch; where it fails, of each of its questions alone."""
        try:
            pictures = [self._pictures(request) for request in requests]
            texts = answer(self.vlm, pictures, [request.args[0] for request in requests], length, self.batch_size)
        except Exception as error:  # one sample must not end a run of hours, nor go unseen
            if len(requests) > 1:
                return [self._answers([request], length)[0] for request in requests]
            return [self._failed(requests[0], " ".join(str(error).split())[:200] or type(error).__name__)]
        return [self._cut(request, text) for request, text in zip(requests, texts, strict=True)]

    def _cut(self, request: Instance, text: str) -> str:
        stops = (request.args[1] or {}).get("until") or []
        for stop in [stops] if isinstance(stops, str) else stops:
            # one that stands at the very beginning, as a newline may, ends nothing
            text = text.split(stop)[0].strip() if stop and not text.startswith(stop) else text
        return text or self._failed(request, "the answer is empty")

    def _failed(self, request: Instance, reason: str) -> str:
        error = AnswerError(str(request.args[4]), int(request.args[3]), reason)
        self.errors.append(error)
        logger.warning(f"no answer: {asdict(error)}")
        return ""

    def _document(self, request: Instance) -> Any:
        _, _, _, sample, task, split = request.args
        return self.task_dict[task][split][sample]

    def _pictures(self, request: Instance) -> list[Image.Image]:
        visual: Callable[[Any], list[Any] | None] = request.args[2]
        found = visual(self._document(request)) or []
        if not all(isinstance(picture, Image.Image) for picture in found):
            raise OpenVisionError("the task shows something else than pictures")
        return found

    def _likelihood(self, request: Instance) -> tuple[float, bool]:
        if len(request.args) != 6:
            raise OpenVisionError("openvision3 does not score a continuation without its question (acc_mutual_info)")
        context, target, *_ = request.args
        pictures = self._pictures(request)
        continuation = target if isinstance(target, str) else str(target(self._document(request)))
        processor = self.vlm.processor
        prompt = processor.apply_chat_template(
            [question(context, len(pictures))], tokenize=False, add_generation_prompt=True
        )
        inputs = processor(images=pictures or None, text=[prompt], add_special_tokens=False, return_tensors="pt")
        # the template ends where an answer begins: the space that lmms-eval puts before one is not its part
        said = self.vlm.tokenizer(continuation.lstrip(), add_special_tokens=False, return_tensors="pt")["input_ids"]
        if not said.numel():
            raise OpenVisionError(f"the continuation {continuation!r} has no token")
        given: dict[str, Any] = {"input_ids": torch.cat([inputs["input_ids"], said], 1)}
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        if pictures:
            given["pixel_values"] = inputs["pixel_values"].to(self.vlm.model.dtype)
            given |= {"image_sizes": inputs["image_sizes"]} if "image_sizes" in inputs else {}
        device = self.vlm.model.device
        with torch.inference_mode():
            logits = self.vlm.model(**{name: tensor.to(device) for name, tensor in given.items()}).logits
        logits, said = logits[0, -said.shape[1] - 1 : -1].float(), said[0].to(device)
        loss = torch.nn.functional.cross_entropy(logits, said, reduction="sum")
        return loss.item(), bool((logits.argmax(-1) == said).all())


def _count(name: str, value: int | str) -> int:
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise OpenVisionError(f"{name} is {value!r}: expected a whole number of at least 1")
    return number
