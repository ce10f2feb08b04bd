"""openvision3's models as transformers' classes, and folders that transformers loads."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from openvision3.config import ModelConfig, OpenVisionError, TransformerConfig, VAEConfig, to_dict
from openvision3.hub.hf.config import OpenVision3Config, OpenVision3TextConfig
from openvision3.hub.hf.model import OpenVision3Model
from openvision3.hub.hf.processing import OpenVision3Processor, OpenVision3Tokenizer
from openvision3.hub.hf.standalone.configuration_openvision3 import OpenVision3VAEConfig, OpenVision3VisionConfig
from openvision3.hub.hf.standalone.image_processing_openvision3 import OpenVision3ImageProcessor
from openvision3.hub.hf.standalone.modeling_openvision3 import OpenVision3VisionModel
from openvision3.hub.verify import native_grid, own_encoder, random_ids, random_inputs
from openvision3.model.openvision3 import OpenVision3
from openvision3.vae import TinyVAE
from openvision3.vae_distilled import DistilledVAE

_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu_squared": "relu2"}


def to_transformers(model: OpenVision3, vision_only: bool = False) -> OpenVision3VisionModel | OpenVision3Model:
    """A model of openvision3 with all its parts as `OpenVision3Model`, or its encoder as `OpenVision3VisionModel`.

    The latter for `vision_only`, and where the model has an encoder alone. Weights are copied; the VAE's are included
    where the model has one (its decoding half only if something decodes), and without one the result takes latents.
    Raises `OpenVisionError` for a model whose encoder is another library's.
    """
    own_encoder(model)
    config = model.config
    whole = not vision_only and any((config.decoder, config.text_encoder, config.text_decoder))
    vision = _vision_config(model, include_vae_decoder=whole and config.decoder is not None)
    device = model.device
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    kind = OpenVision3Model if whole else OpenVision3VisionModel
    full = _full_config(model, vision) if whole else vision
    with torch.device("meta"):
        result: Any = kind._from_config(full)
    wanted = {_renamed(name, whole): tensor for name, tensor in state.items()}
    result.load_state_dict({name: wanted[name] for name in result.state_dict()}, assign=True)
    return result.to(device).eval()


def processor_for(model: OpenVision3) -> OpenVision3Processor | OpenVision3ImageProcessor:
    """The processor of a model with a tokenizer and a text tower or decoder, else the image processor alone."""
    size = model.config.image_size
    images = OpenVision3ImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    part = model.config.text_encoder or model.config.text_decoder
    if model.tokenizer is None or part is None:
        return images
    return OpenVision3Processor(images, OpenVision3Tokenizer.wrap(model.tokenizer, part.context_length))


def save_transformers(
    model: OpenVision3,
    folder: str | Path,
    *,
    vision_only: bool = False,
    include_vae: bool = False,
) -> None:
    """Writes a folder, not there yet or empty, that transformers loads: weights, configs and processor.

    It appears whole or not at all. `ov3 convert --to transformers` does the same, compares both, and can overwrite.

    A vision encoder's folder holds its code too, for `trust_remote_code=True` where openvision3 is not installed. The
    embedded tiny VAE is always inside; any other, whose weights have a licence of their own, only with `include_vae`.
    Raises `OpenVisionError` without it (a model loaded with `vae=None` takes latents and needs none), and for a folder
    that holds something.
    """
    folder = Path(folder)
    if model.vae is not None and not isinstance(model.vae, TinyVAE) and not include_vae:
        licence = model.vae.config.licence or "unknown"
        raise OpenVisionError(
            f"the folder would hold the weights of {model.vae.config.source} (licence: {licence}): pass include_vae, "
            "or load the model with vae=None for an encoder of latents"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OpenVisionError(f"{folder} exists already; choose another folder")
    result = to_transformers(model, vision_only)
    processor: Any = processor_for(model)
    if isinstance(result, OpenVision3VisionModel) and isinstance(processor, OpenVision3Processor):
        processor = processor.image_processor
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        whole = Path(temporary) / "model"
        result.save_pretrained(whole)
        processor.save_pretrained(whole)
        (whole / "README.md").write_text(_card(model, result), encoding="utf-8")
        for path in whole.iterdir():
            shutil.copymode(whole / "README.md", path)  # safetensors' files may be read by their owner alone
        whole.replace(folder)


@torch.no_grad()
def transformers_outputs(folder: str | Path, config: ModelConfig) -> dict[str, Tensor]:
    """What the parts in a folder of `save_transformers` give, loaded by transformers' Auto class, under the names of
    `hub.verify.all_outputs` and for the same inputs; `config` is that of openvision3's model.
    """
    result: Any = AutoModel.from_pretrained(folder)
    vision = result.vision_model if isinstance(result, OpenVision3Model) else result
    grid = native_grid(config)
    output = vision(**{"pixel_values" if config.input == "pixels" else "latents": random_inputs(config, grid, batch=2)})
    tokens = output.last_hidden_state
    found = {"tokens": tokens, "pooled": output.pooler_output}
    if isinstance(result, OpenVision3Model):
        if result.decoder is not None:
            found |= {"decoder": result.decoder(tokens, grid), "token rms": result.token_rms}
        if result.text_model is not None:
            found["text encoder"] = result.get_text_features(random_ids(config.text_encoder)).pooler_output
            found["temperature"] = result.temperature()
        if result.text_decoder is not None:
            found["text decoder"] = result.text_decoder(tokens, random_ids(config.text_decoder))
    if vision.vae is not None:
        found["VAE latents"] = vision.vae.encode(random_inputs(config, grid, batch=1, images=True))
        if vision.config.vae.include_decoder:
            found["VAE pictures"] = vision.vae.decode(found["VAE latents"])
    return found


def _vision_config(model: OpenVision3, include_vae_decoder: bool) -> OpenVision3VisionConfig:
    config = model.config
    return OpenVision3VisionConfig(
        vae_config=_vae_config(model, include_vae_decoder) if config.input == "latents" else None,
        image_size=config.image_size,
        patch_size=config.downsampling,
        projection_dim=config.embed_dim,
        positions=config.positions,
        stored_positions=config.stored_positions,
        **_stack(config.encoder),
    )


def _vae_config(model: OpenVision3, include_decoder: bool) -> OpenVision3VAEConfig:
    vae = model.vae
    convention: VAEConfig = model.config.vae if vae is None else vae.config
    if isinstance(vae, DistilledVAE):
        raise OpenVisionError("transformers' form of a model has no fast front: load the model with its own VAE")
    if vae is None:
        kind, architecture = "none", None
    elif isinstance(vae, TinyVAE):
        kind, architecture = "tiny", to_dict(vae.architecture)
        architecture = {name: list(sizes) for name, sizes in architecture.items() if isinstance(sizes, tuple)}
    else:
        kind, architecture = "diffusers", _plain(dict(vae.autoencoder.config))  # type: ignore[attr-defined]
        architecture["_class_name"] = type(vae.autoencoder).__name__  # type: ignore[attr-defined]
    return OpenVision3VAEConfig(
        kind=kind,
        architecture=architecture,
        channels=convention.channels,
        factor=convention.factor,
        latent_scale=convention.latent_scale,
        latent_shift=convention.latent_shift,
        include_decoder=include_decoder and vae is not None,
        source=convention.source,
        sha256=convention.sha256,
        license=convention.licence,
    )


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """A diffusers config as JSON gives it back, without what it notes about itself."""
    kept = {name: value for name, value in config.items() if not name.startswith("_")}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}


def _full_config(model: OpenVision3, vision: OpenVision3VisionConfig) -> OpenVision3Config:
    config, text = model.config, model.config.text_encoder
    return OpenVision3Config(
        vision_config=vision,
        text_config=None
        if text is None
        else OpenVision3TextConfig(
            vocab_size=text.vocab_size,
            max_position_embeddings=text.context_length,
            pad_token_id=text.pad_id,
            projection_dim=config.embed_dim,
            **_stack(text.transformer),
        ),
        latent_decoder=None if config.decoder is None else to_dict(config.decoder),
        decoder_norm=config.decoder_norm,
        caption_decoder=None if config.text_decoder is None else to_dict(config.text_decoder),
        bos_token_id=None if model.tokenizer is None else model.tokenizer.bos_id,
        eos_token_id=None if model.tokenizer is None else model.tokenizer.eos_id,
    )


def _stack(size: TransformerConfig) -> dict[str, Any]:
    return {
        "hidden_size": size.width,
        "intermediate_size": size.mlp_width or 4 * size.width,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.num_heads,
        "hidden_act": _ACTIVATIONS[size.activation],
        "layer_norm_eps": size.norm_eps,
    }


def _renamed(name: str, whole: bool) -> str:
    """The name of one of openvision3's tensors in transformers' classes."""
    part, _, rest = name.partition(".")
    if part in ("encoder", "text_encoder"):
        rest = rest.replace("transformer.blocks.", "layers.")
    if part in ("encoder", "vae"):
        rest = name if part == "vae" else rest
        return f"vision_model.{rest}" if whole else rest
    if part == "text_encoder":
        embeddings = {"embedding.tokens": "token_embedding.weight", "embedding.positions": "position_embedding.weight"}
        return f"text_model.{embeddings.get(rest, rest)}"
    return name


def _card(model: OpenVision3, result: PreTrainedModel) -> str:
    vae = model.vae
    licence = "" if vae is None else f" The frozen autoencoder inside ({vae.config.source}): {vae.config.licence}."
    how = (
        "`AutoModel.from_pretrained(FOLDER, trust_remote_code=True)` gives the vision encoder"
        if isinstance(result, OpenVision3VisionModel)
        else "`import openvision3.hub.hf`, then `AutoModel.from_pretrained(FOLDER)` gives the whole model"
    )
    return f"# {model.config.name}\n\nAn OpenVision 3 model for transformers: {how}.{licence}\n"
