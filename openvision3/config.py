"""Configuration as frozen dataclasses, to and from JSON.

A recipe is a function that returns one of these (see `recipes.py`); the command line overrides single fields. A field
marked `resumable` may change between a run's stop and its resumption; any other change is refused.
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar


class OpenVisionError(Exception):
    """An error that a user can act on: its message says what is wrong and what to do.

    `alike`: every process of a run raises it, so that one of them is enough to print it.
    """

    alike = False


def resumable(default: Any) -> Any:
    """A dataclass field whose change does not change what a resumed run computes."""
    return field(default=default, metadata={"resumable": True})


Activation = Literal["gelu", "gelu_tanh", "relu_squared"]
AttentionPath = Literal["auto", "sdpa", "matmul"]
ParallelKind = Literal["ddp", "fsdp"]
# "head": the norm and projection of the pooled embedding; "text_encoder" has the contrastive temperature with it
ModelPart = Literal["encoder", "head", "decoder", "text_encoder", "text_decoder"]
MODEL_PARTS: tuple[ModelPart, ...] = typing.get_args(ModelPart)


@dataclass(frozen=True)
class VAEConfig:
    """A frozen autoencoder and its latent convention: `scaled = (z - latent_shift) * latent_scale`."""

    # the embedded one, any autoencoder of diffusers, or another one behind a fast encoder (see `DistilledVAEConfig`)
    kind: Literal["tiny", "diffusers", "distilled"] = "tiny"
    source: str = "embedded"  # "embedded", a folder, or a hub id
    channels: int = 16  # latent channels
    factor: int = 8  # pixels per latent, each side
    latent_scale: float = 1.0  # FLUX.1: 0.3611
    latent_shift: float = 0.0  # FLUX.1 as diffusers uses it: 0.1159; OpenVision 3's released weights: 0
    sha256: str = ""  # of the weights file; empty: not checked
    licence: str = ""  # of the weights


@dataclass(frozen=True)
class TransformerConfig:
    """Size of one stack of pre-norm transformer blocks."""

    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_width: int = 0  # 0: 4 * width
    activation: Activation = "gelu"
    norm_eps: float = 1e-6
    residual_init: float = 1.0  # factor on the initial weights that write to the residual stream (see docs/METHOD.md)


@dataclass(frozen=True)
class TextEncoderConfig:
    """Bidirectional text tower of the contrastive loss (METHOD: OpenVision 1)."""

    transformer: TransformerConfig = TransformerConfig(512, 12, 8, activation="gelu_tanh")
    vocab_size: int = 30522
    context_length: int = 80  # tokens, with [bos], [eos], padding and the final [cls]
    pad_id: int = 0  # must be the tokenizer's; masked out of the attention


@dataclass(frozen=True)
class TextDecoderConfig:
    """Autoregressive caption tower that reads the unified tokens."""

    transformer: TransformerConfig = TransformerConfig(512, 12, 8, activation="gelu_tanh")
    vocab_size: int = 30522
    context_length: int = 128  # tokens, with [bos] and [eos]
    pad_id: int = 0  # must be the tokenizer's; no loss there
    image_input: Literal["prefix", "cross"] = "cross"  # image tokens as a prefix, or cross-attended in each block
    image_positions: float = 0.0  # factor of the sine-cosine positions added to the image tokens that it reads


@dataclass(frozen=True)
class ExternalEncoderConfig:
    """A frozen encoder of another library (CLIP, SigLIP) whose tokens a model reads: named, never packed."""

    source: str  # folder, or hub id
    sha256: str = ""  # of its weights; empty: not checked


@dataclass(frozen=True)
class ModelConfig:
    """The unified encoder and its decoders. `None` marks a part that the model lacks."""

    name: str = "unnamed"
    input: Literal["latents", "pixels"] = "latents"  # "pixels": the paper's variant without VAE (patch 16 on RGB)
    in_channels: int = 16
    patch_size: int = 2  # in latents ("latents") or pixels ("pixels")
    image_size: int = 256  # pixels; size at which stored positions and defaults apply
    embed_dim: int = 768  # of the pooled image and text embeddings
    encoder: TransformerConfig = TransformerConfig()
    positions: Literal["computed", "scaled"] = "computed"  # at other sizes: row and column, or spread as at image_size
    stored_positions: bool = False  # the weights hold a position table that the sine-cosine formula does not give
    decoder: TransformerConfig | None = TransformerConfig()
    text_encoder: TextEncoderConfig | None = TextEncoderConfig()
    text_decoder: TextDecoderConfig | None = TextDecoderConfig()
    decoder_norm: bool = True  # LayerNorm before the decoder's linear layer; without it a token's scale comes through
    logit_bias: bool = False  # learned bias of the sigmoid contrastive loss; a run has it where `LossConfig` says so
    noise_tau: float = 0.3  # Eq. 3: sigma ~ U[0, tau] per image
    noise_relative: bool = True  # sigma in units of the tokens' root mean square, so that growing does not escape it
    attention: AttentionPath = "auto"  # "auto": matmul-softmax on CPU, sdpa elsewhere; same mathematics
    vae: VAEConfig = VAEConfig()
    external: ExternalEncoderConfig | None = None  # encodes in place of `encoder`, which then states its size alone

    @property
    def position_extent(self) -> tuple[int, int] | None:
        """Grid whose extent the positions of any grid cover; None: they are rows and columns."""
        side = self.image_size // self.downsampling
        return (side, side) if self.positions == "scaled" else None

    @property
    def downsampling(self) -> int:
        """Pixels per token, each side (16 for every released model)."""
        return self.patch_size * (self.vae.factor if self.input == "latents" else 1)


@dataclass(frozen=True)
class SceneConfig:
    """Distribution of the captioned demo scenes. The defaults are the frozen benchmark `scenes-v1`."""

    num_names: int = 494  # how many of the named things occur (a fixed, evenly spread subset)
    size_min: float = 0.25  # longest side of a thing, as a fraction of the picture's side
    size_max: float = 0.55
    count_weights: tuple[float, float, float, float] = (0.40, 0.35, 0.20, 0.05)  # P(1, 2, 3, 4 things)
    repeat_probability: float = 0.20  # of pictures of several things: the same thing repeated
    gradient_probability: float = 0.12  # background is a colour gradient instead of a landscape
    max_rotation: float = 15.0  # degrees
    min_visible: float = 0.70  # of each thing's area


# of a sample: its alt text, a random sentence of its caption, or the whole caption
TextRule = Literal["alt", "sentence", "caption"]


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from, and which of their fields are the two texts."""

    source: str = "demo"  # "demo" renders scenes on the fly; else tars: a path, URL, brace list, glob or folder
    mixture: tuple[str, ...] = ()  # several sources, in place of `source`
    weights: tuple[float, ...] = ()  # of the mixture's sources: their shares of the samples, in proportion
    scenes: SceneConfig = SceneConfig()  # for source "demo"
    seed: int = 0  # of the order (and of the scenes, for source "demo")
    shuffle: bool = True  # tars: another order in each turn, a function of the seed; False: the tars' own
    shuffle_window: int = 64  # shards whose samples are mixed with one another
    shuffle_block: int = 1  # neighbouring samples that stay together, so that a store is asked for long stretches
    filter: str = ""  # keep samples whose json fields meet it: 'width >= 256 and lang == "en"' (data/filters.py)
    image_key: str = ""  # member that holds the picture; empty: the first of jpg, jpeg, png, webp
    alt_key: str = "txt"  # member that holds the alt text, or json.FIELD; empty: the caption serves as both
    caption_field: str = "caption"  # json field of the caption, or .MEMBER; empty: the alt text serves as both
    contrastive_text: TextRule = "alt"  # for the first contrastive loss
    second_text: TextRule = "sentence"  # for the second one
    caption_text: TextRule = "caption"  # for the caption decoder
    crop_min_area: float = 1.0  # training crop: area fraction, 1 = whole picture (paper: 0.4)
    fast_decode: bool = False  # decode JPEGs at 1/2, 1/4 or 1/8 where crops are far larger than the resolution
    latents: str = ""  # folder of `ov3 data cache-latents`, of these samples; empty: crops are encoded on the fly
    num_workers: int = resumable(1)  # processes that prepare batches; does not change what they hold
    max_bad_fraction: float = resumable(0.01)  # more unusable samples than this stop the run
    store_attempts: int = resumable(8)  # to read something from a store, before the run stops
    store_timeout: float = resumable(60.0)  # seconds that an attempt may take

    @property
    def sources(self) -> tuple[str, ...]:
        """The mixture's sources, or the only one."""
        return self.mixture or (self.source,)


# losses that see the tokens without a gradient: those of Eq. 4, those of Eq. 5, or both
Detached = Literal["none", "reconstruction", "understanding", "both"]


@dataclass(frozen=True)
class LossConfig:
    """Weights of Eqs. 4-6. lambda (LPIPS) is per stage: see `StageConfig`."""

    beta: float = 0.4  # latent L1, Eq. 4
    alpha: float = 1.0  # contrastive, Eq. 5
    contrastive: Literal["softmax", "sigmoid"] = "softmax"  # InfoNCE (the paper's), or SigLIP's loss over pairs
    omega_rec: float = 0.5  # Eq. 6
    omega_und: float = 1.0  # Eq. 6
    pixel_stride: int = 1  # decode pixels for every n-th sample of the global batch (unbiased; 1 = all)
    lpips_net: Literal["alex", "vgg"] = "alex"
    detach: Detached = "none"  # losses that train their own parts alone, as probes: no gradient by the tokens


@dataclass(frozen=True)
class StageConfig:
    """One stage of training: a resolution, a length and a schedule, counted in samples seen."""

    resolution: int = 128  # pixels, multiple of 16
    samples: int = 0  # 0: the stage is left out
    warmup_samples: int = 0
    batch_size: int = 8192  # global
    base_lr: float = 8e-6  # peak learning rate = base_lr * batch_size / 256
    lpips_weight: float = 0.0  # lambda, Eq. 4
    scenes: SceneConfig | None = None  # for source "demo": this stage's own distribution; None: `DataConfig.scenes`
    latents: str | None = None  # this stage's own cache, as it has its own resolution; None: `DataConfig.latents`

    @property
    def peak_lr(self) -> float:
        return self.base_lr * self.batch_size / 256


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with decoupled decay, scaled by the learning rate, on weight matrices only; warm-up, then cosine to 0."""

    kind: Literal["adamw", "muon"] = "adamw"  # "muon": Muon on the matrices of the blocks, AdamW on the rest
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.2
    clip_norm: float = 1.0  # global gradient norm; 0 = no clipping


@dataclass(frozen=True)
class TrainConfig:
    """Everything that defines a training run of the unified encoder."""

    recipe: str
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    stage1: StageConfig = StageConfig()
    stage2: StageConfig = StageConfig()
    seed: int = 0  # of initialisation and noise
    init: str = ""  # model folder, run or checkpoint to start from; empty: random weights
    attach: tuple[ModelPart, ...] = ()  # parts of `model` that are new: random, while `init` gives all else
    freeze: tuple[ModelPart, ...] = ()  # parts that stay as they are in `init`; those in `attach` are trained anyway
    vocabulary: Literal["demo", "bert"] = "demo"  # of attached text towers; "bert": 30,522 entries and longer texts
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"  # "auto": the faster, timed at the start, then kept
    micro_batch: int = resumable(0)  # samples per forward pass; 0: all of a process. The losses are the whole batch's
    vae_batch: int = resumable(0)  # pictures that go through the frozen VAE and LPIPS at once; 0: as suits the device
    pack_text: bool = resumable(True)  # leave padding out of the text towers, where tokens work by themselves
    checkpoint_blocks: bool = resumable(False)  # recompute blocks in the backward pass: less memory, more time
    compile: bool = resumable(False)  # each transformer block, and the VAE's norms: slow first steps, faster ones later
    parallel: ParallelKind = resumable("ddp")  # where there are several processes: parameters in each, or sharded
    ema: float = 0.0  # decay per step of averaged weights, which are then evaluated and kept; 0: none
    max_skipped: int = resumable(10)  # steps in a row with losses or gradients that are not finite, before a run stops
    out: str = resumable("")  # run folder; empty: runs/RECIPE
    log_every: int = resumable(10)  # steps
    eval_every: int = resumable(0)  # samples; 0: at the end of each stage only
    eval_samples: int = resumable(256)  # 0: sample pictures only
    eval_source: str = resumable("")  # folder or tars to evaluate on; empty: held-out scenes for "demo", else none
    meter_samples: int = resumable(32)  # held-out ones of the synergy meter, at each evaluation; 0: not measured
    checkpoint_every: int = resumable(0)  # samples; 0: at the end of each stage only
    keep_checkpoints: int = resumable(2)  # the newest ones
    keep_every: int = resumable(0)  # samples: the first checkpoint after each multiple stays for good; 0: none does
    background_saves: bool = resumable(False)  # write checkpoints beside the training, from a copy in memory

    @property
    def stages(self) -> tuple[StageConfig, ...]:
        return tuple(stage for stage in (self.stage1, self.stage2) if stage.samples > 0)

    @property
    def frozen(self) -> tuple[ModelPart, ...]:
        """The parts that the run leaves as they are."""
        return tuple(part for part in MODEL_PARTS if part in self.freeze and part not in self.attach)


@dataclass(frozen=True)
class TinyVAEConfig:
    """Size of the embedded autoencoder: channels and residual blocks at 1/2, 1/4 and 1/8 of the picture's side."""

    encoder_widths: tuple[int, int, int] = (32, 64, 128)
    encoder_depths: tuple[int, int, int] = (1, 2, 2)
    decoder_widths: tuple[int, int, int] = (32, 96, 160)
    decoder_depths: tuple[int, int, int] = (2, 2, 3)
    channels: int = 16
    format_version: int = 1


@dataclass(frozen=True)
class VAETrainConfig:
    """Training of the embedded tiny VAE: L1 + MSE + LPIPS + KL on crops of landscapes, scenes and cut-outs."""

    recipe: str
    vae: TinyVAEConfig = TinyVAEConfig()
    resolution: int = 128  # pixels
    samples: int = 60_000
    warmup_samples: int = 2_000
    batch_size: int = 8
    peak_lr: float = 1e-3
    optimizer: OptimizerConfig = OptimizerConfig(beta2=0.99, weight_decay=0.0)
    l1_weight: float = 1.0
    mse_weight: float = 20.0
    lpips_weight: float = 0.1
    lpips_stride: int = 4  # LPIPS on every n-th picture of a batch
    kl_weight: float = 1e-5  # per latent element
    ema: float = 0.999  # per step
    seed: int = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    num_workers: int = resumable(1)
    out: str = resumable("")
    log_every: int = resumable(50)  # steps
    eval_every: int = resumable(5_000)  # samples
    checkpoint_every: int = resumable(5_000)  # samples
    keep_checkpoints: int = resumable(2)


@dataclass(frozen=True)
class FastEncoderConfig:
    """Size of a fast encoder: channels and residual blocks at twice the latents' resolution, and at theirs."""

    widths: tuple[int, int] = (32, 64)
    depths: tuple[int, int] = (1, 4)


@dataclass(frozen=True)
class DistilledVAEConfig:
    """`config.json` of a fast front: its encoder, and the frozen autoencoder whose scaled latents it gives."""

    encoder: FastEncoderConfig
    original: VAEConfig
    fingerprint: str  # of the original: see model/fingerprint.py
    kind: Literal["distilled"] = "distilled"
    format_version: int = 1


@dataclass(frozen=True)
class DistillConfig:
    """Training of a fast encoder onto a frozen VAE's latents: their L1 + cosine distance of a model's tokens."""

    recipe: str
    init: str = "demo"  # the model whose VAE is matched and whose tokens are compared: folder, or hub id
    encoder: FastEncoderConfig = FastEncoderConfig()
    # source "demo": crops of landscapes, scenes and cut-outs, as the tiny VAE learns from; else pictures of tars
    data: DataConfig = DataConfig()
    resolution: int = 0  # pixels; 0: the model's own
    samples: int = 60_000
    warmup_samples: int = 2_000
    batch_size: int = 32
    peak_lr: float = 2e-3
    optimizer: OptimizerConfig = OptimizerConfig(beta2=0.99, weight_decay=0.0)
    latent_weight: float = 1.0  # of the L1 of scaled latents
    token_weight: float = 1.0  # of 1 - cosine of the unified tokens
    ema: float = 0.999  # per step
    seed: int = 0  # of the initial weights
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    out: str = resumable("")
    log_every: int = resumable(50)  # steps
    eval_every: int = resumable(10_000)  # samples
    eval_samples: int = resumable(128)  # pictures that tokens are compared on, on the way
    eval_source: str = resumable("")  # what the result is measured on; empty: scenes-v1 for "demo", else nothing
    checkpoint_every: int = resumable(10_000)  # samples
    keep_checkpoints: int = resumable(2)


RunConfig = TrainConfig | VAETrainConfig | DistillConfig  # what a recipe returns

Config = TypeVar("Config")


def to_dict(config: Any) -> dict[str, Any]:
    """The config as nested dictionaries that `json` can write."""
    return dataclasses.asdict(config)


def from_dict(cls: type[Config], data: Any, where: str = "") -> Config:
    """Builds a config from nested dictionaries; missing fields keep their defaults.

    Raises `OpenVisionError` that names a misspelt field (with the nearest right one) or a value of the wrong type.
    """
    return _decode(cls, data, where or cls.__name__)


def _decode(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise OpenVisionError(f"{where}: expected a table of fields, got {value!r}")
        hints = typing.get_type_hints(kind)
        for name in value:
            if name not in hints:
                near = difflib.get_close_matches(str(name), hints, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(hints)}"
                raise OpenVisionError(f"{where} has no field {name!r}{hint}")
        try:
            return kind(  # pyright: ignore[reportCallIssue]
                **{name: _decode(hints[name], item, f"{where}.{name}") for name, item in value.items()}
            )
        except TypeError as error:
            raise OpenVisionError(f"{where}: {error}") from None
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (inner,) = [arg for arg in args if arg is not type(None)]
        return _decode(inner, value, where)
    if origin is Literal:
        if value not in args:
            raise OpenVisionError(f"{where}: {value!r} is not one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple and args[-1] is Ellipsis:
        if not isinstance(value, list | tuple):
            raise OpenVisionError(f"{where}: expected a list, got {value!r}")
        return tuple(_decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is tuple:
        if isinstance(value, list | tuple) and args[-1] is Ellipsis:
            args = (args[0],) * len(value)
        if not isinstance(value, list | tuple) or len(value) != len(args):
            raise OpenVisionError(f"{where}: expected {len(args)} values, got {value!r}")
        return tuple(_decode(arg, item, f"{where}[{i}]") for i, (arg, item) in enumerate(zip(args, value, strict=True)))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise OpenVisionError(f"{where}: expected {kind.__name__}, got {value!r}")
    return value


def save_json(config: Any, path: Path) -> None:
    """Writes the config as indented JSON (whole or not at all)."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(to_dict(config), indent=2) + "\n")
    temporary.replace(path)


def load_json(cls: type[Config], path: Path) -> Config:
    """Reads a config written by `save_json`; raises `OpenVisionError` on anything else."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise OpenVisionError(f"{path} does not exist") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise OpenVisionError(f"{path} is not valid JSON: {error}") from None
    return from_dict(cls, data, str(path))


def differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, bool]]:
    """Yields (dotted field, old value, new value, resumable) for every leaf that differs between two configs."""
    for item in dataclasses.fields(new):
        name, a, b = f"{prefix}{item.name}", getattr(old, item.name), getattr(new, item.name)
        if dataclasses.is_dataclass(a) and dataclasses.is_dataclass(b):
            yield from differences(a, b, f"{name}.")
        elif a != b:
            yield name, a, b, bool(item.metadata.get("resumable", False))
