"""One self-contained HTML page about a trained encoder: losses, pictures, captions, figures, how it was made."""

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from openvision3.config import OpenVisionError
from openvision3.evaluation import charts, report_tables
from openvision3.evaluation.gallery import GalleryRow
from openvision3.evaluation.report_style import STYLE

LOSSES = {  # as metrics.jsonl calls them: what stands above the chart
    "total": "Total, Eq. 6",
    "reconstruction": "Reconstruction, Eq. 4",
    "understanding": "Understanding, Eq. 5",
    "pixel_l1": "Pixels, L1",
    "latent_l1": "Latents, L1",
    "lpips": "LPIPS",
    "contrastive": "Contrastive",
    "caption": "Caption, a token",
}

SYNERGY = {  # as the meter's records call them
    "gradient_cosine": "Cosine of the two gradients",
    "reconstruction_gradient": "Norm, reconstruction",
    "understanding_gradient": "Norm, understanding",
}


@dataclass
class Report:
    """What the page shows; empty parts are left out."""

    title: str = "OpenVision 3 encoder"
    summary: str = ""  # a sentence or two under the title
    facts: dict[str, str] = field(default_factory=dict)  # short ones: "trained on": "60,000 scenes"
    figures: dict[str, Any] = field(default_factory=dict)  # of `evaluate_all`
    records: list[dict[str, Any]] = field(default_factory=list)  # of metrics.jsonl
    gallery: list[GalleryRow] = field(default_factory=list)
    gallery_note: str = ""
    picture_files: list[Path] = field(default_factory=list)  # where there is no gallery: picture grids of the run
    environment: dict[str, Any] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)


def write_report(source: "Report | Path", path: Path | None = None) -> Path:
    """Writes the page of a `Report`, or of a run's folder, whole or not at all; returns its path.

    The page needs no network: styles, charts and pictures are inside. For a folder, `path` is `report.html` in it by
    default. Raises `OpenVisionError` for a folder without metrics.jsonl.
    """
    if isinstance(source, Path):
        path = path or source / "report.html"
        source = report_of_run(source)
    if path is None:
        raise OpenVisionError("a report needs a path to be written to")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(render(source), encoding="utf-8")
    temporary.replace(path)
    return path


def report_of_run(folder: Path) -> Report:
    """Gathers what a run's folder holds: config, environment, metrics, evaluation.json, the newest sample pictures."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise OpenVisionError(f"{folder} is not a run's folder: it has no metrics.jsonl")
    records = _records(metrics)
    config, environment = _json(folder / "config.json"), _json(folder / "environment.json")
    pictures = sorted((folder / "samples").glob("*.png"), key=lambda file: (file.stat().st_mtime, file.name))
    command = environment.get("command")
    return Report(
        title=f"Run {config.get('recipe', folder.name)}",
        facts={"samples seen": f"{max((int(r.get('samples_seen', 0)) for r in records), default=0):,}"},
        figures=_json(folder / "evaluation.json"),
        records=records,
        picture_files=pictures[-1:],
        environment=environment,
        commands=[" ".join(command)] if isinstance(command, list) else [],
    )


def _records(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # a line that was broken off when the run was killed
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise OpenVisionError(f"{path} is not valid JSON: {error}") from None
    return value if isinstance(value, dict) else {}


def render(report: Report) -> str:
    """The page as a string."""
    parts = [
        _head(report),
        report_tables.tiles(report.figures),
        _pictures(report),
        _losses(report.records),
        _synergy(report.records),
        report_tables.tables(report.figures),
        _making(report),
    ]
    title = html.escape(report.title)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n'
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _head(report: Report) -> str:
    summary = f'<p class="lead">{html.escape(report.summary)}</p>' if report.summary else ""
    facts = dict(report.facts)
    data, model = report.figures.get("data", {}), report.figures.get("model", {})
    if model.get("parameters"):
        own = sum(count for part, count in model["parameters"].items() if part not in ("total", "vae"))
        facts["parameters"] = f"{own / 1e6:.1f} M"
    if data:
        facts["measured on"] = f"{data['n']:,} pictures, {data['size']} px"
    items = "".join(f"<li>{html.escape(name)} <b>{html.escape(value)}</b></li>" for name, value in facts.items())
    return f'<header><h1>{html.escape(report.title)}</h1>{summary}<ul class="facts">{items}</ul></header>'


def _pictures(report: Report) -> str:
    if report.gallery:
        note = report.gallery_note or "The first pictures of the held-out set, not chosen by hand."
        legend = (
            "From left to right: the original, the frozen VAE alone (the ceiling), the unified encoder's "
            "reconstruction, and the first three principal components of its tokens over these pictures as colours."
        )
        rows = "".join(_picture(row) for row in report.gallery)
        return (
            f'<section><h2>Pictures and captions</h2><p class="note">{html.escape(note)} {legend}</p>'
            f'<div class="pictures">{rows}</div></section>'
        )
    if report.picture_files:
        images = "".join(
            f'<p><img class="grid" alt="originals and reconstructions" src="{_file_url(file)}"></p>'
            for file in report.picture_files
        )
        return f'<section><h2>Pictures</h2><p class="note">The newest sample pictures of the run.</p>{images}</section>'
    return ""


def _picture(row: GalleryRow) -> str:
    cells = [
        ("original", row.original, None, ""),
        ("VAE alone", row.vae, row.vae_psnr, ""),
        ("unified", row.model, row.model_psnr, ""),
        ("tokens", row.tokens, None, ' class="tokens"'),
    ]
    strip = "".join(
        f'<figure><img{kind} alt="{name}: {html.escape(row.key)}" src="{data_url(picture)}">'
        f"<figcaption>{name}{'' if value is None else f'<br>{value:.1f}{report_tables.NBSP}dB'}</figcaption></figure>"
        for name, picture, value, kind in cells
        if picture is not None
    )
    words = ""
    if row.caption:
        words += f"<dt>reference</dt><dd>{html.escape(row.caption)}</dd>"
    if row.model_caption is not None:
        words += f"<dt>model</dt><dd>{html.escape(row.model_caption)} {_marks(row.verdict)}</dd>"
    return f'<article class="card picture"><div class="strip">{strip}</div><dl class="words">{words}</dl></article>'


def _marks(verdict: dict[str, float]) -> str:
    """What the caption got right, each with a word, so that colour is not alone in saying it."""
    names = {"set": "things", "exact": "counts", "relation": "relation", "scene": "scene"}
    marks = "".join(
        f'<span class="{"yes" if verdict[key] else "no"}">{"✓" if verdict[key] else "✗"} {name}</span>'
        for key, name in names.items()
        if key in verdict
    )
    return f'<br><span class="marks">{marks}</span>' if marks else ""


def _losses(records: Sequence[dict[str, Any]]) -> str:
    found = charts.curves(records, LOSSES)
    if not found:
        return ""
    note = (
        "Over the samples seen, as trained (not weighted). Faint: every record; strong: running mean. The two numbers: "
        "the mean of the first and of the last twentieth."
    )
    return f'<section><h2>Losses</h2><p class="note">{note}</p>{_charts(found)}</section>'


def _synergy(records: Sequence[dict[str, Any]]) -> str:
    measured = [record for record in records if record.get("kind") == "meter"]
    if reason := next((record["left_out"] for record in measured if "left_out" in record), None):
        return f'<section><h2>Synergy</h2><p class="note">Not measured: {html.escape(str(reason))}.</p></section>'
    found = charts.curves(measured, SYNERGY, kind="meter")
    if not found:
        return ""
    note = (
        "Gradients of the reconstruction and the understanding loss by the unified tokens, on held-out samples. Above "
        "0, the cosine says that a small step down one loss goes down the other too."
    )
    return f'<section><h2>Synergy</h2><p class="note">{note}</p>{_charts(found)}</section>'


def _charts(found: Sequence[charts.Curve]) -> str:
    figures = "".join(
        f'<figure class="card chart"><figcaption><b>{html.escape(curve.title)}</b>'
        f"<span>{curve.start:.3g} → {curve.end:.3g}</span></figcaption>{charts.draw(curve)}</figure>"
        for curve in found
    )
    return f'<div class="charts">{figures}</div>'


def _making(report: Report) -> str:
    rows = "".join(
        f"<dt>{html.escape(str(name))}</dt><dd>{html.escape(_plain(value))}</dd>"
        for name, value in report.environment.items()
        if name != "command" and value not in ("", None)
    )
    commands = f"<pre>{html.escape(chr(10).join(report.commands))}</pre>" if report.commands else ""
    if not rows and not commands:
        return ""
    keys = f'<dl class="keys">{rows}</dl>' if rows else ""
    return f'<section><h2>How it was made</h2><div class="card table">{keys}{commands}</div></section>'


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return " ".join(_plain(item) for item in value)
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else str(value)
    return str(value)


def data_url(pixels: np.ndarray) -> str:
    """A uint8 (H, W, 3) picture as a `data:` address, lossless."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _file_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
