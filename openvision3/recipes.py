"""Named recipes: functions that return a run's whole configuration. `ov3 train RECIPE` runs one.

Each docstring says what the recipe is for; figures of the shipped ones are in docs/RESULTS.md.
"""

from collections.abc import Callable
from dataclasses import replace

from openvision3.config import (
    MODEL_PARTS,
    DataConfig,
    DistillConfig,
    LossConfig,
    ModelConfig,
    ModelPart,
    OptimizerConfig,
    RunConfig,
    SceneConfig,
    StageConfig,
    TextDecoderConfig,
    TextEncoderConfig,
    TrainConfig,
    TransformerConfig,
    VAEConfig,
    VAETrainConfig,
)
from openvision3.data.tokenizer import demo_tokenizer

EPOCH = 1_280_000  # samples of one epoch, as the paper counts (ImageNet's size)


def _demo_model(
    name: str, width: int, encoder: int, decoder: int, text_encoder: int, text_decoder: int, text_length: int = 32
) -> ModelConfig:
    """A small model on the embedded VAE and the demo's vocabulary; depths by part, head width 64."""
    tokenizer = demo_tokenizer()

    def stack(depth: int) -> TransformerConfig:
        # squared ReLU: a third of a CPU step goes to GELU and its gradient otherwise
        return TransformerConfig(width, depth, max(1, width // 64), activation="relu_squared", residual_init=0.1)

    return ModelConfig(
        name=name,
        image_size=128,
        embed_dim=width,
        decoder_norm=False,
        encoder=stack(encoder),
        decoder=stack(decoder),
        text_encoder=TextEncoderConfig(stack(text_encoder), tokenizer.vocab_size, text_length),
        text_decoder=TextDecoderConfig(stack(text_decoder), tokenizer.vocab_size, text_length),
        vae=VAEConfig(licence="MIT"),
    )


def quickstart() -> TrainConfig:
    """A small encoder of 100 named things, in under ten minutes on two cores (what `ov3 quickstart` trains)."""
    scenes = SceneConfig(
        num_names=100, size_min=0.35, size_max=0.65, count_weights=(0.6, 0.4, 0.0, 0.0), max_rotation=5.0
    )
    model = _demo_model("quickstart", width=192, encoder=4, decoder=2, text_encoder=2, text_decoder=2)
    return TrainConfig(
        recipe="quickstart",
        # less noise than the default: a run this short reconstructs better with it
        model=replace(model, noise_tau=0.1, positions="scaled"),
        data=DataConfig(scenes=scenes),
        loss=LossConfig(omega_rec=10.0, beta=1.0, pixel_stride=16),
        optimizer=OptimizerConfig(kind="muon", weight_decay=0.05),
        stage1=StageConfig(
            resolution=64,
            samples=24_000,
            warmup_samples=1_600,
            batch_size=64,
            base_lr=8e-3,
            scenes=replace(scenes, size_max=0.8, count_weights=(1.0, 0.0, 0.0, 0.0)),
        ),
        stage2=StageConfig(
            resolution=128, samples=13_000, warmup_samples=640, batch_size=64, base_lr=5e-3, lpips_weight=0.5
        ),
        log_every=10,
    )


def demo() -> TrainConfig:
    """The embedded demo model: all 494 named things, 128 px, within two hours on two cores (docs/RECIPE.md).

    Stage 1 shows large single things at 64 px, until names are learned; stage 2 the whole distribution at 128 px.
    """
    large = SceneConfig(size_min=0.4, size_max=0.8, count_weights=(0.8, 0.2, 0.0, 0.0))
    model = _demo_model("demo", width=192, encoder=6, decoder=2, text_encoder=2, text_decoder=3)
    assert model.text_decoder is not None
    return TrainConfig(
        recipe="demo",
        model=replace(
            model,
            noise_tau=0.1,
            positions="scaled",
            text_decoder=replace(model.text_decoder, image_positions=4.0),  # without, captions guess relations
        ),
        data=DataConfig(scenes=SceneConfig(size_min=0.22, size_max=0.6, count_weights=(0.38, 0.38, 0.2, 0.04))),
        loss=LossConfig(omega_rec=2.0, beta=1.0, pixel_stride=16),
        optimizer=OptimizerConfig(kind="muon", weight_decay=0.05),
        stage1=StageConfig(
            resolution=64, samples=80_000, warmup_samples=4_000, batch_size=64, base_lr=8e-3, scenes=large
        ),
        stage2=StageConfig(
            resolution=128, samples=220_000, warmup_samples=4_000, batch_size=64, base_lr=6e-3, lpips_weight=0.5
        ),
        eval_every=80_000,
        checkpoint_every=16_000,
    )


def demo_vae() -> VAETrainConfig:
    """The embedded tiny VAE (8x, 16 channels), within an hour on two cores."""
    return VAETrainConfig(recipe="demo_vae")


def distill_vae_encoder() -> DistillConfig:
    """A fast encoder in place of a VAE's, for the model of --init; its folder is then given as --vae.

    For a model on FLUX.1's VAE, on one GPU: `--init MODEL --data.source TARS --encoder.widths 128 256 --samples 5000000
    --batch-size 64 --peak-lr 5e-4`, a twentieth of that encoder's operations. Figures: docs/PERFORMANCE.md.
    """
    return DistillConfig(recipe="distill_vae_encoder")


_FLUX = VAEConfig(
    kind="diffusers",
    source="black-forest-labs/FLUX.1-schnell",
    latent_scale=0.3611,
    latent_shift=0.0,
    licence="Apache-2.0",
)


def paper_b16() -> TrainConfig:
    """OpenVision 3 ViT-B/16 as published: 4000 + 400 epochs at 128 then 256 px. A cluster's work; try --dry-run.

    FLUX.1's VAE, BERT's vocabulary, Recap-DataComp tars under data/recap-datacomp (`jpg`, `txt`, `json` with the field
    `re_caption`). Source: OpenVision 3, section 3 and its table of hyperparameters; what it leaves open follows
    OpenVision 1 (text towers, optimizer) or is ours (see docs/METHOD.md).

    `torchrun --nnodes 8 --nproc-per-node 8 ... -m openvision3 train paper_b16`: on 64 H100, about 56 hours and 11 GiB,
    counted and not measured (docs/SCALING.md).
    """
    return TrainConfig(
        recipe="paper_b16",
        model=ModelConfig(name="openvision3-vit-base-patch2", vae=_FLUX),
        data=DataConfig(
            source="data/recap-datacomp",
            caption_field="re_caption",
            crop_min_area=0.4,
            fast_decode=True,
            num_workers=8,
        ),
        stage1=StageConfig(128, 4000 * EPOCH, 40 * EPOCH, 8192, 8e-6),
        stage2=StageConfig(256, 400 * EPOCH, 20 * EPOCH, 4096, 4e-7, lpips_weight=0.5),
        micro_batch=64,
        checkpoint_blocks=True,
        compile=True,
        log_every=50,
        eval_every=50 * EPOCH,
        checkpoint_every=10 * EPOCH,
        keep_checkpoints=3,
        keep_every=400 * EPOCH,
        background_saves=True,
    )


def paper_l16() -> TrainConfig:
    """OpenVision 3 ViT-L/16 as published: `paper_b16` with an encoder and text towers of L, the decoder B.

    The decoder stays Base, as the paper found L unstable there. `torchrun --nnodes 8 --nproc-per-node 8 ... -m
    openvision3 train paper_l16`: on 64 H100, about 77 hours and 18 GiB, counted and not measured (docs/SCALING.md).
    """
    base = paper_b16()
    text = TransformerConfig(768, 12, 12, activation="gelu_tanh")  # OpenVision 1's for L
    return replace(
        base,
        recipe="paper_l16",
        model=replace(
            base.model,
            name="openvision3-vit-large-patch2",
            embed_dim=1024,
            encoder=TransformerConfig(1024, 24, 16),
            text_encoder=TextEncoderConfig(text),
            text_decoder=TextDecoderConfig(text),
        ),
    )


def b16_1000_200() -> TrainConfig:
    """ViT-B/16 at the length of the paper's ablations, 1000 + 200 epochs: a replication on 8 GPUs of 80 GB.

    `torchrun --standalone --nproc-per-node 8 -m openvision3 train b16_1000_200`: on 8 H100, about 141 hours and 11 GiB,
    counted and not measured (docs/SCALING.md).
    """
    base = paper_b16()
    return replace(
        base,
        recipe="b16_1000_200",
        stage1=replace(base.stage1, samples=1000 * EPOCH),
        stage2=replace(base.stage2, samples=200 * EPOCH),
        eval_every=25 * EPOCH,
        checkpoint_every=5 * EPOCH,
        keep_every=200 * EPOCH,
    )


def s16_1gpu() -> TrainConfig:
    """ViT-S/16 on one GPU of 24 GB, about a day: 16 + 2 epochs at 128 then 256 px of your own tars.

    `ov3 train s16_1gpu --data.source TARS`: on an RTX 4090 about 24 hours and 9.2 GiB, counted and not measured
    (docs/SCALING.md). Smaller batches than the paper's, with a rate to match; pixels are decoded for one sample in
    eight, as the FLUX decoder would otherwise take most of the time.
    """
    base = paper_b16()
    small = TransformerConfig(384, 12, 6)
    text = TransformerConfig(384, 6, 6, activation="gelu_tanh")
    return replace(
        base,
        recipe="s16_1gpu",
        model=replace(
            base.model,
            name="openvision3-vit-small-patch2",
            embed_dim=384,
            encoder=small,
            decoder=replace(small, depth=6),
            text_encoder=TextEncoderConfig(text),
            text_decoder=TextDecoderConfig(text),
        ),
        loss=LossConfig(pixel_stride=8),
        stage1=StageConfig(128, 16 * EPOCH, EPOCH, 1024, 1.2e-4),
        stage2=StageConfig(256, 2 * EPOCH, EPOCH // 8, 512, 1.2e-5, lpips_weight=0.5),
        micro_batch=64,
        checkpoint_blocks=False,
        eval_every=EPOCH,
        checkpoint_every=EPOCH // 4,
        keep_every=0,
    )


def _attach(recipe: str, attach: tuple[ModelPart, ...]) -> TrainConfig:
    """New parts on the frozen encoder of --init, on the demo's scenes; sizes of parts are upper bounds (`attached`)."""
    tokenizer = demo_tokenizer()
    text = TransformerConfig(512, 6, 8, activation="gelu_tanh")
    return TrainConfig(
        recipe=recipe,
        model=ModelConfig(
            text_encoder=TextEncoderConfig(text, tokenizer.vocab_size, 32),
            text_decoder=TextDecoderConfig(text, tokenizer.vocab_size, 32),
            vae=VAEConfig(licence="MIT"),
        ),
        data=DataConfig(scenes=SceneConfig(size_min=0.2, size_max=0.65)),
        loss=LossConfig(pixel_stride=8),
        optimizer=OptimizerConfig(weight_decay=0.05),
        stage1=StageConfig(samples=100_000, warmup_samples=4_000, batch_size=64, base_lr=2e-3),
        attach=attach,
        freeze=MODEL_PARTS,
        eval_every=25_000,
        checkpoint_every=10_000,
    )


def attach_decoder() -> TrainConfig:
    """A reconstruction decoder on the frozen encoder of --init MODEL (ours, released, CLIP, SigLIP).

    `--init` is a model folder, a folder in the released format, one of open_clip's or transformers' CLIP or SigLIP, or
    a hub id. LPIPS joins in stage 2. With `--attach decoder text_encoder text_decoder` text towers are trained as well.
    """
    config = _attach("attach_decoder", ("decoder",))
    last = StageConfig(samples=20_000, warmup_samples=1_000, batch_size=64, base_lr=4e-4, lpips_weight=0.5)
    return replace(config, stage1=replace(config.stage1, samples=80_000), stage2=last)


def attach_text() -> TrainConfig:
    """A text encoder and a caption decoder on the frozen encoder of --init MODEL (locked-image tuning).

    Source: LiT, arXiv 2111.07991. `--init` as for `attach_decoder`. The pooled embedding's projection stays as it is,
    where the model has one; `--attach head text_encoder text_decoder` trains a new one. `--vocabulary bert` is for
    captions beyond the demo's.
    """
    return _attach("attach_text", ("text_encoder", "text_decoder"))


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "quickstart": quickstart,
    "demo": demo,
    "demo_vae": demo_vae,
    "distill_vae_encoder": distill_vae_encoder,
    "s16_1gpu": s16_1gpu,
    "b16_1000_200": b16_1000_200,
    "paper_b16": paper_b16,
    "paper_l16": paper_l16,
    "attach_decoder": attach_decoder,
    "attach_text": attach_text,
}
