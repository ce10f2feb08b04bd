"""Named recipes of vision-language models: functions that return a run's configuration (`ov3 vlm train RECIPE`)."""

from collections.abc import Callable
from dataclasses import replace

from openvision3.vlm.config import LoRAConfig, VLMDataConfig, VLMStageConfig, VLMTrainConfig, WordsConfig
from openvision3.vlm.scenes_questions import SCENES


def demo() -> VLMTrainConfig:
    """SmolLM2-135M-Instruct sees scenes through the demo model: projector and LoRA, an hour of two cores."""
    return VLMTrainConfig(
        recipe="vlm_demo",
        tower="demo",
        language_model="smollm2-135m-instruct",
        words=WordsConfig(samples=8_000),
        stage1=VLMStageConfig(
            data=VLMDataConfig(scenes=SCENES, ask="captions", template="plain"),
            samples=800,
            batch_size=16,
            peak_lr=2e-4,
            language_model=False,
        ),
        stage2=VLMStageConfig(
            # things repeat as often as not, or "one" would be the answer to nearly every count
            data=VLMDataConfig(
                scenes=replace(SCENES, count_weights=(0.1, 0.3, 0.3, 0.3), repeat_probability=0.5), apart=True
            ),
            samples=2_400,
            batch_size=4,
            peak_lr=1e-3,
            projector_lr=3e-4,
            # of attention alone: all layers take 40 % longer here
            lora=LoRAConfig(rank=16, alpha=32.0, layers=("q_proj", "k_proj", "v_proj", "o_proj")),
        ),
        max_length=768,
        checkpoint_every=400,
    )


def llava15_7b() -> VLMTrainConfig:
    """LLaVA-1.5 with Vicuna 7B: LCS-558K for the projector, then LLaVA-665K (arXiv 2310.03744)."""
    return VLMTrainConfig(
        recipe="llava15_7b",
        tower="runs/paper_b16/model",
        language_model="lmsys/vicuna-7b-v1.5",
        stage1=VLMStageConfig(
            data=VLMDataConfig(
                source="data/blip_laion_cc_sbu_558k.json", images="data/LCS-558K", template="plain", num_workers=8
            ),
            batch_size=256,
            peak_lr=1e-3,
            language_model=False,
        ),
        stage2=VLMStageConfig(
            data=VLMDataConfig(source="data/llava_v1_5_mix665k.json", images="data/llava-665k", num_workers=8),
            batch_size=128,
            peak_lr=2e-5,
        ),
        resolution=384,
        calibrate=False,  # as LLaVA
        precision="bf16",
        micro_batch=8,
        checkpoint_blocks=True,
        parallel="fsdp",
        checkpoint_every=64_000,
    )


def llava_next_7b() -> VLMTrainConfig:
    """LLaVA-NeXT with Vicuna 7B: tiles of several aspect ratios, the second stage on LLaVA-NeXT's mix."""
    base = llava15_7b()
    return replace(
        base,
        recipe="llava_next_7b",
        kind="llava_next",
        stage2=replace(
            base.stage2,
            data=VLMDataConfig(source="data/llava_next_mix.json", images="data/llava-next", num_workers=8),
        ),
        max_length=4096,
        micro_batch=4,
    )


VLM_RECIPES: dict[str, Callable[[], VLMTrainConfig]] = {
    "demo": demo,
    "llava15_7b": llava15_7b,
    "llava_next_7b": llava_next_7b,
}
