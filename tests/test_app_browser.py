"""`ov3 app` in a real browser: each tab used once with the demo model, by keyboard, on a phone; hostile requests.

Needs Gradio and playwright (`make test-browser` installs them) and a Chromium: apt-get install chromium, or name one in
CHROMIUM. Screenshots are left in the folder that SCREENSHOTS names.
"""

import io
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.browser
gradio = pytest.importorskip("gradio", reason="make test-browser installs it")
playwright = pytest.importorskip("playwright.sync_api", reason="make test-browser installs it")
httpx = pytest.importorskip("httpx")

import openvision3  # noqa: E402
from openvision3.app import functions, page  # noqa: E402

PICTURES = Path(os.environ.get("SCREENSHOTS") or tempfile.mkdtemp(prefix="ov3-screenshots-"))

CAPTION_IS_THERE = "[...document.querySelectorAll('textarea')].some(t => t.disabled && t.value.split(' ').length > 2)"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A started page with the demo model."""
    blocks = page.build(
        functions.load_parts(openvision3.load("demo", device="cpu"), "demo", "demo"),
        "demo",
        tmp_path_factory.mktemp("examples"),
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    yield page.launch(blocks, "127.0.0.1", port).rstrip("/")
    blocks.close(verbose=False)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.fail("there is no Chromium: apt-get install chromium, or name one: CHROMIUM=/path make test-browser")
    with playwright.sync_playwright() as run:
        chromium = run.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium.new_context()  # one, whose cache holds the page's scripts
        chromium.close()


@pytest.fixture
def view(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A page as a visitor has it; nothing but the app may be asked for anything, and no script may fail."""
    width, height = getattr(request, "param", (1280, 900))
    tab = browser.new_page()
    tab.set_viewport_size({"width": width, "height": height})
    tab.set_default_timeout(120_000)  # a busy machine
    outside, broken = [], []
    tab.on("request", lambda r: outside.append(r.url) if not r.url.startswith((address, "data:", "blob:")) else None)
    tab.on("pageerror", lambda error: broken.append(str(error)))
    tab.goto(address)
    tab.get_by_role("button", name="Reconstruct").wait_for()
    yield tab
    PICTURES.mkdir(parents=True, exist_ok=True)
    tab.screenshot(path=PICTURES / f"{request.node.name}.png", full_page=True)
    tab.close()
    assert not outside and not broken


def open_tab(view: Any, name: str) -> Any:
    """The panel of a tab, after a click on it."""
    view.get_by_role("tab", name=name).click()
    return view.get_by_role("tabpanel").filter(visible=True)


def test_reconstruct(view: Any) -> None:
    view.get_by_role("button", name="Reconstruct").click()
    view.get_by_text("Tokens: ").wait_for()
    vae, unified = (
        float(view.get_by_text(name).inner_text().split(": ")[1].removesuffix(" dB")) for name in ("VAE: ", "Tokens: ")
    )
    assert 15 < unified < vae < 50


def test_caption(view: Any) -> None:
    panel = open_tab(view, "Caption")
    panel.get_by_role("button", name="Describe").click()
    view.wait_for_function(CAPTION_IS_THERE)


def test_zeroshot_ranks_the_labels_that_were_typed(view: Any) -> None:
    panel = open_tab(view, "Zero-shot")
    panel.get_by_label("Labels, one a line").fill("grand piano\nzebra\n")
    panel.get_by_role("button", name="Classify").click()
    panel.get_by_text("zebra", exact=True).first.wait_for()
    assert panel.get_by_text("%").count() >= 2


def test_generate(view: Any) -> None:
    panel = open_tab(view, "Generate")
    for name, value in (("Pictures", 1), ("Steps", 4)):
        panel.get_by_label(f"number input for {name}").fill(str(value))
    panel.get_by_role("button", name="Generate").click()
    panel.locator("button img").first.wait_for()


def test_ask_answers_or_says_why_not(view: Any) -> None:
    panel = open_tab(view, "Ask")
    button = panel.get_by_role("button", name="Ask", exact=True)
    if panel.locator(".reason").count():  # its language model can't be fetched
        assert button.is_disabled()
        return
    button.click()
    view.wait_for_function("[...document.querySelectorAll('textarea')].some(t => t.disabled && t.value == 'yes')")


def press_tab_to(view: Any, role: str, name: str) -> None:
    """Presses Tab until the button or tab of this name has the focus."""
    wanted = view.get_by_role(role, name=name).filter(visible=True).element_handle()
    for _ in range(60):
        if wanted.evaluate("one => one === document.activeElement"):
            return
        view.keyboard.press("Tab")
    pytest.fail(f"{name} was not reached with Tab")


def test_the_keyboard_is_enough(view: Any) -> None:
    press_tab_to(view, "tab", "Caption")
    view.keyboard.press("Enter")
    press_tab_to(view, "button", "Describe")
    view.keyboard.press("Enter")
    view.wait_for_function(CAPTION_IS_THERE)


@pytest.mark.parametrize("view", [(390, 844)], indirect=True)
def test_a_phone_needs_no_scrolling_sideways(view: Any) -> None:
    for name in ("Reconstruct", "Caption", "Zero-shot", "Generate", "Ask"):
        if not view.get_by_role("tab", name=name).is_visible():
            view.locator(".overflow-menu > button").click()
            view.locator(".overflow-dropdown").get_by_text(name).click()
        else:
            view.get_by_role("tab", name=name).click()
        view.wait_for_timeout(300)
        view.screenshot(path=PICTURES / f"phone-{name}.png", full_page=True)
        assert view.evaluate("document.documentElement.scrollWidth") <= 390, name


def test_an_error_is_shown_in_one_line(view: Any, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"this is no picture" * 9)
    panel = open_tab(view, "Caption")
    panel.get_by_label("Clear").or_(panel.get_by_label("Remove Image")).first.click()
    panel.locator("input[type=file]").first.set_input_files(bad)
    view.wait_for_timeout(1000)
    panel.get_by_role("button", name="Describe").click()
    view.get_by_text("bad.png: is not a picture of a known format").wait_for()
    view.wait_for_timeout(1000)  # it flies in; for the screenshot


def call(address: str, name: str, *values: Any) -> str:
    """What the endpoint's stream of events says, as text."""
    started = httpx.post(f"{address}/gradio_api/call/{name}", json={"data": values}, timeout=60)
    if started.status_code != 200:
        return f"{started.status_code} {started.text}"
    return httpx.get(f"{address}/gradio_api/call/{name}/{started.json()['event_id']}", timeout=120).text


def sent(address: str, name: str, content: bytes) -> dict[str, Any]:
    """An uploaded file as endpoints take it."""
    answer = httpx.post(f"{address}/gradio_api/upload", files={"files": (name, content)}, timeout=60)
    answer.raise_for_status()
    return {"path": answer.json()[0], "orig_name": name, "meta": {"_type": "gradio.FileData"}}


def test_an_upload_through_the_api(address: str) -> None:
    file = io.BytesIO()
    Image.fromarray(np.zeros((40, 30, 3), np.uint8)).save(file, "PNG")
    assert "event: complete" in call(address, "caption", sent(address, "a.png", file.getvalue()), 1)
    said = call(address, "caption", sent(address, "b.svg", b"<svg/>"), 1)
    assert "event: error" in said and "b.svg: is not a picture of a known format" in said


@pytest.mark.parametrize("path", ["/etc/passwd", "../../../../etc/passwd", "openvision3/cli.py", "//etc/passwd"])
def test_no_file_outside_is_readable(address: str, path: str) -> None:
    assert httpx.get(f"{address}/gradio_api/file={path}").status_code in (403, 404)
    said = call(address, "caption", {"path": path, "meta": {"_type": "gradio.FileData"}}, 1)
    assert "event: error" in said and "root:" not in said and "Traceback" not in said


def test_addresses_and_data_are_not_fetched(address: str) -> None:
    for data in (
        {"path": "http://127.0.0.1:9/x.png"},
        {"path": "file:///etc/passwd"},
        {"path": "/etc/passwd", "url": "data:image/png;base64,AAAA"},
        {"url": "http://127.0.0.1:9/x.png"},
    ):
        said = call(address, "caption", data | {"meta": {"_type": "gradio.FileData"}}, 1)
        assert "event: error" in said, data


def test_large_uploads_are_refused(address: str) -> None:
    answer = httpx.post(
        f"{address}/gradio_api/upload", files={"files": ("big.png", bytes(page.MAX_BYTES + 1))}, timeout=60
    )
    assert answer.status_code == 413


def test_numbers_out_of_bounds_are_refused(address: str) -> None:
    said = call(address, "generate", "a lion", 1000, 0, 2.0, 4)
    assert "event: error" in said and "1000 is greater than maximum value 8" in said
