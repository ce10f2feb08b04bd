"""Measures the embedded demo model and prints the table of docs/RESULTS.md, in Markdown.

    python benchmarks/demo_figures.py [MODEL] [--json FILE] [--picture docs/demo.png]

On the frozen benchmark scenes-v1 (1,000 pictures), on the held-out landscapes at 128 px, and on the same at 256 px, a
size that is never trained. Beside each figure are chance, the VAE alone or the ceiling, what a rough trial at laptop
size reached (one seed, 200 names, other pictures: no like for like), and the goal. `--picture` also draws the first
scenes of the benchmark as the model sees them.
"""

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

import openvision3
from openvision3.evaluation.evaluate import evaluate_all
from openvision3.evaluation.gallery import GalleryRow, gallery
from openvision3.evaluation.samples import open_samples
from openvision3.model.openvision3 import OpenVision3

PARTS = ("reconstruction", "zeroshot", "retrieval", "captioning")
LARGE = 256  # pixels, never trained
PICTURES = 6


def rows(figures: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """What, the figure, what stands beside it, the rough trial's, the goal."""
    scenes, landscapes = figures["reconstruction"], figures["reconstruction_landscapes"]
    large = figures["reconstruction_landscapes_256"]
    zero, found, said = figures["zeroshot"], figures["retrieval"], figures["captioning"]
    table = [
        ("tiny VAE, held-out landscapes, 128 px", _db(landscapes["vae_psnr"]), "", "32.8 dB", ">= 34.5 dB"),
        ("tiny VAE, `scenes-v1`", _db(scenes["vae_psnr"]), "", "30.4 dB", ">= 32.5 dB"),
    ]
    for what, part, trial, goal in (
        ("PSNR, `scenes-v1`", scenes, "29.35 (VAE 30.38)", "gap <= 0.7 dB"),
        ("PSNR, held-out landscapes", landscapes, "", ""),
        ("PSNR, held-out landscapes, 256 px", large, "", "gap <= 2.5 dB"),
    ):
        beside = f"{_db(part['vae_psnr'])}, its VAE alone (gap {part['psnr_gap']:.2f})"
        table.append((what, _db(part["psnr"]), beside, trial, goal))
    lpips = f"{scenes['vae_lpips']:.4f}, its VAE alone (gap {scenes['lpips_gap']:.4f})"
    table.append(("LPIPS, `scenes-v1`", f"{scenes['lpips']:.4f}", lpips, "", "gap <= 0.010"))
    chance = f"chance {_percent(zero['chance_top1'])}"
    table += [
        ("zero-shot top-1, 494 names, bare prompt", _of(zero, "bare_top1", "n"), chance, "38 % of 200", ">= 75 %"),
        ("zero-shot top-5", _of(zero, "bare_top5", "n"), f"chance {_percent(zero['chance_top5'])}", "91 %", ""),
    ]
    for what, name in (
        ("R@1, picture to caption", "image_to_text_r1"),
        ("R@1, caption to picture", "text_to_image_r1"),
    ):
        beside = f"ceiling {_percent(found['ceiling_r1'])}, chance {_percent(found['chance_r1'])}"
        table.append((f"{what}, among {found['n']:,}", _percent(found[name]), beside, "48 % of 500", ">= 70 %"))
    table += [
        ("captions, 1-3 things: set right", _of(said, "one_to_three_set", "one_to_three_n"), "", "58 %", ">= 75 %"),
        ("captions, one thing", _of(said, "one_set", "one_n"), "", "83 %", ">= 92 %"),
        ("captions, two different things", _of(said, "two_set", "two_n"), "", "", ">= 70 %"),
        ("captions, two: relation stated and right", _of(said, "two_relation", "two_relation_n"), "", "", ">= 60 %"),
        ("captions: relation right where stated", _of(said, "relation_right", "relation_n"),
         f"chance {_percent(said['relation_chance'])}", "", ""),
        ("captions: scene right where stated", _of(said, "scene_right", "scene_n"),
         f"always the commonest {_percent(said['scene_commonest'])}", "16 %", ""),
    ]  # fmt: skip
    return table


def _db(value: float) -> str:
    return f"{value:.2f} dB"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _of(part: dict[str, Any], name: str, count: str) -> str:
    return f"{_percent(part[name])} of {part[count]:,}"


def draw(pictures: list[GalleryRow], path: Path) -> None:
    """Columns of the first scenes: the original, the VAE's, the model's from its tokens, the tokens, the caption."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    lines = ("original", "its VAE alone", "from 64 tokens", "tokens (3 components)")
    figure, axes = pyplot.subplots(
        len(lines), len(pictures), figsize=(2 * len(pictures), 2.15 * len(lines) + 0.8), dpi=100
    )
    for column, row in enumerate(pictures):
        notes = (
            "",
            f"{row.vae_psnr:.1f} dB",
            f"{row.model_psnr:.1f} dB",
            "\n".join(textwrap.wrap(row.model_caption or "", 24)),
        )
        for line, (picture, note) in enumerate(zip((row.original, row.vae, row.model, row.tokens), notes, strict=True)):
            axis = axes[line][column]
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[], ylabel=lines[line] if column == 0 else "")
            axis.set_xlabel(note, fontsize=8)
            axis.spines[:].set_visible(False)
    figure.tight_layout(pad=0.3, h_pad=0.8)
    figure.savefig(path)
    pyplot.close(figure)


def draw_first(model: OpenVision3, path: Path) -> None:
    """Draws the first scenes of the benchmark."""
    draw(gallery(model, open_samples(size=model.config.image_size), PICTURES), path)


def measure(model: OpenVision3, samples: int = 0) -> dict[str, Any]:
    """The figures of `ov3 eval all` on scenes-v1 without the probe, and of the landscapes at 256 px."""
    figures = evaluate_all(model, parts=PARTS, samples=samples)
    large = evaluate_all(model, "landscapes", ("reconstruction",), size=LARGE)["reconstruction"]
    return figures | {"reconstruction_landscapes_256": large}


def markdown(figures: dict[str, Any]) -> str:
    """The table."""
    lines = ["| | measured | beside it | rough trial | goal |", "|---|---|---|---|---|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows(figures)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--samples", type=int, default=0, help="of scenes-v1; 0: all 1,000")
    options = parser.parse_args()
    model = openvision3.load(options.model, device="cpu")
    if options.picture:
        draw_first(model, options.picture)
    figures = measure(model, options.samples)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    print(markdown(figures))


if __name__ == "__main__":
    main()
