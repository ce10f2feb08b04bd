"""Loss curves as small SVG charts that follow the page's colours, light or dark."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

# Colours that matplotlib writes, and the page's variables that take their place.
_INK, _MUTED, _LINE, _ACCENT = "#010101", "#020202", "#030303", "#040404"
_VARIABLES = {_INK: "var(--ink)", _MUTED: "var(--muted)", _LINE: "var(--line)", _ACCENT: "var(--accent)"}


@dataclass(frozen=True)
class Curve:
    """One loss over the samples seen."""

    name: str
    title: str
    samples: np.ndarray
    values: np.ndarray

    @property
    def start(self) -> float:
        """Mean of the first twentieth of the records."""
        return float(self.values[: max(1, len(self.values) // 20)].mean())

    @property
    def end(self) -> float:
        """Mean of the last twentieth of the records."""
        return float(self.values[-max(1, len(self.values) // 20) :].mean())


def curves(records: Sequence[dict[str, Any]], titles: dict[str, str], kind: str = "train") -> list[Curve]:
    """A curve for each name in `titles` that the records of a kind hold at least two finite values of."""
    found = []
    for name, title in titles.items():
        points = [
            (float(record["samples_seen"]), float(record[name]))
            for record in records
            if record.get("kind", "train") == kind and isinstance(record.get(name), int | float)
        ]
        points = [(x, y) for x, y in points if math.isfinite(y)]
        if len(points) >= 2 and any(y != 0 for _, y in points):
            x, y = np.asarray(points).T
            found.append(Curve(name, title, x, y))
    return found


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """A centred running mean whose window shrinks at both ends, so that it starts and ends on data."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(np.minimum(index, len(values) - 1 - index), window // 2)
    return (total[index + reach + 1] - total[index - reach]) / (2 * reach + 1)


def draw(curve: Curve) -> str:
    """The curve as an inline `<svg>`: every record faint, a running mean strong; a log axis where it falls tenfold."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": curve.name, "font.size": 9.0, "path.simplify_threshold": 0.5}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.2, 2.3))
        axes = figure.add_axes((0.115, 0.13, 0.87, 0.82))
        axes.plot(curve.samples, curve.values, color=_MUTED, linewidth=0.7, alpha=0.45)
        mean = smoothed(curve.values, max(2, len(curve.values) // 20))
        axes.plot(curve.samples, mean, color=_ACCENT, linewidth=1.9, solid_capstyle="round")
        positive = curve.values.min() > 0
        if positive and curve.values.max() > 10 * curve.values.min():
            axes.set_yscale("log")
        else:
            axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.margins(x=0.01)
        axes.grid(axis="y", color=_LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=_MUTED, length=0, which="both", pad=4)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(_LINE)
        axes.patch.set_visible(False)
        figure.patch.set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _inline(buffer.getvalue(), f"{curve.title}: from {curve.start:.4g} to {curve.end:.4g}")


def _inline(svg: str, label: str) -> str:
    """The `<svg>` element alone, without fixed size, metadata or ids that would repeat on the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    for attribute in ("width", "height"):
        svg = re.sub(rf'(<svg[^>]*?) {attribute}="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label, quote=True)}"', 1).strip()
