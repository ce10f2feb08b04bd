"""A training run small enough for tests: `python tests/tiny_run.py OUT VAE STEPS WORKERS` is one."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from openvision3.config import (
    DataConfig,
    LossConfig,
    ModelConfig,
    SceneConfig,
    StageConfig,
    TextDecoderConfig,
    TextEncoderConfig,
    TrainConfig,
    TransformerConfig,
    VAEConfig,
)
from openvision3.data.tokenizer import demo_tokenizer
from openvision3.training.loop import train
from openvision3.vae import TinyVAE, TinyVAEConfig

SIZE = TransformerConfig(width=16, depth=2, num_heads=2)


def make_vae(folder: Path) -> VAEConfig:
    """Saves an untrained VAE of the embedded kind, a function of nothing."""
    torch.manual_seed(0)
    widths, depths = (4, 4, 8), (1, 1, 1)
    vae = TinyVAE(VAEConfig(), TinyVAEConfig(widths, depths, widths, depths))
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # some are 0 at first
    vae.save(folder)
    return VAEConfig(kind="tiny", source=str(folder))


def tiny_model(vae: VAEConfig, **changes: Any) -> ModelConfig:
    vocab_size = demo_tokenizer().vocab_size
    parts: dict[str, Any] = {
        "encoder": SIZE,
        "decoder": SIZE,
        "text_encoder": TextEncoderConfig(SIZE, vocab_size=vocab_size, context_length=16),
        "text_decoder": TextDecoderConfig(SIZE, vocab_size=vocab_size, context_length=24),
    }
    return ModelConfig(**({"name": "tiny", "image_size": 32, "embed_dim": 16, "vae": vae} | parts | changes))


def tiny_config(out: Path, vae: VAEConfig, steps: int = 6, lpips: float = 0.0, **changes: Any) -> TrainConfig:
    """Two stages, two thirds of the steps in the first; batches of 4, pixels for every other sample."""
    first = steps * 2 // 3
    values: dict[str, Any] = {
        "model": tiny_model(vae),
        "data": DataConfig(scenes=SceneConfig(num_names=30), num_workers=0),
        "loss": LossConfig(pixel_stride=2),
        "stage1": StageConfig(32, samples=4 * first, warmup_samples=4, batch_size=4, base_lr=0.1),
        "stage2": StageConfig(48, 4 * (steps - first), 2, batch_size=4, base_lr=0.05, lpips_weight=lpips),
        "precision": "fp32",
        "out": str(out),
        "log_every": 1,
        "checkpoint_every": 8,
    }
    return TrainConfig("tiny", **(values | changes))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_folder, vae_folder, steps, workers = sys.argv[1:]
    config = tiny_config(Path(run_folder), VAEConfig(kind="tiny", source=vae_folder), int(steps))
    train(replace(config, data=replace(config.data, num_workers=int(workers))), device="cpu")
