"""A name for what a model makes of pictures: equal where tokens and image embeddings are."""

import hashlib
import json

import torch
from torch import nn

from openvision3.config import to_dict
from openvision3.model.external import ExternalEncoder
from openvision3.model.openvision3 import OpenVision3


def image_fingerprint(model: OpenVision3) -> str:
    """sha256 (hex) of all that decides a picture's tokens and embedding: weights of encoder and VAE, and their config.

    Text towers and decoders, the model's name and the attention path leave it as it is; another weight dtype does not.
    """
    config = model.config
    described = {
        "input": config.input,
        "patch_size": config.patch_size,
        "image_size": config.image_size,
        "positions": config.positions,
        "encoder": to_dict(config.encoder),
        "vae": None if model.vae is None else [model.vae.config.latent_scale, model.vae.config.latent_shift],
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    parts: list[nn.Module | None] = [model.encoder, model.vae]
    if isinstance(model.encoder, ExternalEncoder):
        parts.append(model.encoder.tower)
    for part in parts:
        for name, tensor in sorted(part.state_dict().items()) if part is not None else ():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
