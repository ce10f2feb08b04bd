"""The report page: complete, self-contained, well-formed, and safe against what captions hold."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_models import Oracle, random_model
from PIL import Image

from openvision3.config import OpenVisionError, SceneConfig
from openvision3.evaluation.charts import Curve, curves, draw, smoothed
from openvision3.evaluation.evaluate import evaluate_all
from openvision3.evaluation.gallery import GalleryRow, gallery, token_pictures
from openvision3.evaluation.report import LOSSES, Report, render, write_report
from openvision3.evaluation.samples import scene_samples

VOID = {"meta", "link", "img", "br", "input", "hr"}


class Page(HTMLParser):
    """Collects text and addresses, and checks that every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "data", "action", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text += data


def records() -> list[dict]:
    return [
        {"kind": "train", "step": i, "samples_seen": 32 * i, **{name: 5.0 / (i + 1) + 0.1 for name in LOSSES}}
        for i in range(40)
    ]


@pytest.fixture(scope="module")
def report() -> Report:
    model, samples = random_model(), scene_samples(16, 32, SceneConfig(num_names=4))
    figures = evaluate_all(model, samples, probe_per_label=4, batch_size=8)
    return Report(
        "A <small> run", "Trained & measured.", {"seed": "0"}, figures, records(), gallery(model, samples, 3),
        environment={"python": "3.11", "packages": {"torch": "2"}}, commands=["ov3 quickstart --out 'a & b'"],
    )  # fmt: skip


def test_page_has_everything(report: Report, tmp_path: Path) -> None:
    path = write_report(report, tmp_path / "sub" / "report.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]  # no temporary file is left
    for title in LOSSES.values():
        assert title in page.text
    assert page.tags.count("svg") == len(LOSSES)
    assert page.tags.count("img") == 3 * 4  # original, VAE, unified, tokens
    for words in ("A <small> run", "Trained & measured.", "chance", "ceiling", "VAE alone", "n = ", "ov3 quickstart"):
        assert words in page.text
    for part in ("reconstruction", "zeroshot", "retrieval", "captioning", "probe"):
        assert report.figures[part]["protocol"] in page.text
    for row in report.gallery:
        assert row.caption in page.text and (row.model_caption or "") in page.text
    assert f"{report.figures['reconstruction']['psnr']:.2f}" in page.text


def test_page_asks_for_nothing_outside(report: Report) -> None:
    text = render(report)
    page = Page(text)
    assert "script" not in page.tags
    outside = [a for a in page.addresses if not a.startswith(("data:", "#"))]
    assert outside == []
    assert "http:" not in text and "https:" not in text and "@import" not in text
    assert re.findall(r"url\((?!#)", text) == []
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_pictures_are_lossless(report: Report) -> None:
    addresses = [a for a in Page(render(report)).addresses if a.startswith("data:image/png")]
    first = np.asarray(Image.open(io.BytesIO(base64.b64decode(addresses[0].split(",")[1]))))
    assert (first == report.gallery[0].original).all()


def test_captions_can_not_break_the_page() -> None:
    picture = np.zeros((16, 16, 3), np.uint8)
    row = GalleryRow('a"b', picture, caption="<script>alert(1)</script>", model_caption="</article><b>bold")
    page = Page(render(Report(gallery=[row], environment={"<i>": "<u>"}, commands=["a < b"])))
    assert not {"script", "b", "u"} & set(page.tags)
    assert "<script>alert(1)</script>" in page.text and "</article><b>bold" in page.text


def test_charts_and_ids_do_not_clash() -> None:
    text = render(Report(records=records()))
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text))
    assert used <= set(ids)
    assert "#010101" not in text and "var(--accent)" in text


def test_same_report_same_bytes(report: Report) -> None:
    assert render(report) == render(report)


def test_empty_and_partial_reports() -> None:
    page = Page(render(Report()))
    assert "Losses" not in page.text and "Figures" not in page.text
    samples = scene_samples(6, 32, SceneConfig(num_names=4))
    figures = evaluate_all(Oracle(samples), samples, ["captioning", "retrieval"])
    text = Page(render(Report(figures=figures))).text
    assert "Retrieval among 6" in text and "Zero-shot" not in text and "nan" not in text.lower().replace("banan", "")
    model = random_model(decoder=None, text_encoder=None)
    figures = evaluate_all(model, samples, probe_per_label=4)
    text = Page(render(Report(figures=figures, gallery=gallery(model, samples, 2)))).text
    assert "Left out: retrieval" in text and "unified" not in text.replace("unified encoder", "")


def test_report_of_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(OpenVisionError, match=r"no metrics\.jsonl"):
        write_report(tmp_path)
    lines = [json.dumps(record) for record in records()] + ['{"kind": "eval", "step": 3}', '{"kind": "tr']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    (tmp_path / "config.json").write_text('{"recipe": "demo"}')
    (tmp_path / "environment.json").write_text('{"python": "3.11", "command": ["ov3", "train", "demo"]}')
    (tmp_path / "samples").mkdir()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "samples" / "000.png")
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "Run demo" in page.text and "ov3 train demo" in page.text and "1,248" in page.text
    assert page.tags.count("svg") == len(LOSSES) and page.tags.count("img") == 1


def test_curves_take_finite_values_of_training() -> None:
    rows = [
        {"kind": "train", "samples_seen": 1, "total": 4.0, "lpips": 0.0},
        {"kind": "eval", "samples_seen": 1, "total": 9.0},
        {"kind": "train", "samples_seen": 2, "total": "nan", "lpips": 0.0},
        {"kind": "train", "samples_seen": 3, "total": 2.0, "lpips": 0.0},
    ]
    (curve,) = curves(rows, {"total": "Total", "lpips": "LPIPS", "absent": "?"})
    assert curve.samples.tolist() == [1, 3] and (curve.start, curve.end) == (4.0, 2.0)
    assert "from 4 to 2" in draw(curve)
    negative = draw(Curve("x", "X", np.arange(30.0), np.linspace(5, -5, 30)))  # no logarithm of it
    assert negative.startswith("<svg")


def test_running_mean_keeps_its_ends() -> None:
    values = np.asarray([4.0, 0.0, 2.0, 6.0, 1.0])
    assert smoothed(values, 2).tolist() == [4.0, 2.0, pytest.approx(8 / 3), 3.0, 1.0]
    assert smoothed(np.full(50, 3.0), 10) == pytest.approx(np.full(50, 3.0))


def test_token_pictures_show_the_first_components() -> None:
    torch.manual_seed(0)
    ramp = torch.linspace(-1, 1, 16).reshape(4, 4)
    tokens = torch.zeros(2, 16, 8)
    tokens[:, :, 3] = 5 * ramp.flatten()  # by far the most variance: red
    tokens[:, :, 5] = ramp.T.flatten()  # then green
    tokens[1] *= 0.5
    first, second = token_pictures(tokens, (4, 4))
    assert first.shape == (4, 4, 3) and first.dtype == np.uint8
    red, green = first[..., 0].astype(int), first[..., 1].astype(int)
    assert (np.diff(red, axis=0) > 0).all() and abs(red - red[::-1, ::-1]).max() > 200
    assert not (np.diff(green, axis=0) > 0).all()
    assert np.ptp(second[..., 0].astype(int)) < np.ptp(red)  # one scale for the whole batch
    assert (token_pictures(tokens, (4, 4))[0] == first).all()
    narrow = token_pictures(torch.randn(1, 4, 2), (2, 2))[0]
    assert (narrow[..., 2] == 128).all()


def test_gallery_rows_are_the_first_samples() -> None:
    samples = scene_samples(5, 32)
    rows = gallery(Oracle(samples), samples, 3)
    assert [row.key for row in rows] == [sample.key for sample in samples][:3]
    for row, sample in zip(rows, samples, strict=False):
        assert row.model is not None and (row.model == row.original).all() and row.vae is None
        assert row.model_caption == sample.caption and row.verdict["exact"] == 1
