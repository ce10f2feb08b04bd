"""`ov3 bench encode`: speed of encoding and of writing captions, beside what others' public code does."""

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from openvision3.commands import common
from openvision3.commands.batching import OutputOptions, checked_size
from openvision3.config import OpenVisionError, TextDecoderConfig

if TYPE_CHECKING:
    from openvision3.bench.captions import CaptionFigures
    from openvision3.bench.encoding import EncodingFigures

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
Output = Annotated[OutputOptions, tyro.conf.arg(name=""), tyro.conf.FlagCreatePairsOff]


def bench_encode(
    model: str | None = None,
    size: int = 256,
    batch_size: int = 4,
    rounds: int = 5,
    device: str = "auto",
    compile: Flag = False,
    captions: Flag = False,
    length: int = 64,
    dtype: Literal["fp32", "bf16"] = "fp32",
    seed: int = 0,
    output: Output = OutputOptions(),
) -> int:
    """Times pictures to tokens against the published path (diffusers' autoencoder, open_clip's tower), in turns.

    Same weights, same pictures, fp32 and bf16; how far the tokens are apart is printed beside. With --captions it times
    greedy captions against transformers' `generate` instead, on a decoder of the same size and weights.

    Args:
        model: a model folder or hub id; by default a ViT-B as released behind a VAE of FLUX.1's size, random weights.
        size: side of the square pictures, pixels; with --captions it sets the number of image tokens.
        batch_size: pictures, or captions, at once.
        rounds: turns of each that count.
        device: where all runs.
        compile: compile our side, by torch.compile.
        captions: captions instead of encoding.
        length: with --captions: tokens of a caption, with [bos].
        dtype: with --captions: weights and arithmetic.
        seed: of weights and pictures.
    """
    import torch

    from openvision3.bench.timing import machine
    from openvision3.training.precision import resolve_device

    if min(batch_size, rounds) < 1:
        raise OpenVisionError(f"--batch-size and --rounds must be at least 1, got {batch_size} and {rounds}")
    common.refuse_existing(output.json, output.overwrite)
    place = resolve_device(device)
    found: CaptionFigures | EncodingFigures
    if captions:
        from openvision3.bench.captions import measure_captions

        config, tokens = _decoder(model), max(1, (size // 16) ** 2)
        if not 2 <= length <= config.context_length:
            raise OpenVisionError(f"--length {length}: expected from 2 to the context length {config.context_length}")
        precision = torch.bfloat16 if dtype == "bf16" else torch.float32
        found = measure_captions(config, place, tokens, batch_size, length, rounds, precision, compile, seed, _say)
        _show_captions(found, dtype)
    else:
        from openvision3.bench.encoding import measure_encoding, released_like_model

        loaded = released_like_model(image_size=size, seed=seed) if model is None else _load(model, size)
        checked_size(loaded, size)
        found = measure_encoding(loaded, place, size, batch_size, rounds, compile, seed, _say)
        _show_encoding(found)
    print(machine(place))
    options = {"model": model, "device": str(place), "compile": compile, "dtype": dtype, "seed": seed}
    common.write_json(output.json, {"machine": machine(place), **options, **asdict(found)}, output.overwrite)
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _load(name: str, size: int) -> Any:
    import openvision3

    loaded = openvision3.load(name, device="cpu")
    if loaded.config.image_size != size:
        raise OpenVisionError(f"--size {size}: open_clip's tower takes the model's {loaded.config.image_size} px alone")
    return loaded


def _decoder(model: str | None) -> TextDecoderConfig:
    if model is None:
        return TextDecoderConfig()
    import openvision3

    loaded = openvision3.load(model, vae=None, device="cpu")
    if loaded.config.text_decoder is None:
        raise OpenVisionError(f"model {model!r} has no text decoder")
    return loaded.config.text_decoder


def _show_encoding(found: "EncodingFigures") -> None:
    rows = []
    for name, seconds in found.seconds.items():
        matrix = found.limits[name.split()[1]]["matrix product"].median
        rate = found.flop_rate(name)
        rows.append((name, str(seconds), found.rate(name), rate / 1e9, f"{100 * rate / matrix:.0f} %"))
    title = f"{found.size} px, batch {found.batch_size}, {found.flops / 1e9:.0f} GFLOPs a picture"
    common.print_table(title, ("path", "seconds a batch", "pictures/s", "GFLOP/s", "of a matrix product's"), rows)
    common.print_table(
        "published over ours, by rounds", ("", "ratio"), [(name, str(value)) for name, value in found.ratios.items()]
    )
    common.print_table(
        "difference of the tokens",
        ("", "largest", "mean", "tokens' rms", "mean cosine", "lowest"),
        [
            (name, d.largest, d.mean, d.rms, f"{d.cosine:.6f}", f"{d.lowest_cosine:.6f}")
            for name, d in found.differences.items()
        ],
    )


def _show_captions(found: "CaptionFigures", dtype: str) -> None:
    title = f"greedy, {found.batch_size} captions of {found.length} tokens, {found.image_tokens} image tokens, {dtype}"
    common.print_table(
        title,
        ("decoder", "parameters", "seconds a batch", "tokens/s"),
        [
            (name, f"{found.parameters[name.split(',')[0]]:,}", str(seconds), found.rate(name))
            for name, seconds in found.seconds.items()
        ],
    )
    print(f"{found.compared} over ours: {found.ratio}; {100 * found.same_ids:.1f} % of ids are the same")
    if found.refused:
        print(f"transformers' static cache could not be used: {found.refused}")
