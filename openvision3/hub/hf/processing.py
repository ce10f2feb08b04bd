"""Text and image inputs for transformers: the tokenizer in the layout of the text tower, and the processor."""

from typing import Any

from tokenizers import Tokenizer
from transformers import BatchEncoding, PreTrainedTokenizerFast, ProcessorMixin
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils.generic import PaddingStrategy

from openvision3.data.tokenizer import CaptionTokenizer


class OpenVision3Tokenizer(PreTrainedTokenizerFast):
    """A WordPiece tokenizer whose rows are `[bos] words [eos] pad... [cls]`, always `model_max_length` ids long.

    The feature is the last position (OpenVision 1), so that a row has its full length whatever `padding`, `truncation`
    and `max_length` say; words that do not fit are cut. With `add_special_tokens=False` it gives the words' ids alone.
    """

    model_input_names = ["input_ids", "attention_mask"]

    @classmethod
    def wrap(cls, tokenizer: CaptionTokenizer, context_length: int) -> "OpenVision3Tokenizer":
        """Of openvision3's tokenizer, for rows of `context_length` ids."""
        inner = Tokenizer.from_str(tokenizer.tokenizer.to_str())
        names = {
            role: inner.id_to_token(getattr(tokenizer, f"{role}_id")) for role in ("pad", "unk", "bos", "eos", "cls")
        }
        return cls(
            tokenizer_object=inner,
            model_max_length=context_length,
            add_bos_token=True,
            add_eos_token=True,
            split_special_tokens=True,  # "[CLS]" in a text is a word, not the token
            clean_up_tokenization_spaces=False,
            **{f"{role}_token": name for role, name in names.items()},
        )

    def _encode_plus(self, text: Any, text_pair: Any = None, add_special_tokens: bool = True, **kwargs: Any) -> Any:
        if not add_special_tokens:
            return super()._encode_plus(text, text_pair, add_special_tokens=False, **kwargs)
        if text_pair is not None:
            raise ValueError("OpenVision 3's text tower takes one text a row, not pairs")
        tensor_type, keep_mask = kwargs.pop("return_tensors", None), kwargs.pop("return_attention_mask", True)
        kwargs |= {
            "padding_strategy": PaddingStrategy.MAX_LENGTH,
            "truncation_strategy": TruncationStrategy.LONGEST_FIRST,
            "max_length": self.model_max_length - 1,
            "padding_side": "right",
        }
        rows = super()._encode_plus(text, return_attention_mask=True, return_tensors=None, **kwargs)
        single = isinstance(text, str)
        found: dict[str, Any] = {}
        for name, last in (("input_ids", self.cls_token_id), ("attention_mask", 1)):
            if name == "input_ids" or keep_mask is not False:
                values = [rows[name]] if single else rows[name]
                found[name] = [[*row, last] for row in values]
        if single and tensor_type is None:
            found = {name: values[0] for name, values in found.items()}
        return BatchEncoding(found, tensor_type=tensor_type)


class OpenVision3Processor(ProcessorMixin):
    """Pictures and texts in one call: `processor(images=..., text=[...], return_tensors="pt")`."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any):
        super().__init__(image_processor, tokenizer, **kwargs)
