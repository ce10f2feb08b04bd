"""The arithmetic of cost on many devices, by hand."""

from dataclasses import replace

import pytest

from openvision3.bench.scaling import (
    Hardware,
    Plan,
    Work,
    cores,
    efficiency,
    features,
    gradients,
    hours,
    largest_micro_batch,
    memory,
    most_devices,
    static_bytes,
    step,
)
from openvision3.config import OpenVisionError

# Round numbers: a product of 1e12 FLOPs takes a second, and 100 bytes pass a device in one, 40 between nodes.
HARDWARE = Hardware(
    flops=2e12,
    fp32_flops=1e15,
    memory=1000.0,
    memory_bandwidth=1e6,
    per_node=4,
    link=100.0,
    network=10.0,
    matrix_efficiency=0.5,
    convolution_efficiency=0.25,
    bandwidth_efficiency=1.0,
    latency=0.0,
    dispatch=0.0,
    usable_memory=0.9,
    pictures_per_core=2.0,
)
WORK = Work(
    batch=8,
    samples=80,
    resolution=0,
    parameters=10,
    largest_block=2,
    outside_blocks=4,
    frozen_bytes=7.0,
    embed_dim=0,
    matrix_flops=9e12,
    first_pass_flops=1e12,
    backward_flops=6e12,
    encoder_flops=1e12,
    decoder_flops=4e12,
    latent_bytes=0.0,
    kept=10.0,
    decoded=50.0,
    operations=100.0,
    vae_operations=10.0,
)


def test_products_and_the_pass_for_features() -> None:
    whole = step(WORK, Plan(devices=1), HARDWARE)
    assert (whole.matrix, whole.convolution) == (8 * 9, 8 * (1 + 4) * 2)  # convolutions at half the rate
    assert whole.reduction == whole.gathers == whole.exposed == 0
    parts = step(WORK, Plan(devices=1, micro_batch=2, pixel_stride=4, cached_latents=True), HARDWARE)
    assert (parts.matrix, parts.convolution) == (8 * 10, 8 * 4 / 4 * 2)
    assert Plan(devices=2, micro_batch=3).passes(WORK) == (2, 3)
    assert Plan(devices=4, micro_batch=3).passes(WORK) == (1, 2)
    assert hours(WORK, Plan(), HARDWARE) == pytest.approx(10 * whole.seconds / 3600)
    with pytest.raises(OpenVisionError, match="8 can't be shared by 3"):
        step(WORK, Plan(devices=3), HARDWARE)


def test_the_host_can_be_slower_than_the_device() -> None:
    slow = replace(HARDWARE, dispatch=1.0)
    found = step(WORK, Plan(devices=1, micro_batch=4, decode_batch=2), slow)
    assert found.host == 2 * (100 + 10 * 2) and found.compute == found.host > found.matrix + found.convolution
    assert step(WORK, Plan(devices=1, decode_batch=0), slow).host == 110


def test_sums_of_gradients_ring_by_ring() -> None:
    # 40 bytes of gradients: twice 3/4 of them past each of four devices
    seconds, exposed, moved = gradients(WORK, Plan(devices=4), HARDWARE)
    assert (seconds, moved) == (0.6, 60) and exposed == 0.6  # one bucket: nothing hides it
    # between nodes a ring leaves by all four cards: 40 bytes a second
    assert gradients(WORK, Plan(devices=8), HARDWARE)[0] == pytest.approx(2 * 40 * 7 / 8 / 40)
    assert HARDWARE.ring_rate(4) == 100 and HARDWARE.ring_rate(8) == 40
    large = replace(WORK, parameters=100 * 2**20, backward_flops=0.0)  # 16 buckets, and nothing beside them
    seconds, exposed, _ = gradients(large, Plan(devices=2), replace(HARDWARE, latency=2.0))
    assert seconds == exposed == pytest.approx(400 * 2**20 / 100 + 16 * 2)
    hidden = gradients(replace(large, backward_flops=1e30), Plan(devices=2), HARDWARE)
    assert hidden[1] == 25 * 2**20 / 100  # the last bucket
    short = gradients(replace(large, backward_flops=1e18), Plan(devices=2, micro_batch=2), HARDWARE)
    assert short[1] == pytest.approx(short[0] - 2e6)  # the last micro-batch alone hides it


def test_sharded_parameters_are_gathered_in_each_pass() -> None:
    once = 40 * 3 / 4
    assert gradients(WORK, Plan(devices=4, parallel="fsdp"), HARDWARE)[2] == 3 * once
    assert gradients(WORK, Plan(devices=4, parallel="fsdp", micro_batch=1), HARDWARE)[2] == (2 * 3 + 1) * once
    # state in quarters, two blocks and the rest gathered in fp32 and bf16; whole gradients between micro-batches
    assert static_bytes(WORK, Plan(devices=4, parallel="fsdp")) == 40 + 6 * 8 + 7
    assert static_bytes(WORK, Plan(devices=4, parallel="fsdp", micro_batch=1)) == 40 + 6 * 8 + 40 + 7


def test_features_of_the_global_batch() -> None:
    wide = replace(WORK, embed_dim=5)
    seconds, moved = features(wide, Plan(devices=4), HARDWARE)
    assert moved == 8 * (3 * 5 + 4) * 4 * 3 / 4 and seconds == moved / 100
    assert features(wide, Plan(devices=1), HARDWARE) == (0, 0)
    assert features(wide, Plan(devices=4), replace(HARDWARE, latency=1.0))[0] == moved / 100 + 5 * 2


def test_memory_of_few_decoded_pictures() -> None:
    held = 10 * 18 + 7
    assert memory(WORK, Plan(devices=1, decode_batch=0)) == held + 8 * 10 + 8 * 50
    assert memory(WORK, Plan(devices=1, decode_batch=2)) == held + 8 * 10 + 2 * 50
    assert memory(WORK, Plan(devices=1, decode_batch=0, micro_batch=4, pixel_stride=2)) == held + 4 * 10 + 2 * 50
    latents = replace(WORK, latent_bytes=3.0, resolution=1)
    assert static_bytes(latents, Plan(devices=2)) == held + 4 * (3 + 3)
    free = 900 - held  # 713
    assert largest_micro_batch(WORK, Plan(decode_batch=0), HARDWARE) == free // 60 == 11
    assert largest_micro_batch(WORK, Plan(decode_batch=4), HARDWARE) == (free - 200) // 10 == 51
    assert largest_micro_batch(WORK, Plan(decode_batch=14), HARDWARE) == 11  # never more than it would decode at once
    assert largest_micro_batch(replace(WORK, parameters=100), Plan(), HARDWARE) == 0


def test_cores_and_where_it_stops() -> None:
    rate = 8 / step(WORK, Plan(), HARDWARE).seconds
    assert cores(WORK, Plan(), HARDWARE) == rate / 2
    few = Plan(pixel_stride=4, cached_latents=True)  # a picture in four is decoded
    assert cores(WORK, few, HARDWARE) == pytest.approx(8 / step(WORK, few, HARDWARE).seconds / 4 / 2)
    fast = replace(HARDWARE, link=1e30, network=1e30, memory_bandwidth=1e30)
    assert efficiency(WORK, Plan(devices=8), fast) == pytest.approx(1)
    assert most_devices(WORK, Plan(), fast, 0.99) == 8  # a sample each
    slow = replace(fast, network=1e-3)  # a whole node, and no further
    assert most_devices(WORK, Plan(), slow, 0.5) == 4
