"""What a run costs on many devices, by arithmetic: hours, memory, and what goes over the network.

From the work of a sample (floating-point operations and bytes, counted) and a device's rates (given, not measured), as
`training/step.py`, `training/parallel.py` and `contrastive.py` do things:

- A step's products take FLOPs / (peak x efficiency), matrix products and convolutions (the frozen VAE and LPIPS) apart,
  or what the host needs to start the operations, whichever is longer.
- DDP sums 4 bytes a trained parameter once a step, while the last micro-batch's backward pass goes on: what takes
  longer than the trained parts' share of that pass is exposed, and the last bucket always is. FSDP gathers 4 bytes a
  parameter two or three times a micro-batch, beside the products, and reduces once a step.
- A ring among n devices carries (n - 1) / n of a tensor past each device to gather or to reduce-scatter it, and twice
  that to sum it. It leaves a node by all of its network cards, so a node's rate is that of its cards together.
- Features and logarithms of sums are gathered once a step, and nothing is computed meanwhile.

Not counted: norms, activations, softmax, and other work bound by the device's memory (the efficiencies stand for it),
slow processes that others wait for, checkpoints and evaluations.
"""

import math
from dataclasses import dataclass, replace

from openvision3.config import OpenVisionError, ParallelKind

STATE_BYTES = 16  # a trained parameter: weight, gradient and AdamW's two moments in fp32
UPDATE_BYTES = 40  # read and written of a trained parameter by AdamW (28) and by clipping (12)
BUCKET_BYTES = 25 * 2**20  # of gradients that DDP sums at once


@dataclass(frozen=True)
class Hardware:
    """A kind of device and how several are joined; rates in units a second. Efficiencies are assumptions."""

    name: str = "H100 SXM"
    flops: float = 989e12  # dense bf16 matrix products
    fp32_flops: float = 67e12
    memory: float = 80e9  # bytes
    memory_bandwidth: float = 3.35e12  # bytes
    per_node: int = 8  # devices
    link: float = 450e9  # bytes, of a device to the others of its node, one way (NVLink)
    network: float = 50e9  # bytes, of the network card beside each device, one way (400 Gb/s)
    matrix_efficiency: float = 0.40  # of `flops`, in transformer blocks
    convolution_efficiency: float = 0.30  # of `flops`, in the VAE: between convolutions it norms large maps
    bandwidth_efficiency: float = 0.80  # of link, network and memory
    latency: float = 10e-6  # seconds of a collective, for each doubling of the number of devices
    dispatch: float = 5e-6  # seconds of the host to start an operation
    usable_memory: float = 0.90  # the rest: kernels' work space, fragments, the driver
    pictures_per_core: float = 250.0  # a second, decoded and cropped (`ov3 bench data` measures it)

    def ring_rate(self, devices: int) -> float:
        """Bytes a second past each device of a ring."""
        links = self.link if devices <= self.per_node else min(self.link, self.network * self.per_node)
        return links * self.bandwidth_efficiency


H100 = Hardware()
RTX_4090 = Hardware("RTX 4090", 165e12, 82e12, 24e9, 1.0e12, 1, 32e9, 1.25e9)


@dataclass(frozen=True)
class Work:
    """What one sample asks for, in a stage of a recipe; `work_of` in benchmarks/scaling.py counts it."""

    batch: int  # global
    samples: int  # of the stage
    resolution: int  # pixels
    parameters: int  # trained
    largest_block: int  # its parameters
    outside_blocks: int  # trained parameters of no block
    frozen_bytes: float  # VAE
    embed_dim: int
    matrix_flops: float  # forward and backward, recomputed blocks included
    first_pass_flops: float  # of the features, where micro-batches need a pass of their own
    backward_flops: float  # of `matrix_flops`, what lies in the backward pass
    encoder_flops: float  # of the frozen VAE
    decoder_flops: float  # of the VAE's decoder and LPIPS with their input gradients, for each picture decoded
    latent_bytes: float  # of a sample's latents
    kept: float  # bytes of activations that a sample keeps for the backward pass, and those of a block made again
    decoded: float  # the same of the VAE's decoder, for each picture decoded
    operations: float  # that the host starts for the trained parts of a micro-batch
    vae_operations: float  # and for a group of pictures through the VAE


@dataclass(frozen=True)
class Plan:
    """How a stage is spread. `decode_batch`: pictures that the decoder keeps activations of at once (0: all)."""

    devices: int = 1
    micro_batch: int = 0  # samples; 0: all of a process
    parallel: ParallelKind = "ddp"
    pixel_stride: int = 1
    decode_batch: int = 16
    cached_latents: bool = False

    def local(self, work: Work) -> int:
        """Samples of a device in a step; raises `OpenVisionError` where the batch can't be shared equally."""
        if self.devices < 1 or work.batch % self.devices:
            raise OpenVisionError(f"a batch of {work.batch} can't be shared by {self.devices} devices equally")
        return work.batch // self.devices

    def passes(self, work: Work) -> tuple[int, int]:
        """Micro-batches of a step, and samples of each."""
        local = self.local(work)
        micro = min(self.micro_batch or local, local)
        return math.ceil(local / micro), micro


@dataclass(frozen=True)
class Step:
    """What a step of one device takes, in seconds and bytes."""

    matrix: float  # seconds of each, if all went well
    convolution: float
    host: float  # to start the operations, beside the two above
    contrastive: float
    optimizer: float
    gathers: float  # of features, exposed
    gather_bytes: float  # past each device
    reduction: float  # of gradients, and of parameters under FSDP
    reduction_bytes: float
    exposed: float  # of `reduction`

    @property
    def compute(self) -> float:
        return max(self.matrix + self.convolution, self.host)

    @property
    def seconds(self) -> float:
        return self.compute + self.contrastive + self.optimizer + self.gathers + self.exposed


def step(work: Work, plan: Plan, hardware: Hardware) -> Step:
    """Times and bytes of one step of a device."""
    local, (passes, micro) = plan.local(work), plan.passes(work)
    matrix_rate = hardware.flops * hardware.matrix_efficiency
    matrix = local * (work.matrix_flops + work.first_pass_flops * (passes > 1)) / matrix_rate
    convolutions = work.decoder_flops / plan.pixel_stride + work.encoder_flops * (not plan.cached_latents)
    memory_rate = hardware.memory_bandwidth * hardware.bandwidth_efficiency
    held = work.parameters / (plan.devices if plan.parallel == "fsdp" else 1)
    seconds, moved = features(work, plan, hardware)
    # logits forward, again, and times features, for two pairs of features in either direction
    contrastive = 24.0 * local * work.batch * work.embed_dim / (hardware.fp32_flops * hardware.matrix_efficiency)
    reduction, exposed, reduced = gradients(work, plan, hardware)
    return Step(
        matrix=matrix,
        convolution=local * convolutions / (hardware.flops * hardware.convolution_efficiency),
        host=hardware.dispatch * passes * _operations(work, plan, micro),
        contrastive=contrastive,
        optimizer=held * UPDATE_BYTES / memory_rate,
        gathers=seconds,
        gather_bytes=moved,
        reduction=reduction,
        reduction_bytes=reduced,
        exposed=exposed,
    )


def _operations(work: Work, plan: Plan, micro: int) -> float:
    pictures = math.ceil(micro / plan.pixel_stride)
    return work.operations + work.vae_operations * math.ceil(pictures / (plan.decode_batch or pictures))


def features(work: Work, plan: Plan, hardware: Hardware) -> tuple[float, float]:
    """Seconds and bytes of a step's gathers: the features of images and two texts, two sums a pair, in fp32."""
    n = plan.devices
    moved = 4.0 * work.batch * (3 * work.embed_dim + 2 * 2) * (n - 1) / n
    return moved / hardware.ring_rate(n) + 5 * _latency(n, hardware), moved


def gradients(work: Work, plan: Plan, hardware: Hardware) -> tuple[float, float, float]:
    """Seconds, exposed seconds and bytes of what a step exchanges of gradients and parameters."""
    n, rate, late = plan.devices, hardware.ring_rate(plan.devices), _latency(plan.devices, hardware)
    if n == 1:
        return 0.0, 0.0, 0.0
    passes, micro = plan.passes(work)
    once = 4.0 * work.parameters * (n - 1) / n  # bytes past a device to gather all parameters
    matrix_rate = hardware.flops * hardware.matrix_efficiency
    backward = micro * work.backward_flops / matrix_rate  # of the last micro-batch: only there gradients are exchanged
    bucket = min(BUCKET_BYTES, 4.0 * work.parameters) * 2 * (n - 1) / n / rate + late
    if plan.parallel == "ddp":
        seconds = 2 * once / rate + math.ceil(4 * work.parameters / BUCKET_BYTES) * late
        return seconds, max(seconds - backward, bucket), 2 * once
    gathers = passes * (3 if passes > 1 else 2)
    blocks = (work.parameters - work.outside_blocks) / work.largest_block + 1
    gathering, reducing = (times * (once / rate + blocks * late) for times in (gathers, 1))
    products = plan.local(work) * (work.matrix_flops + work.first_pass_flops * (passes > 1)) / matrix_rate
    first = passes * 4.0 * work.largest_block / rate  # nothing to compute until it is there
    exposed = max(gathering - products, first) + max(reducing - backward, bucket / 2)
    return gathering + reducing, exposed, (gathers + 1) * once


def _latency(devices: int, hardware: Hardware) -> float:
    return hardware.latency * math.log2(devices)


def static_bytes(work: Work, plan: Plan) -> float:
    """Memory that a device holds whatever the micro-batch."""
    passes, _ = plan.passes(work)
    held = STATE_BYTES * work.parameters + 2.0 * work.parameters  # and autocast's copies
    if plan.parallel == "fsdp":
        gathered = 6.0 * (2 * work.largest_block + work.outside_blocks)
        waiting = 4.0 * work.parameters * (passes > 1)  # whole gradients, until the last micro-batch
        held = STATE_BYTES * work.parameters / plan.devices + gathered + waiting
    pixels = 3.0 * work.resolution**2 / (plan.pixel_stride if plan.cached_latents else 1)
    waiting = plan.local(work) * (pixels + work.latent_bytes)
    everyone = 3 * 4.0 * work.batch * work.embed_dim
    return held + work.frozen_bytes + waiting + everyone


def memory(work: Work, plan: Plan) -> float:
    """Bytes of a device at its most: what is held, and the activations of a micro-batch."""
    _, micro = plan.passes(work)
    pictures = math.ceil(micro / plan.pixel_stride)
    return static_bytes(work, plan) + micro * work.kept + work.decoded * min(plan.decode_batch or pictures, pictures)


def largest_micro_batch(work: Work, plan: Plan, hardware: Hardware) -> int:
    """Samples that a device can take through the model at once; 0 where not even one fits."""
    free = hardware.memory * hardware.usable_memory - static_bytes(work, plan)
    if not plan.decode_batch:
        return max(0, int(free // (work.kept + work.decoded / plan.pixel_stride)))
    few = int(free // (work.kept + work.decoded / plan.pixel_stride))
    many = int((free - work.decoded * plan.decode_batch) // work.kept)
    return max(0, few if few <= plan.decode_batch * plan.pixel_stride else many)


def hours(work: Work, plan: Plan, hardware: Hardware) -> float:
    """Time of the stage."""
    return math.ceil(work.samples / work.batch) * step(work, plan, hardware).seconds / 3600


def cores(work: Work, plan: Plan, hardware: Hardware) -> float:
    """Processor cores for each device that decode and crop its pictures."""
    rate = plan.local(work) / step(work, plan, hardware).seconds  # samples a second
    pictures = 1 / plan.pixel_stride if plan.cached_latents else 1.0
    return rate * pictures / hardware.pictures_per_core


def efficiency(work: Work, plan: Plan, hardware: Hardware) -> float:
    """Seconds of the products alone, over the step's: 1 where more devices cost nothing."""
    alone = replace(plan, devices=1)
    return step(work, alone, hardware).seconds / (plan.devices * step(work, plan, hardware).seconds)


def most_devices(work: Work, plan: Plan, hardware: Hardware, least: float) -> int:
    """The largest power of two of devices, a sample each at least, whose `efficiency` is `least` or more."""
    found = 1
    for power in range(work.batch.bit_length()):
        if work.batch % 2**power == 0 and efficiency(work, replace(plan, devices=2**power), hardware) >= least:
            found = 2**power
    return found
