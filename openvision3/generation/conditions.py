"""What pictures are generated from: class numbers, or texts through the model's own text tower."""

from collections.abc import Sequence

import torch
from torch import Tensor

from openvision3.config import OpenVisionError
from openvision3.generation.condition import Condition
from openvision3.generation.config import GeneratorConfig
from openvision3.model.openvision3 import OpenVision3


def class_numbers(texts: Sequence[str], config: GeneratorConfig, classes: Sequence[str]) -> Tensor:
    """Class names, or numbers where there are no names, to int64 (B,). Raises `OpenVisionError` for unknown ones."""
    known = {name: number for number, name in enumerate(classes)}
    numbers = []
    for text in texts:
        number = known.get(text.strip())
        if number is None and text.strip().isdecimal() and not classes:
            number = int(text)
        if number is None or not number < config.num_classes:
            expected = f"one of {len(classes)} names, such as {classes[0]!r}" if classes else "a number"
            raise OpenVisionError(
                f"{text.strip()[:80]!r} is no class of this generator: expected {expected} below {config.num_classes} "
                "(where tars hold them: --data.caption-field .cls)"
                if not classes
                else f"{text.strip()[:80]!r} is no class of this generator: expected {expected}"
            )
        numbers.append(number)
    return torch.tensor(numbers, dtype=torch.int64)


@torch.no_grad()
def text_condition(model: OpenVision3, ids: Tensor) -> Condition:
    """Texts as the text tower's ids (B, L) -> pooled embedding, L2-normalised, and token features, fp32."""
    tower = model.text_encoder
    if tower is None:
        raise OpenVisionError(f"model {model.config.name!r} has no text encoder: a generator on it takes classes only")
    pooled, tokens, used = tower.features(ids.to(model.device))
    pooled = torch.nn.functional.normalize(pooled.float(), dim=-1)
    return Condition(pooled=pooled, tokens=tokens.float(), mask=used)


def conditions(model: OpenVision3, config: GeneratorConfig, texts: Sequence[str], classes: Sequence[str]) -> Condition:
    """Of class names or prompts, on the model's device. Raises `OpenVisionError` for what can't be one."""
    if config.condition == "class":
        return Condition(labels=class_numbers(texts, config, classes).to(model.device))
    if model.tokenizer is None or model.text_encoder is None:
        raise OpenVisionError(f"model {model.config.name!r} has no text encoder with a tokenizer: it reads no prompts")
    ids = model.tokenizer.encode_contrastive(list(texts), model.text_encoder.config.context_length)
    return text_condition(model, ids)
