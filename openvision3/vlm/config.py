"""Everything that defines the training of a vision-language model."""

from dataclasses import dataclass
from typing import Literal

from openvision3.config import OpenVisionError, SceneConfig, resumable
from openvision3.vlm.conversation import Template

Kind = Literal["llava", "llava_next"]
Scenes = Literal["captions", "questions"]


@dataclass(frozen=True)
class VLMDataConfig:
    """Conversations about pictures: LLaVA's JSON with a folder or tars of pictures, or the demo's scenes."""

    source: str = "scenes"  # LLaVA's JSON file, or "scenes"
    images: str = ""  # folder that the JSON's picture paths begin in, or tars with members of those names
    scenes: SceneConfig = SceneConfig()
    ask: Scenes = "questions"  # of scenes
    template: Template = "chat"  # "plain": pictures and answer alone (LLaVA's stage 1)
    # turns see the pictures but not each other, as if each were a conversation of its own; the pictures are read once
    apart: bool = False
    max_bad_fraction: float = 0.01  # of samples that can't be used, before the run stops
    num_workers: int = resumable(1)


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank updates of linear layers of the language model's blocks (arXiv 2106.09685)."""

    rank: int = 0  # 0: none, all of the language model's weights learn
    alpha: float = 256.0
    dropout: float = 0.0
    layers: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class WordsConfig:
    """A first alignment of the new projector with the words of stage 1's captions, before stage 1 (`vlm/words.py`)."""

    samples: int = 0  # captions of stage 1's data, one picture each; 0: none, the projector begins at random
    epochs: int = 12
    batch_size: int = 64
    peak_lr: float = 2e-3
    commonest: float = 0.05  # part of the captions that a word may be in: "a" and "the" show nothing
    fewest: int = 5  # captions that a word must be in
    most_words: int = 8192  # the commonest of those


@dataclass(frozen=True)
class VLMStageConfig:
    """One stage: which parts learn, on what, how long. Rates rise linearly, then fall as a cosine to zero."""

    data: VLMDataConfig
    samples: int = 0  # 0: all of the data once
    batch_size: int = 128  # global
    peak_lr: float = 2e-5
    projector_lr: float = 0.0  # 0: as peak_lr
    warmup: float = 0.03  # of the steps
    weight_decay: float = 0.0
    language_model: bool = True  # learns too; False: the projector alone
    lora: LoRAConfig = LoRAConfig()  # with a rank, the language model learns through these updates alone


@dataclass(frozen=True)
class VLMTrainConfig:
    """LLaVA-1.5 or LLaVA-NeXT on a frozen encoder (arXiv 2310.03744; docs/VLM.md)."""

    recipe: str
    tower: str  # the frozen encoder: model of openvision3 (folder, hub id, "demo"), or CLIP or SigLIP of transformers
    language_model: str  # folder or hub id of an instruction-tuned model, or "smollm2-135m-instruct"
    stage1: VLMStageConfig
    stage2: VLMStageConfig
    words: WordsConfig = WordsConfig()
    kind: Kind = "llava"
    resolution: int = 0  # pixels of a picture, or of a tile; 0: the tower's own
    tiles: tuple[tuple[int, int], ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # "llava_next": rows, columns
    # scale a new projector so that pictures' tokens are as large as the text's (`calibrate_projector`)
    calibrate: bool = True
    max_length: int = 2048  # tokens, the picture's among them
    seed: int = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # "auto": the faster, timed at the start, then kept
    micro_batch: int = resumable(0)  # samples of a process's forward pass; 0: all of its share
    checkpoint_blocks: bool = resumable(False)  # recompute the language model's blocks in the backward pass
    parallel: Literal["ddp", "fsdp"] = resumable("ddp")
    out: str = resumable("")  # run folder; empty: runs/RECIPE
    log_every: int = resumable(10)  # steps
    checkpoint_every: int = resumable(0)  # samples; 0: at the end of a stage only


def validate(config: VLMTrainConfig) -> None:
    """Raises `OpenVisionError` that names the field, its value and its range."""
    for name in ("stage1", "stage2"):
        stage: VLMStageConfig = getattr(config, name)
        for field, lowest in {"samples": 0, "batch_size": 1, "peak_lr": 0, "projector_lr": 0}.items():
            if (value := getattr(stage, field)) < lowest:
                raise OpenVisionError(f"{name}.{field} is {value}: expected at least {lowest}")
        if not 0 <= stage.warmup < 1:
            raise OpenVisionError(f"{name}.warmup is {stage.warmup:g}: expected a part of the steps, 0 to 1")
        if stage.lora.rank < 0:
            raise OpenVisionError(f"{name}.lora.rank is {stage.lora.rank}: expected at least 0")
        if stage.lora.rank and not stage.language_model:
            raise OpenVisionError(f"{name}.lora has a rank, but {name} leaves the language model as it is")
        if stage.data.apart and stage.data.template == "plain":
            raise OpenVisionError(f"{name}.data.apart is of conversations: {name}.data.template is plain")
        if stage.data.source == "scenes" and not stage.samples:
            raise OpenVisionError(f"{name}.samples is 0: scenes have no end, say how many")
    for field, lowest in {"samples": 0, "epochs": 1, "batch_size": 1, "fewest": 1, "most_words": 1}.items():
        if (value := getattr(config.words, field)) < lowest:
            raise OpenVisionError(f"words.{field} is {value}: expected at least {lowest}")
    if not 0 < config.words.commonest <= 1:
        raise OpenVisionError(f"words.commonest is {config.words.commonest:g}: expected a part of the captions, 0 to 1")
    if config.words.peak_lr <= 0:
        raise OpenVisionError(f"words.peak_lr is {config.words.peak_lr:g}: expected more than 0")
    if config.stage1.lora.rank and config.stage1.lora != config.stage2.lora:
        raise OpenVisionError("stage1.lora goes on in stage 2: stage2.lora must be the same")
    for name, lowest in {"max_length": 8, "micro_batch": 0, "log_every": 1, "checkpoint_every": 0}.items():
        if (value := getattr(config, name)) < lowest:
            raise OpenVisionError(f"{name} is {value}: expected at least {lowest}")
    if config.kind == "llava_next" and not config.tiles:
        raise OpenVisionError("tiles is empty: LLaVA-NeXT needs (rows, columns) of at least one grid")
