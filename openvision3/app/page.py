"""The page of `ov3 app`: five tabs over the functions beside it, with limits on what a visitor may send.

Nothing is loaded from the network, and what can be read are a visitor's own uploads and the page's pictures.
"""

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from openvision3.app import functions
from openvision3.app.functions import Parts
from openvision3.config import OpenVisionError, SceneConfig

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
try:
    import gradio as gr  # type: ignore[import-not-found]  # in .venv-app alone
except ImportError:
    raise OpenVisionError("ov3 app needs Gradio: pip install 'openvision3[app]'") from None

MAX_BYTES = 10 * 2**20  # of an upload
MAX_WAITING = 32  # visitors in the queue; who comes after them is told so
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}  # of all that needs a model
WORKER = ThreadPoolExecutor(1, "models")
END = object()
CACHE_SECONDS = (300, 1800)  # how often files are deleted, and at which age

LABELS = "broccoli\nelephant\nnotebook\npanda\nsailboat"
SCENES = SceneConfig(num_names=100)  # what the demo VLM knows
CSS = """
.gradio-container { width: 100% !important; max-width: 1200px !important; margin: 0 auto !important; }
.reason .reason { all: unset; }
.block.reason { border-left: 4px solid #d97706; padding: 0.5em 1em; background: #d9770618; border-radius: 4px; }
"""


def build(parts: Parts, name: str, examples: Path) -> gr.Blocks:
    """The page, not yet started; its example pictures are written to the folder `examples`.

    A tab whose part is missing is greyed, says why, and has no endpoint.
    """
    model = parts.model
    size = model.config.image_size
    paths, _ = functions.write_examples(examples, size)
    with gr.Blocks(
        title=f"OpenVision 3: {name}", analytics_enabled=False, fill_width=True, delete_cache=CACHE_SECONDS
    ) as page:
        gr.Markdown(f"# OpenVision 3\n{_about(name)}")
        with gr.Tabs():
            with gr.Tab("Reconstruct"):
                _reconstruct_tab(parts, paths)
            with gr.Tab("Caption"):
                _caption_tab(parts, paths)
            with gr.Tab("Zero-shot"):
                _zeroshot_tab(parts, paths)
            with gr.Tab("Generate"):
                _generate_tab(parts)
            with gr.Tab("Ask"):
                _ask_tab(parts, *functions.write_examples(examples / "ask", size, SCENES))
        gr.Markdown(
            f"Pictures: at most {MAX_BYTES // 2**20} MB and {functions.MAX_PIXELS // 10**6} million pixels; the long "
            f"side is reduced to {functions.MAX_SIDE}. They are deleted within {sum(CACHE_SECONDS) // 60} minutes."
        )
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)


def launch(page: gr.Blocks, host: str, port: int, share: bool = False) -> str:
    """Starts the page in threads of its own and returns its address. Raises `OpenVisionError` for a port in use."""
    try:
        _, local, public = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            prevent_thread_lock=True,
            quiet=True,
            show_error=False,  # what is not a `gr.Error` may tell of the server
            allowed_paths=[],
            max_file_size=MAX_BYTES,
            ssr_mode=False,
            footer_links=["api"],
            theme=gr.themes.Soft(font=["ui-sans-serif", "system-ui", "sans-serif"], font_mono=["ui-monospace"]),
            css=CSS,
        )
    except OSError as error:
        raise OpenVisionError(f"can't listen at {host}:{port}: {error}") from None
    return public or local


def upload(value: str | None, enabled: bool = True) -> gr.Image:
    """A picture's input that hands its file on undecoded, for our own limits, and takes uploaded files alone."""
    image: Any = gr.Image(
        value,
        type="filepath",
        image_mode=None,  # type: ignore[arg-type]
        sources=["upload", "clipboard"],
        label="Picture",
        height=320,
        buttons=["fullscreen"],
        interactive=enabled,
    )
    move = image.async_move_resource_to_block_cache

    async def move_file(path: str | Path | None) -> str | None:
        if "://" in str(path):  # Gradio would fetch it
            raise gr.Error("a picture must be uploaded; addresses are not read", print_exception=False)
        return await move(path)

    image.async_move_resource_to_block_cache = move_file
    image.preprocess = lambda payload: None if payload is None else payload.path
    return image


def told(function: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
    """The function, or generator, run in the models' own thread; its `OpenVisionError`s go to the visitor, in one line.

    One thread, as PyTorch and malloc keep memory for each that they have served; what they can spare is given back.
    """

    def work(*values: Any) -> Iterator[Any]:
        try:
            found = WORKER.submit(function, *values).result()
            if not isinstance(found, Iterator):
                yield found
                return
            while (piece := WORKER.submit(next, found, END).result()) is not END:
                yield piece
        except OpenVisionError as error:
            raise gr.Error(str(error), duration=15, print_exception=False) from None
        finally:
            WORKER.submit(give_back).result()

    return work


def give_back() -> None:
    """Hands the memory that was freed back to the system, where the C library (glibc) can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _about(name: str) -> str:
    if name != "demo":
        return f"Model: {name}"
    return (
        "The embedded demo model. It was trained on rendered scenes of 494 drawn things on landscapes, and knows few "
        "other sights: start with an example."
    )


def _reason(parts: Parts, tab: str) -> bool:
    """Shows why a tab is greyed; returns whether it is not."""
    reason = parts.reasons.get(tab, "")
    if reason:
        gr.Markdown(reason[0].upper() + reason[1:], elem_classes="reason", container=True)
    return not reason


def _picture(paths: list[Path], enabled: bool = True) -> gr.Image:
    """An upload with examples below it; the first is there at once."""
    image = upload(str(paths[0]), enabled)
    if enabled:
        gr.Examples([[str(path)] for path in paths], [image], label="Examples", api_visibility="private")
    return image


def _decibels(name: str, score: float | None) -> str:
    return f"{name}: none" if score is None else f"{name}: {score:.2f} dB"


def _reconstruct_tab(parts: Parts, paths: list[Path]) -> None:
    model = parts.model
    _reason(parts, "reconstruct")
    has_decoder = model.config.decoder is not None
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            picture = _picture(paths)
            tau = gr.Slider(
                0, functions.MAX_TAU, 0, step=0.05, label="Noise on the tokens (tau)", interactive=has_decoder
            )
            button = gr.Button("Reconstruct", variant="primary")
        with gr.Column(scale=3, min_width=300):
            slider = gr.ImageSlider(
                label="Original | from the tokens" if has_decoder else "Original | VAE alone",
                interactive=False,
                format="png",
                max_height=400,
            )
            with gr.Row():
                shown = [_output(label) for label in ("Original", "VAE alone", "From tokens")]
                tokens = _output("PCA of tokens")
            gr.Markdown("dB: PSNR against the original. PCA: the tokens' three principal components as colours.")

    def work(path: str, noise: float) -> tuple[Any, ...]:
        found = functions.reconstruct(model, functions.read_upload(path), noise)
        other = found.unified or found.vae
        return (
            (found.original, other) if other is not None else None,
            found.original,
            gr.Image(found.vae, label=_decibels("VAE", found.vae_psnr)),
            gr.Image(found.unified, label=_decibels("Tokens", found.unified_psnr)),
            found.tokens,
        )

    button.click(told(work), [picture, tau], [slider, *shown, tokens], api_name="reconstruct", **ONE_AT_A_TIME)


def _output(label: str) -> gr.Image:
    return gr.Image(label=label, interactive=False, format="png", min_width=150, height=220, buttons=[])


def _caption_tab(parts: Parts, paths: list[Path]) -> None:
    enabled = _reason(parts, "caption")
    with gr.Row():
        with gr.Column(min_width=300):
            picture = _picture(paths, enabled)
            beams = gr.Slider(1, functions.MAX_BEAMS, 1, step=1, label="Beams (1: greedy)", interactive=enabled)
            button = gr.Button("Describe", variant="primary", interactive=enabled)
        with gr.Column(min_width=300):
            text = gr.Textbox(label="Caption", interactive=False, lines=3, buttons=["copy"])

    def work(path: str, width: float) -> str:
        return functions.caption(parts.model, functions.read_upload(path), int(width))

    if enabled:
        button.click(told(work), [picture, beams], text, api_name="caption", **ONE_AT_A_TIME)


def _zeroshot_tab(parts: Parts, paths: list[Path]) -> None:
    enabled = _reason(parts, "zeroshot")
    with gr.Row():
        with gr.Column(min_width=300):
            picture = _picture(paths, enabled)
            typed = gr.Textbox(
                LABELS,
                lines=5,
                max_lines=12,
                label="Labels, one a line",
                max_length=functions.MAX_LETTERS,
                interactive=enabled,
            )
            button = gr.Button("Classify", variant="primary", interactive=enabled)
        with gr.Column(min_width=300):
            label = gr.Label(label="Probability of each label", num_top_classes=10)

    def work(path: str, labels: str) -> dict[str, float]:
        return functions.zeroshot(parts.model, functions.read_upload(path), labels)

    if enabled:
        button.click(told(work), [picture, typed], label, api_name="zeroshot", **ONE_AT_A_TIME)


def _generate_tab(parts: Parts) -> None:
    generator = parts.generator
    enabled = _reason(parts, "generate")
    sampler = None if generator is None else generator.sampler()
    with gr.Row():
        with gr.Column(min_width=300):
            text = gr.Textbox(
                "a lion by the water",
                label="What to draw (text, or a class's name)",
                max_length=functions.MAX_LETTERS,
                interactive=enabled,
            )
            count = gr.Slider(1, functions.MAX_PICTURES, 4, step=1, label="Pictures", interactive=enabled)
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=functions.MAX_SEED, interactive=enabled)
            guidance = gr.Slider(
                1,
                functions.MAX_GUIDANCE,
                1.0 if sampler is None else sampler.guidance,
                step=0.1,
                label="Guidance",
                interactive=enabled,
            )
            steps = gr.Slider(
                1,
                functions.MAX_STEPS,
                50 if sampler is None else min(sampler.steps, functions.MAX_STEPS),
                step=1,
                label="Steps",
                interactive=enabled,
            )
            button = gr.Button("Generate", variant="primary", interactive=enabled)
        with gr.Column(min_width=300):
            gallery = gr.Gallery(
                label="Pictures", columns=2, height="auto", object_fit="contain", format="png", interactive=False
            )
    if generator is None:
        return

    def work(*values: Any) -> Iterator[list[Image.Image]]:
        return functions.generate(generator, *values)

    inputs = [text, count, seed, guidance, steps]
    gr.on([button.click, text.submit], told(work), inputs, gallery, api_name="generate", **ONE_AT_A_TIME)


def _ask_tab(parts: Parts, paths: list[Path], question: str) -> None:
    vlm = parts.vlm
    enabled = _reason(parts, "ask")
    if vlm is not None and vlm.name == "demo":
        gr.Markdown("The demo VLM knows 100 drawn things. It says whether one is in a scene, and little else.")
    with gr.Row():
        with gr.Column(min_width=300):
            picture = _picture(paths, enabled)
            text = gr.Textbox(question, label="Question", max_length=functions.MAX_LETTERS, interactive=enabled)
            button = gr.Button("Ask", variant="primary", interactive=enabled)
        with gr.Column(min_width=300):
            answer = gr.Textbox(label="Answer", interactive=False, lines=4, buttons=["copy"])
    if vlm is None:
        return

    def work(path: str, asked: str) -> Iterator[str]:
        return functions.ask(vlm, functions.read_upload(path), asked)

    gr.on([button.click, text.submit], told(work), [picture, text], answer, api_name="ask", **ONE_AT_A_TIME)
