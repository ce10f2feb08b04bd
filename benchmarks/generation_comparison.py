"""The paper's comparison of generation, at laptop size: what a generator is trained on, all else equal.

    python benchmarks/generation_comparison.py WORK [--encoder-samples N] [--generator-samples N] [--dry-run]

Four arms, each with the same generator, steps, prompts and evaluation (`generation_quality.py`, three seeds of the
sampler, one of training):

- unified: tokens of an encoder trained by the recipe `demo`, shortened;
- understanding: tokens of one trained by the understanding losses alone, with a decoder trained afterwards on its
  frozen tokens, as RAE does;
- latents: the VAE's latents in patches, without an encoder;
- pixels: tokens of one that reads pixels in place of latents, trained as the first.

Every step is a command of `ov3`, printed before it runs; the same command goes on where it was stopped. Hours.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

ARMS = ("unified", "understanding", "latents", "pixels")
SEEDS = ("0", "1", "2")


def encoder_commands(work: Path, samples: int) -> list[list[str]]:
    """The encoders: a fifth of the scenes large at 64 px, the rest at 128, as the recipe has it."""
    first = samples * 4 // 15
    length = ["--stage1.samples", str(first), "--stage2.samples", str(samples - first)]
    length += ["--stage1.warmup-samples", "1600", "--stage2.warmup-samples", "1600", "--eval-every", "0"]
    pixels = ["--model.input", "pixels", "--model.patch-size", "16", "--model.in-channels", "3"]
    alone = ["--model.decoder", "none", "--stage2.lpips-weight", "0"]
    decoder = ["--init", str(work / "understanding" / "model"), "--stage1.samples", str(samples // 2)]
    decoder += ["--stage2.samples", str(samples // 8), "--eval-every", "0", "--loss.pixel-stride", "16"]
    return [
        ["train", "demo", "--out", str(work / "unified"), *length],
        ["train", "demo", "--out", str(work / "understanding"), *alone, *length],
        ["train", "attach_decoder", "--out", str(work / "understanding-decoder"), *decoder],
        ["train", "demo", "--out", str(work / "pixels"), *pixels, *length],
    ]


def generator_commands(work: Path, samples: int) -> list[list[str]]:
    """The generators, alike but for what they read."""
    models = {"unified": "unified", "understanding": "understanding-decoder", "latents": "unified", "pixels": "pixels"}
    length = ["--samples", str(samples), "--decay-samples", str(samples // 3)]
    return [
        ["generate", "train", "demo_generator", "--out", str(work / f"generator-{arm}"), *length]
        + ["--model", str(work / models[arm] / "model"), "--space", "latents" if arm == "latents" else "tokens"]
        for arm in ARMS
    ]


def main() -> None:
    """Runs what is not done yet, then measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--encoder-samples", type=int, default=60_000)
    parser.add_argument("--generator-samples", type=int, default=36_000)
    parser.add_argument("--num", type=int, default=1000)
    parser.add_argument("--dry-run", action="store_true", help="check every recipe and print its commands alone")
    options = parser.parse_args()
    ov3 = [sys.executable, "-m", "openvision3"]
    encoders = encoder_commands(options.work, options.encoder_samples)
    generators = generator_commands(options.work, options.generator_samples)
    for command in [*encoders, *generators]:
        if options.dry_run and "--init" in command:
            continue  # what it starts from is not there yet
        run([*ov3, *command, *(["--dry-run"] if options.dry_run else [])], quiet=options.dry_run)
    measure = [str(Path(__file__).with_name("generation_quality.py")), str(options.work / "measured")]
    measure += [str(options.work / f"generator-{arm}") for arm in ARMS]
    measure += ["--seeds", *SEEDS, "--num", str(options.num), "--json", str(options.work / "figures.json")]
    if not options.dry_run:
        run([sys.executable, *measure])


def run(command: list[str], quiet: bool = False) -> None:
    """Prints a command and runs it; ends with its exit code where that is not 0."""
    print(shlex.join(command[1:]), flush=True)
    code = subprocess.run(command, stdout=subprocess.DEVNULL if quiet else None).returncode
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    main()
