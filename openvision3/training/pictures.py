"""Sample pictures of a run: originals, what the VAE alone gives back, and what the unified tokens give back."""

import torch
from torch import Tensor

from openvision3.model.openvision3 import OpenVision3


@torch.no_grad()
def picture_columns(model: OpenVision3, pixels: Tensor) -> list[Tensor]:
    """Columns for a picture grid, (B, 3, R, R) in [-1, 1] each: originals | VAE | unified, without the parts it lacks.

    `pixels` uint8 (B, 3, R, R). In fp32, without noise; one picture at a time, so that memory is no concern.
    """
    columns: list[list[Tensor]] = []
    for picture in pixels.split(1):
        image = picture.to(model.device).float() / 127.5 - 1
        row = [image]
        if model.vae is not None:
            latents = model.vae.encode(image)
            row.append(model.vae.decode(latents))
        if model.config.decoder is not None:
            row.append(model.decode(model.encode(image)))
        columns.append([cell.float().cpu() for cell in row])
    return [torch.cat(column) for column in zip(*columns, strict=True)]
