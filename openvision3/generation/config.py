"""Size and condition of a generator of unified tokens, to and from JSON by `openvision3.config`."""

from dataclasses import dataclass
from typing import Any, Literal

from openvision3.config import AttentionPath, OpenVisionError

ConditionKind = Literal["class", "text"]


@dataclass(frozen=True)
class StackConfig:
    """Size of one stack of modulated blocks."""

    width: int
    depth: int
    num_heads: int

    @property
    def hidden(self) -> int:
        """Width of the SwiGLU's gate and value: two thirds of 4 * width, as RAE's code rounds it."""
        return int(2 / 3 * (4 * self.width))


HEAD = StackConfig(2048, 2, 16)
"""The wide shallow head of every named size but the demo's."""

SIZES: dict[str, tuple[StackConfig, StackConfig]] = {
    "demo": (StackConfig(256, 8, 4), StackConfig(384, 2, 6)),
    "S": (StackConfig(384, 12, 6), HEAD),
    "B": (StackConfig(768, 12, 12), HEAD),
    "L": (StackConfig(1024, 24, 16), HEAD),
    "XL": (StackConfig(1152, 28, 16), HEAD),
}
"""Backbone and head by name (RAE, section 5)."""


@dataclass(frozen=True)
class GeneratorConfig:
    """A DiT-DH: a deep narrow backbone that conditions a wide shallow head, token by token.

    Raises `OpenVisionError` where such a network cannot be built, or where its head is narrower than the tokens: it can
    then not carry noise of full rank (RAE, section 4.1).
    """

    name: str = "unnamed"
    token_width: int = 768  # D, of the unified tokens
    grid: tuple[int, int] = (16, 16)  # rows and columns of tokens where nothing else is said
    backbone: StackConfig = SIZES["B"][0]
    head: StackConfig = HEAD
    condition: ConditionKind = "class"
    num_classes: int = 1000  # "class": the number of the null class too
    text_width: int = 0  # "text": of the text tokens' features; 0: the pooled embedding alone
    text_embed_dim: int = 0  # "text": of the pooled text embedding
    text_length: int = 0  # "text": text tokens at full length
    qk_norm: bool = True  # RMSNorm of queries and keys; without it bf16 training diverges for some
    dropout: float = 0.1  # probability of the null condition in training
    attention: AttentionPath = "auto"  # "auto": matmul-softmax on CPU, sdpa elsewhere; same mathematics
    allow_narrow_head: bool = False  # for RAE's ablation: a head narrower than the tokens fits not even one picture

    def __post_init__(self) -> None:
        check_generator(self)

    @property
    def num_tokens(self) -> int:
        """Tokens of the configured grid."""
        return self.grid[0] * self.grid[1]


def named(name: str, token_width: int = 768, grid: tuple[int, int] = (16, 16), **fields: Any) -> GeneratorConfig:
    """The generator of size demo, S, B, L or XL; `fields` are further fields of `GeneratorConfig`.

    With tokens of 768 on 16x16 and 1,000 classes S, B, L and XL have 196.5, 294, 622 and 839 million parameters, the
    fixed position table included (RAE, section 5). Raises `OpenVisionError` for another name.
    """
    if name not in SIZES:
        raise OpenVisionError(f"no generator size {name!r}: use one of {', '.join(SIZES)}")
    backbone, head = SIZES[name]
    fields = {"backbone": backbone, "head": head} | fields
    return GeneratorConfig(name=name, token_width=token_width, grid=grid, **fields)


def check_generator(config: GeneratorConfig) -> None:
    """Raises `OpenVisionError` where a generator of this size cannot be built or trained."""
    for part, stack in (("backbone", config.backbone), ("head", config.head)):
        if min(stack.width, stack.depth, stack.num_heads) < 1 or stack.depth > 1000 or stack.width > 262144:
            raise OpenVisionError(f"{part}: width, depth and num_heads must be positive and sensible, got {stack}")
        if stack.width % stack.num_heads or stack.width // stack.num_heads % 4:
            raise OpenVisionError(
                f"{part}: width {stack.width} over num_heads {stack.num_heads} must give heads of a multiple of 4"
            )
    if config.backbone.width % 4:
        raise OpenVisionError(f"backbone: width {config.backbone.width} must be a multiple of 4")
    if min(config.token_width, *config.grid) < 1:
        raise OpenVisionError(f"token_width {config.token_width} and grid {config.grid} must be positive")
    if config.head.width < config.token_width and not config.allow_narrow_head:
        raise OpenVisionError(
            f"head: width {config.head.width} is below token_width {config.token_width}, so the network cannot carry "
            "the noise; take a head at least as wide (allow_narrow_head=True is for the ablation of this alone)"
        )
    if not 0 <= config.dropout < 1:
        raise OpenVisionError(f"dropout {config.dropout} must be in [0, 1)")
    if config.condition == "class" and config.num_classes < 1:
        raise OpenVisionError(f"num_classes {config.num_classes} must be positive for condition 'class'")
    if config.condition == "text" and config.text_embed_dim < 1:
        raise OpenVisionError("text_embed_dim must be positive for condition 'text'")
    if min(config.text_width, config.text_length) < 0 or (config.text_width > 0) != (config.text_length > 0):
        raise OpenVisionError(
            f"text_width {config.text_width} and text_length {config.text_length}: both positive, or both 0"
        )
