"""LLaVA's two stages with transformers' Trainer as the engine: the projector alone, then the language model with it."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from openvision3.config import OpenVisionError
from openvision3.distributed import World
from openvision3.files import save_tensors
from openvision3.training.loop import entered_run
from openvision3.training.monitor import Monitor
from openvision3.training.parallel import open_world
from openvision3.training.precision import Precision, autocast, choose_precision
from openvision3.training.run_folder import RunInterrupted, StopRequest, record_environment, recorded_environment
from openvision3.vlm.assemble import assemble, calibrate_projector, open_tower
from openvision3.vlm.config import VLMStageConfig, VLMTrainConfig, validate
from openvision3.vlm.conversation import IGNORED, VICUNA_TEMPLATE
from openvision3.vlm.data import Collate, Conversations, EncodedConversations, open_conversations, order
from openvision3.vlm.folder import VLM, save_vlm
from openvision3.vlm.language_model import open_language_model
from openvision3.vlm.lora import Adapter
from openvision3.vlm.words import WORDS, learn_words

CALIBRATED = 16  # conversations with pictures, whose tokens set the scale of a new projector
TRAINED = "trained.safetensors"  # of a checkpoint: the weights that learn, under the model's names


def run_folder(config: VLMTrainConfig) -> Path:
    """Where a run lives: `config.out`, or runs/RECIPE."""
    return Path(config.out) if config.out else Path("runs") / config.recipe


def train(config: VLMTrainConfig, device: str = "auto") -> Path:
    """Trains both stages in the run's folder, or resumes what is there; returns the folder, with `model/` in it.

    Raises `OpenVisionError` where the run can't go on, and `RunInterrupted` after SIGINT, SIGTERM or SIGUSR1, with a
    checkpoint saved.
    """
    with open_world(device) as (world, place):
        world.agree(lambda: validate(config))
        with entered_run(run_folder(config), config, world) as folder, StopRequest() as stop:
            if world.agree(lambda: (folder / "model").exists()):
                if world.rank == 0:
                    print(f"{folder} is complete: its model is in {folder / 'model'}")
                return folder
            vlm, side = build(config)
            if config.words.samples:
                _words(config, folder / "words", vlm, side, world, place, stop)
            adapter = None
            for name, stage in (("stage1", config.stage1), ("stage2", config.stage2)):
                adapter = prepare(vlm, stage, adapter)
                conversations = world.agree(lambda stage=stage: _conversations(config, stage, side))
                train_stage(config, folder / name, vlm, stage, conversations, world, place, stop, name == "stage1")
            vlm.model.to("cpu")
            if world.rank == 0:
                if adapter is not None:
                    adapter.save(folder / "adapter", config)
                    adapter.merge()
                save_vlm(folder / "model", vlm, config)
            world.agree(lambda: None)  # the folder is there before any process ends
    return folder


def build(config: VLMTrainConfig) -> tuple[VLM, int]:
    """The model before its training, in fp32 on the CPU, and the side of its pictures in pixels."""
    tower = open_tower(config.tower, config.resolution)
    language_model, tokenizer = open_language_model(config.language_model, torch.float32)
    if not tokenizer.chat_template:
        print(f"{config.language_model} has no chat template: it gets Vicuna's, as in LLaVA-1.5", file=sys.stderr)
        tokenizer.chat_template = VICUNA_TEMPLATE
    torch.manual_seed(config.seed)
    vlm = assemble(tower, language_model, tokenizer, config.kind, config.tiles)
    vlm.model.config.use_cache = False
    return vlm, tower.side


def _words(
    config: VLMTrainConfig, folder: Path, vlm: VLM, side: int, world: World, device: torch.device, stop: StopRequest
) -> None:
    """The projector's first alignment, in the first process; all of them load what it wrote."""

    def learned() -> bool:
        data = replace(config.stage1.data, ask="captions")
        conversations = open_conversations(data, side, config.seed, config.words.samples)
        return (folder / WORDS).exists() or learn_words(
            vlm, conversations, config.words, folder, config.seed, device, lambda: bool(stop)
        )

    if not world.agree(learned):
        raise RunInterrupted(
            "stopped before stage 1: nothing was saved, the same command begins anew", stop.signal_number
        )
    vlm.model.model.multi_modal_projector.load_state_dict(load_file(folder / WORDS))


def prepare(vlm: VLM, stage: VLMStageConfig, adapter: Adapter | None) -> Adapter | None:
    """Lets learn what the stage trains, and nothing else; returns the low-rank updates where there are any."""
    model = vlm.model
    if stage.lora.rank and adapter is None:
        adapter = Adapter(model, stage.lora)
    for name, weight in model.named_parameters():
        of_text = name.startswith(("model.language_model.", "lm_head."))
        learns = "multi_modal_projector" in name or "image_newline" in name
        if of_text and stage.language_model:
            learns = "lora_" in name if adapter is not None else True
        weight.requires_grad_(learns)
    return adapter


def _conversations(config: VLMTrainConfig, stage: VLMStageConfig, side: int) -> Conversations:
    return open_conversations(stage.data, side, config.seed, stage.samples)


def train_stage(
    config: VLMTrainConfig,
    folder: Path,
    vlm: VLM,
    stage: VLMStageConfig,
    conversations: Conversations,
    world: World,
    device: torch.device,
    stop: StopRequest,
    new_projector: bool,
) -> None:
    """Trains one stage from its last checkpoint on; where it is complete, loads what it ended with.

    A new projector is scaled by the stage's first pictures, where the config says so.
    """
    done = folder / TRAINED
    if world.agree(done.exists):
        load_trained(vlm.model, done)
        return
    samples = stage.samples or len(conversations)
    steps = -(-samples // stage.batch_size)
    share, rest = divmod(stage.batch_size, world.size)
    micro = config.micro_batch or share
    if rest or share % micro:
        raise OpenVisionError(
            f"batch_size {stage.batch_size} can't be shared by {world.size} processes in parts of {micro} equally"
        )
    per_picture = vlm.model.config.image_seq_length
    numbers = order(conversations, steps * stage.batch_size, stage.batch_size, per_picture, config.seed)
    data = EncodedConversations(conversations, numbers, vlm.processor, config.max_length, stage.data)
    collate = Collate(vlm.processor)
    if stage.data.apart and (found := vlm.model.model.language_model.config._attn_implementation) != "sdpa":
        raise OpenVisionError(f"turns apart need attention by scaled dot products, the language model has {found!r}")
    checkpoint = _latest(folder)
    if config.calibrate and not config.words.samples and new_projector and not checkpoint:
        _calibrate(vlm, data)
    precision: Precision = world.agree(lambda: _settle_precision(config, folder, vlm, data, collate, device))
    say = f"{folder.name}: {steps:,} steps of {stage.batch_size}, {_trained_count(vlm.model) / 1e6:.2f} M weights learn"
    arguments = _arguments(config, stage, folder, steps, micro, share // micro, precision, device)
    with _monitor(folder, steps, stage.batch_size, world) as monitor:
        records = _Records(monitor, stage, stop, world, arguments)
        trainer = _Trainer(vlm.model, arguments, data, collate, stage, records)
        if monitor is not None:
            monitor.say(say + (f", from {checkpoint.name} on" if checkpoint else ""))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if records.stopped:
        raise RunInterrupted(
            f"stopped in {folder.name} after {trainer.state.global_step * stage.batch_size:,} samples, saved in "
            f"{folder}; the same command goes on from there",
            stop.signal_number,
        )
    # of the Trainer's own state: FSDP's shards are gathered
    state: Any = trainer.accelerator.get_state_dict(trainer.model_wrapped) if config.parallel == "fsdp" else None
    if world.rank == 0:
        save_tensors(done, _trained(vlm.model, state), {})
        for old in folder.glob("checkpoint-*"):
            shutil.rmtree(old)
    world.agree(lambda: None)


def _calibrate(vlm: VLM, data: EncodedConversations) -> None:
    """By the pictures of the first positions that have some; the same in every process."""
    with_pictures = (row for row in map(data.__getitem__, range(len(data))) if "pixel_values" in row)
    first = list(islice(with_pictures, CALIBRATED))
    if first:
        calibrate_projector(vlm.model, torch.cat([row["pixel_values"].flatten(0, -4) for row in first]))


def _trained_count(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def _trained(model: nn.Module, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights that learn, under the model's names, on the CPU; of `state` where the model holds shards."""
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    values = dict(model.named_parameters()) if state is None else state
    return {name: values[name].detach().cpu().contiguous() for name in names}


def load_trained(model: nn.Module, path: Path) -> None:
    """Loads what a stage ended with. Raises `OpenVisionError` where that is not what the stage trains."""
    found = load_file(path)
    mine = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if {n: t.shape for n, t in found.items()} != {n: t.shape for n, t in mine.items()}:
        raise OpenVisionError(f"{path} does not hold the weights that this stage trains")
    with torch.no_grad():
        for name, weight in mine.items():
            weight.copy_(found[name])


def _latest(folder: Path) -> Path | None:
    """The last whole checkpoint: its trainer state is written last."""
    found = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _settle_precision(
    config: VLMTrainConfig, folder: Path, vlm: VLM, data: EncodedConversations, collate: Collate, device: torch.device
) -> Precision:
    """As configured, or the faster by trial; recorded at the first start, kept at each resume."""
    folder.mkdir(exist_ok=True)
    recorded = recorded_environment(folder.parent)
    if recorded is not None and recorded.get("precision") in ("bf16", "fp32"):
        return recorded["precision"]
    model = vlm.model

    def run_step(precision: Precision) -> None:
        batch = {name: value for name, value in collate([data[0], data[1 % len(data)]]).items() if name != "bad"}
        model.to(device)
        with autocast(device, precision):
            loss_sum(model, {name: value.to(device) for name, value in batch.items()}).backward()
        model.zero_grad()

    precision = choose_precision(config.precision, device, run_step)
    record_environment(folder.parent, device, precision=precision)
    return precision


def _arguments(
    config: VLMTrainConfig,
    stage: VLMStageConfig,
    folder: Path,
    steps: int,
    micro: int,
    accumulation: int,
    precision: Precision,
    device: torch.device,
) -> TrainingArguments:
    every = -(-config.checkpoint_every // stage.batch_size)
    sharded: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2}} if config.parallel == "fsdp" else {}
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        learning_rate=stage.peak_lr,
        lr_scheduler_type="cosine",
        warmup_steps=int(stage.warmup * steps),
        weight_decay=stage.weight_decay,
        max_grad_norm=1.0,
        bf16=precision == "bf16",
        use_cpu=device.type == "cpu",
        activation_checkpointing=config.checkpoint_blocks,
        logging_steps=config.log_every,
        logging_first_step=True,
        save_strategy="steps" if every else "no",
        save_steps=every or steps,
        save_total_limit=2,
        dataloader_num_workers=stage.data.num_workers,
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
        ddp_find_unused_parameters=False,
        seed=config.seed,
        **sharded,
    )


@contextmanager
def _monitor(folder: Path, steps: int, batch_size: int, world: World) -> Iterator[Monitor | None]:
    if world.rank:
        yield None
        return
    checkpoint = _latest(folder)
    step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    seen = step * batch_size
    with Monitor(folder, steps * batch_size, samples_seen=seen, resume_step=step, shown=("loss",)) as monitor:
        yield monitor


def loss_sum(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy summed over all that a batch of `Collate` has to learn; logits are made for those columns alone."""
    batch = dict(batch)
    targets = batch.pop("labels")[:, 1:][:, batch["logits_to_keep"]]
    logits = model(**batch, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")


class _Records(TrainerCallback):
    """Writes the run's records, keeps count of what could not be used, and stops on a signal with a checkpoint."""

    def __init__(
        self, monitor: Monitor | None, stage: VLMStageConfig, stop: StopRequest, world: World, arguments: Any
    ) -> None:
        self.monitor, self.stage, self.stop, self.world = monitor, stage, stop, world
        self.stopped, self.bad, self.waiting = False, 0, []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Counts, and asks for the end after a signal."""
        seen = state.global_step * self.stage.batch_size
        if self.monitor is not None:
            self.monitor.advance(seen)
        found = [reason for reasons in self.world.gather_objects(self.waiting) for reason in reasons]
        self.waiting = []
        for reason in found:
            self.bad += 1
            if self.monitor is not None:
                self.monitor.record("bad_sample", state.global_step, seen, {"reason": reason})
        if found and self.bad > max(1.0, self.stage.data.max_bad_fraction * max(seen, 1000)):
            raise OpenVisionError(f"{self.bad} of {seen:,} samples can't be used, the last: {found[-1]}")
        if self.world.largest(self.stop.signal_number) and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Records loss, gradient norm and rate; the Trainer's summary at its end is left out."""
        if self.monitor is not None and logs and "loss" in logs:
            row = {name: float(logs[name]) for name in ("loss", "grad_norm", "learning_rate") if name in logs}
            self.monitor.log(state.global_step, state.global_step * self.stage.batch_size, row)


class _Trainer(Trainer):
    """transformers' Trainer for LLaVA: ordered data, loss over answers, two learning rates, small checkpoints."""

    def __init__(
        self,
        model: Any,
        arguments: TrainingArguments,
        data: EncodedConversations,
        collate: Collate,
        stage: VLMStageConfig,
        records: _Records,
    ) -> None:
        super().__init__(model, arguments, data_collator=collate, train_dataset=data, callbacks=[records])
        for callback in list(self.callback_handler.callbacks):
            if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
                self.remove_callback(type(callback))
        self.stage, self.records = stage, records
        self.loss_is_scaled_for_ga = True

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(train_dataset or self.train_dataset)  # type: ignore[arg-type]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW; the projector with a rate of its own."""
        if self.optimizer is None:
            stage, groups = self.stage, {True: [], False: []}
            trained: Any = model or self.model
            for name, weight in trained.named_parameters():
                if weight.requires_grad:
                    groups["language_model" not in name and "lm_head" not in name].append(weight)
            rates = {True: stage.projector_lr or stage.peak_lr, False: stage.peak_lr}
            self.optimizer = torch.optim.AdamW(
                [{"params": weights, "lr": rates[which]} for which, weights in groups.items() if weights],
                lr=stage.peak_lr,
                betas=(0.9, 0.999),
                weight_decay=stage.weight_decay,
            )
        return self.optimizer

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over all tokens of the global batch that are learned."""
        inputs = dict(inputs)
        self.records.waiting += inputs.pop("bad")
        total = loss_sum(model, inputs) / num_items_in_batch
        return total * self.accelerator.num_processes  # DDP and FSDP take the mean over processes

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The weights that learn, alone: the frozen ones are where they came from."""
        folder = Path(output_dir or self.args.output_dir)  # type: ignore[arg-type]
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / TRAINED, _trained(self.model, state_dict), {})  # type: ignore[arg-type]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_trained(self.model, Path(resume_from_checkpoint, TRAINED))  # type: ignore[arg-type]
