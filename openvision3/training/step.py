"""The losses of one global batch and their gradient (OpenVision 3, Eqs. 3-6).

A batch may go through the model in micro-batches; the losses stay those of the whole batch. Sums are divided by the
whole batch's counts, the noise of a sample depends on its position alone, and the contrastive loss, which compares
every image with every text, takes two passes: the first collects the features of all samples without a graph, the loss
gives the gradient of each feature, and the second pass carries it on into the towers. So may it be spread over
processes (`World`): each has the losses' shares of its own samples, and exchanges features and counts.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from openvision3 import losses
from openvision3.chunked import at_least_fp32
from openvision3.config import LossConfig, ModelPart
from openvision3.contrastive import Everyone, contrastive_loss, sigmoid_loss
from openvision3.data.batches import Batch
from openvision3.distributed import ALONE, World
from openvision3.evaluation.perceptual import Perceptual
from openvision3.model.openvision3 import OpenVision3
from openvision3.model.packing import Packing, up_to_last
from openvision3.training.decoded import DecodedLosses, encode_pixels, pictures_at_once, to_images
from openvision3.training.frozen import trained_losses
from openvision3.training.noise import draw_noise
from openvision3.training.parallel import Engine
from openvision3.training.precision import Precision, autocast
from openvision3.vae import FrozenVAE

Losses = dict[str, Tensor]  # by part, scalars

# On a device, rows and columns of packed texts come in multiples of this: a shape that changes costs more than padding.
DEVICE_MULTIPLE = 64


@dataclass(frozen=True)
class MicroBatch:
    """Consecutive samples of a batch, on the device."""

    start: int  # of its first sample, within the global batch
    positions: list[int]  # within the run, which the noise depends on
    pixels: Tensor  # uint8 (M, 3, R, R): a quarter of the images' memory, where the whole batch waits
    latents: Tensor | None  # (M, C, h, w) scaled VAE latents; None where neither model nor loss has a use for them
    alt_ids: Tensor  # (M, Lc)
    caption_text_ids: Tensor  # (M, Lc)
    caption_ids: Tensor  # (M, Ld)
    dtype: torch.dtype  # of the weights
    cached: bool  # the latents came with the batch, and `pixels` are only those that are compared: (P, 3, R, R)
    packed_texts: Packing | None = None  # of alt_ids and caption_text_ids, one after the other
    packed_captions: Packing | None = None  # of the targets, caption_ids[:, 1:]

    @property
    def images(self) -> Tensor:
        """The pixels in [-1, 1]."""
        return to_images(self.pixels, self.dtype)


@dataclass(frozen=True)
class Counts:
    """Denominators of the global batch's means."""

    samples: int
    compared: int  # pictures whose pixels are decoded and compared
    target_tokens: Tensor | int  # caption tokens to predict


@dataclass(frozen=True)
class Features:
    """What the contrastive loss compares: (M, E) each, L2-normalised, fp32 at least."""

    image: Tensor
    alt: Tensor
    caption_text: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.image, self.alt, self.caption_text


class Objective:
    """Eq. 6 of a model, and its gradient, for global batches.

    `lpips_weight` is the stage's lambda, and `perceptual` LPIPS on the model's device (None where lambda is 0). `seed`
    is the noise's. `micro_batch` is the number of samples a forward pass (0: all of this process). Losses of `frozen`
    parts alone are left out, and a frozen encoder runs without a graph. `vae_batch` is the number of pictures that go
    through the frozen VAE (and LPIPS) at once (0: as suits the device). `pack_text` leaves padding out of the text
    towers. `engine` runs the model's passes, and sums the gradients of the processes that share the batch, `world`;
    without, each has its share of them.
    """

    def __init__(
        self,
        model: OpenVision3,
        config: LossConfig,
        lpips_weight: float = 0.0,
        perceptual: Perceptual | None = None,
        *,
        seed: int = 0,
        micro_batch: int = 0,
        vae_batch: int = 0,
        pack_text: bool = True,
        precision: Precision = "fp32",
        frozen: Collection[ModelPart] = (),
        world: World = ALONE,
        engine: Engine | None = None,
    ) -> None:
        assert (perceptual is None) == (lpips_weight == 0)
        wants_bias = model.text_encoder is not None and config.contrastive == "sigmoid"
        assert wants_bias == (model.logit_bias is not None), "a model has a logit_bias for the sigmoid loss alone"
        self.model, self.config, self.lpips_weight, self.perceptual = model, config, lpips_weight, perceptual
        self.seed, self.micro_batch, self.vae_batch, self.pack_text = seed, micro_batch, vae_batch, pack_text
        self.precision: Precision = precision
        self.world, self.engine = world, engine or Engine(model)
        self.device, self.dtype = model.device, model.logit_scale.dtype
        self.trained, self.encoder_frozen = trained_losses(model.config, frozen), "encoder" in frozen

    def backward(self, batch: Batch) -> Losses:
        """Adds the gradient of Eq. 6 over `batch` to the parameters' `.grad`; records the tokens' rms in the model.

        `batch` is this process's part of the global batch, of the same size in each process. The gradients are summed
        over the processes where there is an engine that does so.

        Returns every loss of the global batch by part, and temperature and rms, as detached scalars on the device:
        nothing waits for it.
        """
        counts = self._counts(batch)
        parts = list(self._micro_batches(batch))
        one = len(parts) == 1
        found = self._backward_whole(parts[0], counts) if one else self._backward_parts(parts, counts)
        self.engine.finish()
        with torch.no_grad():
            found = self._summed(found)
            summary = self._combine(found)
            found.pop("pictures", None)  # pixel_l1 and lpips are its parts
        record = {"temperature": self.model.temperature(), "token_rms": self.model.token_rms}
        if self.model.logit_bias is not None:
            record["logit_bias"] = self.model.logit_bias
        return {name: value.detach().clone() for name, value in {**found, **summary, **record}.items()}

    def by_tokens(self, batch: Batch) -> tuple[Losses, Losses]:
        """The losses of `batch`, and the gradients of "reconstruction" and "understanding" by its tokens (B, N, D).

        A loss that the model has no parts for has no gradient. For one process; nothing is recorded or changed.
        """
        assert self.world.size == 1 and not self.micro_batch and self.config.detach == "none"
        counts = self._counts(batch)
        (part,) = self._micro_batches(batch)
        with torch.no_grad(), autocast(self.device, self.precision):
            tokens = self._encode(part)
        tokens = tokens.detach().requires_grad_()
        with autocast(self.device, self.precision):
            found = self._sample_losses(part, tokens, losses.mean_square(tokens).sqrt(), counts)
            features = self._features(part, tokens)
        found |= self._contrastive(features)
        combined = self._combine(found)
        gradients = {
            name: torch.autograd.grad(combined[name], tokens)[0]
            for name in ("reconstruction", "understanding")
            if combined[name].requires_grad
        }
        found.pop("pictures", None)
        return {name: value.detach() for name, value in (found | combined).items()}, gradients

    def _backward_whole(self, batch: MicroBatch, counts: Counts) -> Losses:
        def run() -> tuple[Tensor, Losses]:
            with autocast(self.device, self.precision):
                tokens = self._encode(batch)
                rms = self._record_rms(losses.mean_square(tokens) / self.world.size)
                found = self._sample_losses(batch, tokens, rms, counts)
                features = self._features(batch, tokens)
            found |= self._contrastive(features)
            return self._combine(found)["total"], found

        total, found = self.engine(run)
        total.backward()
        return found

    def _backward_parts(self, parts: list[MicroBatch], counts: Counts) -> Losses:
        mean_square = torch.zeros((), device=self.device, dtype=self.dtype)
        collected: list[Features] = []

        def first_pass(part: MicroBatch) -> None:
            tokens = self._encode(part)
            mean_square.add_(losses.mean_square(tokens) * (len(tokens) / counts.samples))
            if (features := self._features(part, tokens)) is not None:
                collected.append(features)

        def second_pass(part: MicroBatch, number: int) -> tuple[Tensor, Losses]:
            with autocast(self.device, self.precision):
                tokens = self._encode(part)
                shares = self._sample_losses(part, tokens, rms, counts)
                features = self._features(part, tokens)
            objective = self._combine(shares)["total"]
            if features is not None:
                pairs = zip(features.tensors(), gradients[number], strict=True)
                objective = objective + sum((feature * gradient).sum() for feature, gradient in pairs)
            return objective, shares

        for part in parts:
            # A cast made by autocast without a graph must not be reused with one: each pass has its own context.
            with torch.no_grad(), autocast(self.device, self.precision):
                self.engine(partial(first_pass, part), last=False)
        rms = self._record_rms(mean_square)
        found, gradients = self._contrastive_gradients(collected)
        for number, part in enumerate(parts):
            objective, shares = self.engine(partial(second_pass, part, number), last=number == len(parts) - 1)
            objective.backward()
            for name, value in shares.items():
                found[name] = found.get(name, 0) + value.detach()
        return found

    def _contrastive_gradients(self, collected: list[Features]) -> tuple[Losses, list[tuple[Tensor, ...]]]:
        """This process's share of the contrastive loss, and Eq. 6's gradient by each micro-batch's features.

        The gradients of temperature and bias are added to the parameters here, once.
        """
        if not collected:
            return {}, []
        columns = zip(*(features.tensors() for features in collected), strict=True)
        leaves = [torch.cat(column).requires_grad_() for column in columns]
        found = self._contrastive(Features(*leaves))
        self._combine(found)["total"].backward()
        sizes = [len(features.image) for features in collected]
        gradients = [leaf.grad.split(sizes) for leaf in leaves if leaf.grad is not None]
        assert len(gradients) == len(leaves)
        return {name: value.detach() for name, value in found.items()}, list(zip(*gradients, strict=True))

    def _counts(self, batch: Batch) -> Counts:
        samples, targets = len(batch.positions) * self.world.size, 0
        if "caption" in self.trained and self.model.config.text_decoder is not None:
            targets = (batch.caption_ids[:, 1:] != self.model.config.text_decoder.pad_id).sum()
            targets = self.world.all_reduce_sum(self._to_device(targets))
        return Counts(samples, len(range(0, samples, self.config.pixel_stride)), targets)

    def _micro_batches(self, batch: Batch) -> Iterator[MicroBatch]:
        samples = len(batch.positions)
        size, first = self.micro_batch or samples, self.world.rank * samples
        for start in range(0, samples, size):
            part = slice(start, start + size)
            images = batch.images[part if batch.latents is None else self._compared(first, start, start + size)]
            pixels, alt_ids, caption_text_ids, caption_ids = (
                self._to_device(tensor)
                for tensor in (images, batch.alt_ids[part], batch.caption_text_ids[part], batch.caption_ids[part])
            )
            positions, cached = batch.positions[part], batch.latents is not None
            micro = MicroBatch(
                first + start, positions, pixels, None, alt_ids, caption_text_ids, caption_ids, self.dtype, cached
            )
            if self.pack_text:
                texts = torch.cat([batch.alt_ids[part], batch.caption_text_ids[part]])
                micro = self._packed(micro, texts, batch.caption_ids[part, 1:])
            if batch.latents is not None:
                micro = replace(micro, latents=at_least_fp32(self._to_device(batch.latents[part]).to(self.dtype)))
            elif self.model.config.input == "latents" and (self._reads_latents or "reconstruction" in self.trained):
                with autocast(self.device, self.precision):
                    latents = encode_pixels(self._vae, micro.pixels, self.dtype, self._at_once(micro))
                micro = replace(micro, latents=latents)
            yield micro

    def _packed(self, batch: MicroBatch, texts: Tensor, targets: Tensor) -> MicroBatch:
        """With the packings of texts and captions, made on the host from ids that are there."""
        config = self.model.config
        multiple = 1 if self.device.type == "cpu" else DEVICE_MULTIPLE
        if "contrastive" in self.trained and config.text_encoder is not None:
            packing = Packing.of(texts != config.text_encoder.pad_id, multiple)
            batch = replace(batch, packed_texts=packing.to(self.device))
        if "caption" in self.trained and config.text_decoder is not None:
            packing = Packing.of(up_to_last(targets != config.text_decoder.pad_id), multiple)
            batch = replace(batch, packed_captions=packing.to(self.device))
        return batch

    def _compared(self, first: int, start: int, stop: int) -> slice:
        """Of the compared samples of this process, whose first is `first` in the global batch: those in start:stop."""
        before = [-(-(first + at) // self.config.pixel_stride) for at in (0, start, stop)]
        return slice(before[1] - before[0], before[2] - before[0])

    def _to_device(self, tensor: Tensor) -> Tensor:
        pinned = tensor.pin_memory() if self.device.type == "cuda" else tensor  # else the copy would wait
        return pinned.to(self.device, non_blocking=True)

    def _at_once(self, batch: MicroBatch) -> int:
        return pictures_at_once(self._vae, self.device, batch.pixels.shape[-1], self.vae_batch)

    @property
    def _vae(self) -> FrozenVAE:
        assert self.model.vae is not None
        return self.model.vae

    @property
    def _reads_latents(self) -> bool:
        return self.model.config.input == "latents" and self.model.config.external is None

    def _encode(self, batch: MicroBatch) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.encoder_frozen):
            if self._reads_latents:
                assert batch.latents is not None
                return self.model.encode_latents(batch.latents)
            return self.model.encode(batch.images)

    def _record_rms(self, share: Tensor) -> Tensor:
        """The rms of the global batch's tokens, from this process's share of their mean square.

        It is kept in the model, for those who add noise later.
        """
        rms = self.world.all_reduce_sum(share).sqrt()
        self.model.token_rms.copy_(rms)
        return rms

    def _features(self, batch: MicroBatch, tokens: Tensor) -> Features | None:
        if "contrastive" not in self.trained:
            return None
        texts = self.model.embed_text_ids(torch.cat([batch.alt_ids, batch.caption_text_ids]), batch.packed_texts)
        alt, caption_text = at_least_fp32(texts).chunk(2)
        return Features(at_least_fp32(self.model.pool(self._seen_by("understanding", tokens))), alt, caption_text)

    def _contrastive(self, features: Features | None) -> Losses:
        """Mean of the losses against an image's two texts (OpenVision 1), in fp32 at least."""
        if features is None:
            return {}
        image, *texts = features.tensors()
        all_images, temperature, bias = self.world.all_gather(image), self.model.temperature(), self.model.logit_bias
        pair: list[Tensor] = []
        for text in texts:
            everyone = Everyone(all_images, self.world.all_gather(text))
            if bias is None:
                pair.append(contrastive_loss(image, text, temperature, self.world, everyone))
            else:
                pair.append(sigmoid_loss(image, text, temperature, bias, self.world, everyone))
        return {"contrastive": torch.stack(pair).mean()}

    def _sample_losses(self, batch: MicroBatch, tokens: Tensor, rms: Tensor, counts: Counts) -> Losses:
        """This micro-batch's share of the whole batch's reconstruction and caption losses."""
        found: Losses = {}
        if "reconstruction" in self.trained:
            found |= self._reconstruction(batch, tokens, rms, counts)
        if "caption" in self.trained and self.model.config.text_decoder is not None:
            seen = self._seen_by("understanding", tokens)
            found["caption"] = self.model.caption_loss(
                seen, batch.caption_ids, counts.target_tokens, batch.packed_captions
            )
        return found

    def _seen_by(self, loss: str, tokens: Tensor) -> Tensor:
        """The tokens as a loss gets them: without a gradient where it is only a probe."""
        return tokens.detach() if self.config.detach in (loss, "both") else tokens

    def _reconstruction(self, batch: MicroBatch, tokens: Tensor, rms: Tensor, counts: Counts) -> Losses:
        """Eq. 4's parts, from noisy tokens; pixels of every n-th sample of the whole batch, not of each micro-batch."""
        model, found, stride = self.model, {}, self.config.pixel_stride
        tokens = self._seen_by("reconstruction", tokens)
        sigma, epsilon = draw_noise(self.seed, batch.positions, tokens.shape[1:], model.config.noise_tau, self.device)
        noisy = losses.add_noise(tokens, sigma, epsilon, rms if model.config.noise_relative else 1.0)
        chosen = slice(-batch.start % stride, None, stride)
        pixels = batch.pixels if batch.cached else batch.pixels[chosen]
        if batch.latents is None:  # a model of pixels
            images, images_hat = to_images(pixels, self.dtype), model.decode(noisy)[chosen]
            found["pixel_l1"], lpips = losses.pixel_l1(images_hat, images, counts.compared), None
            if self.perceptual is not None:  # every process names the same losses, also where it scores no pixels
                lpips = torch.zeros((), dtype=self.dtype, device=self.device)
                if len(images):
                    lpips = losses.perceptual_loss(self.perceptual, images_hat, images, counts.compared)
                found["lpips"] = lpips
            found["pictures"] = losses.picture_loss(found["pixel_l1"], lpips, self.lpips_weight)
            return found
        latents_hat, at_once = model.decode_latents(noisy), self._at_once(batch)
        found["latent_l1"] = losses.latent_l1(latents_hat, batch.latents, counts.samples)
        found["pictures"], found["pixel_l1"], lpips = DecodedLosses.apply(
            latents_hat[chosen], pixels, self._vae, self.perceptual, self.lpips_weight, counts.compared, at_once
        )
        if self.perceptual is not None:
            found["lpips"] = lpips
        return found

    def _summed(self, found: Losses) -> Losses:
        """The losses of the global batch from this process's shares."""
        total = self.world.all_reduce_sum(torch.stack(list(found.values())))
        return dict(zip(found, total.unbind(), strict=True))

    def _combine(self, found: Losses) -> Losses:
        """Eqs. 4-6 over whichever parts are there."""
        config, zero = self.config, torch.zeros((), device=self.device)
        pictures, latent, caption, contrastive = (
            found.get(name, zero) for name in ("pictures", "latent_l1", "caption", "contrastive")
        )
        reconstruction = losses.reconstruction_loss(pictures, latent, config.beta)
        understanding = losses.understanding_loss(caption, contrastive, config.alpha)
        total = losses.total_loss(reconstruction, understanding, config.omega_rec, config.omega_und)
        return {"reconstruction": reconstruction, "understanding": understanding, "total": total}
