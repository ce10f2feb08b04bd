"""Pictures that the tiny VAE learns from: crops of the training landscapes, captioned scenes, and cut-outs alone."""

import zlib

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from openvision3.config import SceneConfig
from openvision3.data import demo
from openvision3.data.batches import begin_worker

# Small things hold the fine detail that a tiny autoencoder loses first, hence the smaller sizes than the benchmark's.
_SCENES = SceneConfig(size_min=0.15, size_max=0.6, count_weights=(0.2, 0.3, 0.3, 0.2))
_CUTOUTS = SceneConfig(size_min=0.3, size_max=0.9, count_weights=(1.0, 0.0, 0.0, 0.0), gradient_probability=1.0)


class VAECrops(Dataset[Tensor]):
    """Item i: a uint8 picture (3, size, size), a pure function of (seed, i)."""

    def __init__(self, size: int, seed: int, length: int):
        self.size = size
        self.seed = seed
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([zlib.crc32(b"vae"), self.seed, index])))
        kind = rng.random()
        if kind < 0.5:
            picture = self._landscape(rng)
        else:
            config = _SCENES if kind < 0.85 else _CUTOUTS
            picture = demo.render(demo.scene(config, "train", self.seed, index), self.size)
        return torch.from_numpy(picture).permute(2, 0, 1)

    def _landscape(self, rng: np.random.Generator) -> np.ndarray:
        stems = demo.landscapes(held_out=False)
        image = demo.landscape(stems[int(rng.random() * len(stems))])
        side = image.height * (0.4 + 0.6 * rng.random())
        left, top = rng.random() * (image.width - side), rng.random() * (image.height - side)
        box = (left, top, left + side, top + side)
        crop = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        return np.array(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop)


def crop_batches(
    size: int, seed: int, samples: int, start: int, batch_size: int, num_workers: int
) -> "DataLoader[Tensor]":
    """Whole batches, uint8 (B, 3, size, size), of the pictures from `start` to `samples`."""
    return DataLoader(
        Subset(VAECrops(size, seed, samples), range(start, samples)),
        batch_size,
        num_workers=num_workers,
        drop_last=True,
        worker_init_fn=begin_worker,
    )
