"""New parts on a frozen encoder: what `--init` settles of a recipe, and the model that its weights come from."""

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from openvision3.config import (
    ExternalEncoderConfig,
    ModelConfig,
    OpenVisionError,
    TextDecoderConfig,
    TextEncoderConfig,
    TrainConfig,
    TransformerConfig,
    load_json,
)
from openvision3.data.tokenizer import demo_tokenizer
from openvision3.hub.encoders import encoder_kind, load_token_encoder, weights_sha256
from openvision3.hub.load import load, model_folder
from openvision3.hub.released import is_released_folder
from openvision3.model.folder import read_description
from openvision3.model.openvision3 import OpenVision3
from openvision3.training.checkpoint import STATE, checkpoints, load_checkpoint

SETTLES = ("init", "attach", "vocabulary")  # fields of a recipe that decide what `attached` gives
BERT_VOCABULARY = 30522

TextConfig = TypeVar("TextConfig", TextEncoderConfig, TextDecoderConfig)


def attached(config: TrainConfig) -> TrainConfig:
    """The recipe for the model at `config.init`, with the parts in `config.attach` new and all else that model's.

    The recipe's `model` gives the sizes of the new parts, at most: an encoder narrower than a part has it made in its
    own size. `init` is a model folder, a folder in the released format, or one of CLIP or SigLIP, or their hub ids.
    Raises `OpenVisionError` where it is none of these.
    """
    if not config.init:
        raise OpenVisionError(
            f"recipe {config.recipe} starts from an encoder: give its folder or hub id as --init MODEL"
        )
    folder, freeze = model_folder(config.init), config.freeze
    if is_run(folder):
        raise OpenVisionError(
            f"init: {config.init} is a run; recipe {config.recipe} starts from the model of one that is done: "
            f"{folder / 'model'}"
        )
    if encoder_kind(folder) != "openvision3":
        model = _external_model(config.init, folder, config.model)
    elif is_released_folder(folder):
        model = load(folder, vae=None, device="cpu").config  # the weights say how its positions are made
    else:
        model = read_description(folder)[0]
    if model.external is not None and model.text_encoder is None:
        freeze = tuple(part for part in freeze if part != "head")  # no one has trained it yet
    model = _with_parts(model, config)
    stage1, stage2 = (replace(stage, resolution=model.image_size) for stage in (config.stage1, config.stage2))
    return replace(config, model=model, freeze=freeze, stage1=stage1, stage2=stage2)


def load_initial(config: TrainConfig) -> OpenVision3 | None:
    """The model whose weights `config.init` gives to all parts that are not attached; None for CLIP or SigLIP.

    Where no parts are attached, `init` may be a run's folder, or one of its checkpoints: see `load_run`. The model has
    its VAE where parts are attached, its folder holds the VAE and the run has no other. Raises `OpenVisionError` for
    CLIP or SigLIP where the recipe's model has an encoder of its own.
    """
    folder = model_folder(config.init)
    if is_run(folder):
        return load_run(folder)
    if encoder_kind(folder) != "openvision3":
        if config.model.external is None:
            raise OpenVisionError(
                f"init: {config.init} is another library's encoder, and recipe {config.recipe} trains its own; "
                "`ov3 train attach_decoder --init MODEL` or attach_text gives new parts to such a one"
            )
        return None
    packed = False
    if not is_released_folder(folder):
        described, architecture = read_description(folder)
        packed = bool(config.attach) and architecture is not None and described.vae == config.model.vae
    return load(folder, vae="auto" if packed else None, device="cpu")


def is_run(folder: Path) -> bool:
    """Whether a folder is a training run, or a checkpoint of one."""
    return (folder / STATE).is_file() or (folder / "checkpoints").is_dir()


def load_run(folder: Path) -> OpenVision3:
    """The model of a run's checkpoint, without VAE or tokenizer; of a run, that of its newest.

    Of a run with averaged weights, these. Raises `OpenVisionError` where there is no checkpoint, or one that holds only
    the parts that its run trains.
    """
    checkpoint = folder if (folder / STATE).is_file() else next(reversed(checkpoints(folder / "checkpoints")), None)
    if checkpoint is None:
        raise OpenVisionError(f"init: the run {folder} has no checkpoint yet")
    config = load_json(TrainConfig, checkpoint.resolve().parents[1] / "config.json")
    if config.frozen:
        raise OpenVisionError(
            f"init: checkpoints of {folder} hold only the parts that it trains; give the run's model/ when it is done"
        )
    model = OpenVision3(trained_model(config))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    averages = {name: torch.empty_like(weight) for name, weight in weights.items()} if config.ema else {}
    load_checkpoint(checkpoint, {"model": model, "average": averages})
    for name, average in averages.items():
        weights[name].copy_(average)
    return model


def trained_model(config: TrainConfig) -> ModelConfig:
    """The recipe's model, with the parameters that its losses need."""
    sigmoid = config.model.text_encoder is not None and config.loss.contrastive == "sigmoid"
    return replace(config.model, logit_bias=sigmoid)


def _external_model(source: str, folder: Path, recipe: ModelConfig) -> ModelConfig:
    """A model on another library's encoder: pictures of 16 pixels a token, and the recipe's VAE."""
    encoder = load_token_encoder(folder)
    assert encoder.native_size is not None
    rows, _ = encoder.grid(encoder.native_size, encoder.native_size)
    return replace(
        recipe,
        name=encoder.name,
        image_size=rows * recipe.downsampling,
        embed_dim=encoder.width,
        encoder=encoder.size,
        decoder=None,
        text_encoder=None,
        text_decoder=None,
        external=ExternalEncoderConfig(
            str(folder.resolve()) if Path(source).is_dir() else source, weights_sha256(folder)
        ),
    )


def _with_parts(model: ModelConfig, config: TrainConfig) -> ModelConfig:
    recipe, attach, changes = config.model, config.attach, {}
    if "decoder" in attach and recipe.decoder is not None:
        changes["decoder"] = _at_most(recipe.decoder, model.encoder)
        changes |= {name: getattr(recipe, name) for name in ("decoder_norm", "noise_tau", "noise_relative")}
    kept = [getattr(model, name) for name in ("text_encoder", "text_decoder") if name not in attach]
    vocabulary = next((part for part in kept if part is not None), None)
    for name, bert_length in (("text_encoder", 80), ("text_decoder", 128)):  # OpenVision 1's lengths
        part: Any = getattr(recipe, name)
        if name in attach and part is not None:
            part = replace(part, transformer=_at_most(part.transformer, model.encoder))
            changes[name] = _with_vocabulary(part, config, vocabulary, bert_length)
    return replace(model, **changes)


def _at_most(size: TransformerConfig, encoder: TransformerConfig) -> TransformerConfig:
    """A part's size, or the encoder's where that is narrower."""
    return size if size.width <= encoder.width else replace(encoder, depth=min(size.depth, encoder.depth))


def _with_vocabulary(part: TextConfig, config: TrainConfig, kept: Any, bert_length: int) -> TextConfig:
    """A text tower on the vocabulary of the model's other one, where it keeps that, else on the recipe's."""
    if kept is not None:
        if config.vocabulary == "bert" and kept.vocab_size != BERT_VOCABULARY:
            raise OpenVisionError(f"vocabulary is 'bert', but {config.init} keeps a text tower of another")
        return replace(part, vocab_size=kept.vocab_size, pad_id=kept.pad_id)
    if config.vocabulary == "bert":
        return replace(part, vocab_size=BERT_VOCABULARY, pad_id=0, context_length=bert_length)
    tokenizer = demo_tokenizer()
    return replace(part, vocab_size=tokenizer.vocab_size, pad_id=tokenizer.pad_id)
