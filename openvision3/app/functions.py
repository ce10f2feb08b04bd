"""What the page's tabs do, without the page: pictures and texts in, pictures and texts out."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from PIL import Image

from openvision3.config import OpenVisionError, SceneConfig
from openvision3.data.transforms import crop_back, decode_image, preprocess, to_pil
from openvision3.evaluation.gallery import token_pictures
from openvision3.evaluation.reconstruction import psnr
from openvision3.evaluation.samples import evaluating, to_uint8
from openvision3.losses import add_noise
from openvision3.model.openvision3 import OpenVision3
from openvision3.training.noise import draw_noise

if TYPE_CHECKING:
    from openvision3.generation.generator import Generator
    from openvision3.vlm.folder import VLM

MAX_PIXELS = 50_000_000  # of an upload; 150 MB as RGB
MAX_SIDE = 512  # pixels; what a reconstruction is reduced to
MAX_TAU = 2.0
MAX_LABELS, MAX_LETTERS = 200, 2000  # of zero-shot labels, and of any text
MAX_PICTURES, MAX_STEPS, MAX_GUIDANCE = 8, 100, 20.0
MAX_SEED = 2**31 - 1
MAX_BEAMS = 8
MAX_WORDS, MAX_SECONDS = 128, 60.0  # of an answer
BENCHMARK = SceneConfig()

Part = TypeVar("Part")


@dataclass
class Parts:
    """The models behind the page; `reasons` says for a tab's name why it can't be used."""

    model: OpenVision3
    generator: "Generator | None" = None
    vlm: "VLM | None" = None
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Reconstruction:
    """A picture as the model sees it; None where a part is missing. PSNR in dB of 8-bit pictures."""

    original: Image.Image
    tokens: Image.Image  # three principal components as red, green and blue, a block of pixels each
    vae: Image.Image | None
    vae_psnr: float | None
    unified: Image.Image | None
    unified_psnr: float | None


def load_parts(model: OpenVision3, generator: str, vlm: str) -> Parts:
    """Loads what there is beside the model: a generator's and a VLM's folder, or "demo"; what is missing has a reason.

    A folder that the user named and that can't be loaded raises `OpenVisionError`; the embedded ones may be missing.
    """
    parts = Parts(model)
    config = model.config
    if config.decoder is None:
        parts.reasons["reconstruct"] = "this model has no decoder: the VAE alone and the tokens are shown"
    elif config.input == "pixels":
        parts.reasons["reconstruct"] = "this model reads pixels: there is no VAE to compare with"
    if config.text_decoder is None:
        parts.reasons["caption"] = "this model has no text decoder: it writes no captions"
    if config.text_encoder is None:
        parts.reasons["zeroshot"] = "this model has no text encoder: it can't compare a picture with words"

    def other(tab: str, name: str, load: Callable[[], Part]) -> Part | None:
        try:
            return load()
        except (OpenVisionError, ImportError) as error:
            if name != "demo":
                raise
            missing = isinstance(error, ImportError)
            parts.reasons[tab] = "pip install openvision3[vlm] is needed" if missing else str(error)
            return None

    from openvision3.generation.generator import load_generator

    def load_talker() -> "VLM":
        from openvision3.vlm.folder import load_vlm

        return load_vlm(vlm, model.device)

    parts.generator = other("generate", generator, lambda: load_generator(generator, device=model.device))
    parts.vlm = other("ask", vlm, load_talker)
    return parts


def read_upload(path: str | Path | None) -> Image.Image:
    """An uploaded picture as upright RGB. Raises `OpenVisionError`, in one line without the server's paths."""
    if path is None:
        raise OpenVisionError("there is no picture yet: choose one, or an example below")
    path = Path(path)
    try:
        with path.open("rb") as file:
            return decode_image(file, path.name, MAX_PIXELS)
    except OSError:
        raise OpenVisionError(f"{path.name}: can't be read") from None


def prepared(model: OpenVision3, picture: Image.Image, square: bool) -> torch.Tensor:
    """(1, 3, H, W) in [-1, 1] on the model's device: the model's own square, or the picture's shape, padded."""
    size = model.config.image_size if square or model.config.external is not None else None
    pixels = preprocess(picture, size, MAX_SIDE, model.config.downsampling)[None]
    return pixels.to(model.device, model.logit_scale.dtype)


def reconstruct(model: OpenVision3, picture: Image.Image, tau: float = 0.0, seed: int = 0) -> Reconstruction:
    """The picture, the VAE's and the model's; noise of exactly sigma = `tau` (Eq. 3's upper end) goes on the tokens."""
    checked_number("noise", tau, 0, MAX_TAU)
    images = prepared(model, picture, square=False)
    size = picture.size if model.config.external is None else (images.shape[3], images.shape[2])
    step = model.config.downsampling
    grid = (images.shape[2] // step, images.shape[3] // step)
    original = crop_back(to_uint8(images.cpu()), size, MAX_SIDE)

    def compared(decoded: torch.Tensor) -> tuple[Image.Image, float]:
        kept = crop_back(decoded.float().cpu(), size, MAX_SIDE)
        return to_pil(kept[0]), float(psnr(original, to_uint8(kept)))

    vae, vae_psnr, unified, unified_psnr = None, None, None, None
    with evaluating(model):
        tokens = model.encode(images)
        _, epsilon = draw_noise(seed, [0], tokens.shape[1:], 1.0, tokens.device)
        unit = model.token_rms if model.config.noise_relative else 1.0
        noisy = add_noise(tokens, torch.full((1,), float(tau), device=tokens.device), epsilon, unit)
        noisy = noisy.to(tokens.dtype)
        if model.vae is not None:
            vae, vae_psnr = compared(model.vae.decode(model.vae.encode(images)))
        if model.config.decoder is not None:
            unified, unified_psnr = compared(model.decode(noisy, grid=grid))
        (colours,) = token_pictures(noisy.float(), grid)
    blocks = Image.fromarray(np.repeat(np.repeat(colours, step, axis=0), step, axis=1))
    shown = to_pil(crop_back(images.float().cpu(), size, MAX_SIDE)[0])
    return Reconstruction(shown, blocks, vae, vae_psnr, unified, unified_psnr)


def caption(model: OpenVision3, picture: Image.Image, beams: int = 1) -> str:
    """The model's caption of the picture's middle square; `beams` 1 is greedy, `MAX_BEAMS` the most."""
    checked_number("beams", beams, 1, MAX_BEAMS)
    with evaluating(model):
        return model.caption(prepared(model, picture, square=True), num_beams=int(beams))[0]


def zeroshot(model: OpenVision3, picture: Image.Image, typed: str) -> dict[str, float]:
    """Each typed label (one a line) with its probability. Raises `OpenVisionError` for none, or too many."""
    from openvision3.evaluation.retrieval import require_text_encoder
    from openvision3.evaluation.zeroshot import label_embeddings, label_prompts

    require_text_encoder(model, "zero-shot classification")
    labels = list(dict.fromkeys(line.strip() for line in checked_text(typed).splitlines() if line.strip()))
    if not 1 <= len(labels) <= MAX_LABELS:
        raise OpenVisionError(f"{len(labels)} labels: expected 1 to {MAX_LABELS}, one a line")
    with evaluating(model):
        _, texts = label_embeddings(model, [label_prompts(label) for label in labels])
        image = model.embed_image(prepared(model, picture, square=True)).float().cpu()
        probabilities = (model.temperature().float().cpu() * image @ texts.T).softmax(-1)[0]
    return dict(zip(labels, probabilities.tolist(), strict=True))


def generate(
    generator: "Generator", text: str, count: int, seed: int, guidance: float, steps: int
) -> Iterator[list[Image.Image]]:
    """The pictures so far of a text or a class name, each time that one is done; no further after `MAX_SECONDS`.

    Raises `OpenVisionError` where a number is out of bounds.
    """
    from openvision3.generation.sample import SamplerConfig

    text = checked_text(text)
    if not text:
        raise OpenVisionError("say what to draw: a panda, or a lion by the water")
    for name, value, low, high in (
        ("number", count, 1, MAX_PICTURES),
        ("seed", seed, 0, MAX_SEED),
        ("guidance", guidance, 1, MAX_GUIDANCE),
        ("steps", steps, 1, MAX_STEPS),
    ):
        checked_number(name, value, low, high)
    sampler = SamplerConfig(int(steps), guidance=float(guidance))
    pictures: list[Image.Image] = []
    end = time.monotonic() + MAX_SECONDS
    for index in range(int(count)):
        pictures.append(to_pil(generator.images([text], [index], int(seed), sampler)[0].cpu()))
        yield list(pictures)
        if time.monotonic() > end:
            break


def ask(vlm: "VLM", picture: Image.Image, text: str) -> Iterator[str]:
    """The answer so far, each time that it grows; it ends after `MAX_WORDS` tokens or `MAX_SECONDS`."""
    from openvision3.vlm.answering import question, stream

    text = checked_text(text)
    if not text:
        raise OpenVisionError("there is no question yet: ask something about the picture")
    said, end = "", time.monotonic() + MAX_SECONDS
    pieces = stream(vlm, [question(text)], [picture], MAX_WORDS)
    try:
        for piece in pieces:
            said += piece
            yield said.strip()
            if time.monotonic() > end:
                break
    finally:
        pieces.close()  # type: ignore[attr-defined]  # which stops the model
    if not said.strip():
        raise OpenVisionError("the model's answer is empty")


def checked_number(name: str, value: Any, low: float, high: float) -> None:
    """Raises `OpenVisionError` for what is no number, or not from `low` to `high`."""
    if not isinstance(value, int | float):
        raise OpenVisionError(f"{name} is no number: expected {low} to {high:g}")
    if not low <= value <= high:
        raise OpenVisionError(f"{name} is {value:g}: expected {low} to {high:g}")


def checked_text(text: Any) -> str:
    """What was typed, stripped. Raises `OpenVisionError` where it is too long, or no text."""
    if not isinstance(text, str) or len(text) > MAX_LETTERS:
        raise OpenVisionError(f"the text must have at most {MAX_LETTERS} letters")
    return text.strip()


def write_examples(folder: Path, size: int, scenes: SceneConfig = BENCHMARK, count: int = 4) -> tuple[list[Path], str]:
    """Renders the first of the benchmark's scenes as PNG files; returns them and a question about the first."""
    from openvision3.data import demo, grammar

    folder.mkdir(parents=True, exist_ok=True)
    drawn = [demo.scene(scenes, demo.BENCHMARK, demo.BENCHMARK_SEED, index) for index in range(count)]
    paths = [folder / f"scene{index}.png" for index in range(count)]
    for path, scene in zip(paths, drawn, strict=True):
        Image.fromarray(demo.render(scene, size)).save(path)
    return paths, grammar.presence_question(drawn[0].things[0].name)
