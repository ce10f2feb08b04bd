"""The report's figures: tiles at its top, tables below, each with n, chance and ceiling."""

import html
import math
from collections.abc import Sequence
from typing import Any

Cell = str | float | None
NBSP = "\u00a0"  # between a number and its unit
DISTANCES = ("rFID", "KID", "FD-EffNetLite0", "KID-EffNetLite0")


def tiles(figures: dict[str, Any]) -> str:
    """Four headline figures, each between its chance and its ceiling."""
    shown = []
    if "reconstruction" in figures:
        part = figures["reconstruction"]
        beside = ""
        if "vae_psnr" in part:
            beside = f"VAE alone {part['vae_psnr']:.2f}{NBSP}dB, gap {_signed(part['psnr_gap'])}{NBSP}dB"
        value = f"{part['psnr']:.2f}{NBSP}<small>dB</small>"
        shown.append(_tile("Reconstruction, PSNR", value, f"{beside}, n = {part['n']:,}"))
    if "one_exact" in figures.get("captioning", {}):
        part = figures["captioning"]
        beside = f"things and counts exact, n = {part['one_n']:,}; all pictures {_percent(part['exact'])}"
        shown.append(_tile("Captions of one thing", _big(part["one_exact"]), beside, part["one_exact"]))
    if "zeroshot" in figures:
        part = figures["zeroshot"]
        beside = f"of {part['labels']} names, n = {part['n']:,}; chance {_percent(part['chance_top1'])}"
        value = part["templates_top1"]
        shown.append(_tile("Zero-shot top-1", _big(value), beside, value, part["chance_top1"]))
    if "retrieval" in figures:
        part = figures["retrieval"]
        value = part["image_to_text_r1"]
        beside = f"of {part['n']:,}; chance {_percent(part['chance_r1'])}, ceiling {_percent(part['ceiling_r1'])}"
        shown.append(_tile("Image to text, R@1", _big(value), beside, value, part["chance_r1"], part["ceiling_r1"]))
    return f'<section class="tiles">{"".join(shown)}</section>' if shown else ""


def _tile(
    what: str, value: str, beside: str, share: float | None = None, chance: float | None = None, ceiling: float = 1.0
) -> str:
    bar = ""
    if share is not None:
        ticks = f'<s class="chance" style="left:{100 * chance:.2f}%"></s>' if chance else ""
        ticks += f'<s style="left:{100 * ceiling:.2f}%"></s>' if ceiling < 1 else ""
        bar = f'<div class="bar" aria-hidden="true"><i style="width:{100 * share:.2f}%"></i>{ticks}</div>'
    return (
        f'<div class="card tile"><div class="what">{what}</div><div class="value">{value}</div>{bar}'
        f'<div class="beside">{beside.lstrip(", ")}</div></div>'
    )


def _big(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}{NBSP}<small>%</small>"


def tables(figures: dict[str, Any]) -> str:
    """Every table that the figures allow, with the protocol under each."""
    makers = (_reconstruction, _captioning, _zeroshot, _retrieval, _probe)
    made = [table for maker in makers if (table := maker(figures))]
    if not made:
        return ""
    data = figures.get("data", {}).get("protocol", "")
    left_out = figures.get("left_out", {})
    missing = "".join(f"<br>Left out: {html.escape(part)} ({html.escape(why)})." for part, why in left_out.items())
    data = f"{html.escape(data[:1].upper() + data[1:])}. " if data else ""
    note = f'<p class="note">{data}± is the half width of a 95{NBSP}% interval.{missing}</p>'
    return f'<section><h2>Figures</h2>{note}<div class="tables">{"".join(made)}</div></section>'


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[Cell]], protocol: str, wide: bool = False) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = ""
    for name, *cells in rows:
        muted = str(name).endswith(("chance", "ceiling", "(ceiling)"))
        kind = ' class="muted"' if muted else ""
        body += f"<tr><td{kind}>{name}</td>" + "".join(f"<td{kind}>{_cell(cell)}</td>" for cell in cells) + "</tr>"
    return (
        f'<div class="card table{" wide" if wide else ""}"><h3>{html.escape(title)}</h3><div class="scroll"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        f"<details><summary>Protocol</summary><p>{html.escape(protocol)}</p></details></div>"
    )


def _cell(cell: Cell) -> str:
    if cell is None:
        return "–"
    return cell if isinstance(cell, str) else f"{cell:.4g}"


def _percent(share: float | None) -> str:
    """A share as per cent, with more digits where it is small."""
    if share is None:
        return "–"
    return f"{100 * share:.2f}{NBSP}%" if 0 < share < 0.01 else f"{100 * share:.1f}{NBSP}%"


def _share(share: float | None, n: float) -> str:
    """A share with the half width of its 95 % interval (Wilson's)."""
    if share is None or not n:
        return "–"
    z = 1.96
    half = z * math.sqrt(max(share * (1 - share), 0) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return f"{_percent(share)}{NBSP}<small>±{100 * half:.1f}</small>"


def _signed(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}".replace("-", "−")


def _reconstruction(figures: dict[str, Any]) -> str:
    name = figures.get("data", {}).get("name", "pictures")
    sets = {"reconstruction": name, "reconstruction_landscapes": "landscapes"}
    shown = {"psnr": "PSNR ↑", "ssim": "SSIM ↑", "lpips": "LPIPS ↓"}
    shown |= {name: f"{name} ↓" for name in DISTANCES if name in figures.get("reconstruction", {})}
    rows: list[list[Cell]] = []
    for key, name in sets.items():
        part = figures.get(key)
        if not part:
            continue
        for label, prefix in (("model", ""), ("VAE alone (ceiling)", "vae_")):
            if prefix + "psnr" in part:
                cells = [_measure(figure, part.get(prefix + figure)) for figure in shown]
                rows.append([f"{html.escape(name)}, {label}", *cells, f"{part['n']:,}"])
        if "psnr_gap" in part:
            cells = [_measure(figure, part.get(f"{figure}_gap")) for figure in shown]
            rows.append([f"{html.escape(name)}, gap", *cells, ""])
    if not rows:
        return ""
    protocol = figures.get("reconstruction", figures.get("reconstruction_landscapes", {})).get("protocol", "")
    return _table("Reconstruction", ("", *shown.values(), "n"), rows, protocol, wide=True)


def _measure(name: str, value: float | None) -> str | None:
    if value is None:
        return None
    return f"{_signed(value)}{NBSP}dB" if name == "psnr" else _signed(value, 2 if "FD" in name or "FID" in name else 4)


def _zeroshot(figures: dict[str, Any]) -> str:
    part = figures.get("zeroshot")
    if not part:
        return ""
    n = part["n"]
    rows: list[list[Cell]] = [
        ["bare prompt", *(_share(part[f"bare_top{k}"], n) for k in (1, 5))],
        [f"{part['templates']} prompts averaged", *(_share(part[f"templates_top{k}"], n) for k in (1, 5))],
        ["chance", *(_percent(part[f"chance_top{k}"]) for k in (1, 5))],
    ]
    return _table(f"Zero-shot, {part['labels']} names, n = {n:,}", ("", "top-1", "top-5"), rows, part["protocol"])


def _retrieval(figures: dict[str, Any]) -> str:
    part = figures.get("retrieval")
    if not part:
        return ""
    recalls = (1, 5, 10)
    rows: list[list[Cell]] = []
    for name, key in (("image → text", "image_to_text"), ("text → image", "text_to_image")):
        rows.append([name, *(_share(part[f"{key}_r{k}"], part["n"]) for k in recalls)])
    for name in ("ceiling", "chance"):
        rows.append([name, *(_percent(part[f"{name}_r{k}"]) for k in recalls)])
    title = f"Retrieval among {part['n']:,}, {part['distinct_captions']:,} distinct captions"
    return _table(title, ("", "R@1", "R@5", "R@10"), rows, part["protocol"])


def _captioning(figures: dict[str, Any]) -> str:
    part = figures.get("captioning")
    if not part:
        return ""
    if "exact" in part:
        rows: list[list[Cell]] = []
        kinds = {"": "all", "one_": "one thing", "different_": "several different", "repeated_": "one repeated"}
        for prefix, name in kinds.items():
            n = part[f"{prefix}n"]
            rows.append([name, _share(part[f"{prefix}set"], n), _share(part[f"{prefix}exact"], n), f"{n:,}"])
        relations, scenes = part["relation_n"], part["scene_n"]
        extra = (
            f"Relation right in {_share(part['relation_right'], relations)} of the {relations:,} captions that state "
            f"one (chance {_percent(part['relation_chance'])}; stated for {_percent(part['relation_stated'])} of the "
            f"pictures that have one). Scene right in {_share(part['scene_right'], scenes)} of the {scenes:,} captions "
            f"that state one (always the commonest: {_percent(part['scene_commonest'])}; stated in "
            f"{_percent(part['scene_stated'])} of all)."
        )
        if part["cider_d"] is not None:
            extra += f" CIDEr-D {part['cider_d']:.2f}, of at most 10."
        table = _table("Captions", ("", "set of things", "and counts", "n"), rows, part["protocol"])
        return table.replace("<details>", f'<p class="note" style="margin:12px 0 0">{extra}</p><details>', 1)
    rows = [["all pictures", part["cider_d"], f"{part['n']:,}"]]
    return _table("Captions", ("", "CIDEr-D", "n"), rows, part["protocol"])


def _probe(figures: dict[str, Any]) -> str:
    part = figures.get("probe")
    if not part:
        return ""
    rows: list[list[Cell]] = [
        ["test", _share(part["top1"], part["n"]), f"{part['n']:,}"],
        ["training", _percent(part["train_top1"]), f"{part['n_train']:,}"],
        ["chance", _percent(part["chance_top1"]), ""],
    ]
    return _table(f"Linear probe, {part['labels']} names", ("", "top-1", "n"), rows, part["protocol"])
