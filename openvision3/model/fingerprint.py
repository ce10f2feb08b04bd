"""A name for what a model makes of pictures: equal where tokens and image embeddings are."""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from openvision3.config import to_dict
from openvision3.model.external import ExternalEncoder
from openvision3.model.openvision3 import OpenVision3
from openvision3.vae import FrozenVAE

_DECODES = {"decoder", "post_quant_conv"}  # an autoencoder's modules that no token passes


def image_fingerprint(model: OpenVision3) -> str:
    """sha256 (hex) of all that decides a picture's tokens and embedding: encoder and VAE encoder, weights and config.

    Text towers and decoders (the VAE's is one), the model's name and the attention path leave it as it is; another
    weight dtype does not.
    """
    config = model.config
    described = {
        "input": config.input,
        "patch_size": config.patch_size,
        "image_size": config.image_size,
        "positions": config.positions,
        "encoder": to_dict(config.encoder),
    }
    parts: list[nn.Module] = [model.encoder]
    if model.vae is not None:
        # another library's modules say in their repr what their weights do not: activations, epsilons
        described["vae"] = [model.vae.config.latent_scale, model.vae.config.latent_shift, repr(model.vae)]
        parts.append(model.vae)
    if isinstance(model.encoder, ExternalEncoder):
        described["tower"] = [model.encoder.tower.native_size, repr(model.encoder.tower.tower)]
        parts.append(model.encoder.tower)
    return _hash(described, parts)


def vae_fingerprint(vae: FrozenVAE) -> str:
    """sha256 (hex) of all that decides a picture's scaled latents: the VAE's encoder and latent convention."""
    return _hash({"vae": [vae.config.latent_scale, vae.config.latent_shift, repr(vae)]}, [vae])


def _hash(described: dict[str, Any], parts: Sequence[nn.Module]) -> str:
    tensors = [
        item
        for part in parts
        for item in sorted(part.state_dict().items())
        if not (isinstance(part, FrozenVAE) and _DECODES & set(item[0].split(".")))
    ]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for (name, tensor), content in zip(tensors, pool.map(_sha256, (tensor for _, tensor in tensors)), strict=True):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {content}\n".encode())
    return digest.hexdigest()


def _sha256(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data.data).hexdigest()
