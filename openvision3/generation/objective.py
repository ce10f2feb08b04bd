"""The velocity loss of one global batch and its gradient; every draw is a function of (seed, position) alone."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from openvision3.data.batches import Batch
from openvision3.distributed import ALONE, World
from openvision3.generation.condition import Condition
from openvision3.generation.conditions import class_numbers, text_condition
from openvision3.generation.dit import DiT
from openvision3.generation.flow import token_shift, training_times, velocity_loss
from openvision3.generation.space import PictureSpace
from openvision3.generation.statistics import Normalizer
from openvision3.generation.train_config import GeneratorTrainConfig
from openvision3.training.noise import mixed_seed
from openvision3.training.parallel import Engine
from openvision3.training.precision import Precision, autocast


def flow_draws(
    seed: int, positions: Sequence[int], draws: int, shape: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """For each position `draws` of them in a row: noise (B * draws, *shape), normal (B * draws,), uniform (B * draws,).

    fp32; the numbers differ between kinds of device, whose generators differ.
    """
    generator = torch.Generator(device)
    count = len(positions) * draws
    noise = torch.empty(count, *shape, device=device)
    normal, uniform = torch.empty(count, device=device), torch.empty(count, device=device)
    for number, position in enumerate(positions):
        generator.manual_seed(mixed_seed(seed, position))
        rows = slice(number * draws, (number + 1) * draws)
        noise[rows].normal_(generator=generator)
        normal[rows].normal_(generator=generator)
        uniform[rows].uniform_(generator=generator)
    return noise, normal, uniform


class FlowObjective:
    """Mean squared error of the velocity (METHOD: RAE, section 3) and its gradient, for global batches.

    A batch may go through in micro-batches and be spread over processes: the loss stays that of the whole batch.
    """

    def __init__(
        self,
        dit: DiT,
        normalizer: Normalizer,
        space: PictureSpace,
        config: GeneratorTrainConfig,
        precision: Precision,
        world: World = ALONE,
        engine: Engine | None = None,
    ) -> None:
        self.dit, self.normalizer, self.space, self.config = dit, normalizer, space, config
        self.precision: Precision = precision
        self.world, self.engine = world, engine or Engine(dit)
        self.device = space.model.device
        height, width = space.grid
        self.shift = token_shift(height * width, space.width)

    def backward(self, batch: Batch) -> dict[str, Tensor]:
        """Adds the loss's gradient to the parameters'; returns the global batch's losses, detached, on the device.

        "early" and "late" are the means over noisy (t > 1/2) and clean halves of the path.
        """
        size = len(batch.positions)
        step = self.config.micro_batch or size
        count = size * self.world.size * self.config.draws
        sums = torch.zeros(5, device=self.device)
        starts = range(0, size, step)
        for start in starts:
            run = partial(self._losses, batch, slice(start, start + step))
            objective, found = self.engine(lambda run=run: self._scaled(run(), count), last=start == starts[-1])
            objective.backward()
            sums += found
        self.engine.finish()
        total, early, early_count, late, late_count = self.world.all_reduce_sum(sums)
        return {
            "total": total / count,
            "early": early / early_count.clamp(min=1),
            "late": late / late_count.clamp(min=1),
        }

    def _scaled(self, found: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
        losses, times = found
        detached, noisy = losses.detach(), times > 0.5
        parts = [detached.sum(), detached[noisy].sum(), noisy.sum(), detached[~noisy].sum(), (~noisy).sum()]
        return losses.sum() / count, torch.stack([part.float() for part in parts])

    def _losses(self, batch: Batch, part: slice) -> tuple[Tensor, Tensor]:
        """Each sample's loss and time, `draws` of them for each of the batch's part."""
        config, positions = self.config, batch.positions[part]
        draws = config.draws
        with torch.no_grad(), autocast(self.device, self.precision):
            latents = None if batch.latents is None else batch.latents[part].to(self.device)
            pixels = None if latents is not None else batch.images[part].to(self.device)
            x = self.normalizer.normalize(self.space.encode(pixels, latents).float())
            condition = self._condition(batch, part)
        noise, normal, uniform = flow_draws(config.seed, positions, draws, x.shape[1:], self.device)
        times = training_times(normal, self.shift)
        if draws > 1:
            x = x.repeat_interleave(draws, dim=0)
            condition = condition.repeated(draws)
        condition = condition.nulled(uniform < config.generator.dropout)
        with autocast(self.device, self.precision):
            losses = velocity_loss(self.dit, x, noise, times, condition)
        return losses, times

    def _condition(self, batch: Batch, part: slice) -> Condition:
        if self.config.generator.condition == "class":
            numbers = class_numbers(batch.captions[part], self.config.generator, self.config.classes)
            return Condition(labels=numbers.to(self.device))
        return text_condition(self.space.model, batch.alt_ids[part])
