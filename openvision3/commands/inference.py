"""`ov3 info`, `reconstruct`, `caption` and `classify`: a model applied to pictures."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from openvision3.commands import common
from openvision3.commands.batching import BatchOptions, OutputOptions, Runner, checked_size, find, square
from openvision3.commands.common import ModelOptions
from openvision3.commands.pictures import Picture, is_picture_name
from openvision3.config import ModelConfig, OpenVisionError, to_dict

if TYPE_CHECKING:
    from torch import Tensor

    from openvision3.model.openvision3 import OpenVision3

Images = tyro.conf.Positional[tuple[Path, ...]]
Model = Annotated[ModelOptions, tyro.conf.arg(name="")]
Batching = Annotated[BatchOptions, tyro.conf.arg(name="")]
Output = Annotated[OutputOptions, tyro.conf.arg(name=""), tyro.conf.FlagCreatePairsOff]


def info(
    model: tyro.conf.Positional[str] = "demo",
    device: str = "cpu",
    size: int | None = None,
    output: Output = OutputOptions(),
) -> int:
    """Prints what a model is made of.

    Args:
        model: "demo", a model folder, or a hub id.
        device: where it is loaded.
        size: side of the square picture that FLOPs are counted for, pixels; the model's own by default.
    """
    common.refuse_existing(output.json, output.overwrite)
    options = ModelOptions(model=model, device=device)
    try:
        loaded, missing = common.load_model(options), ""
    except OpenVisionError as error:
        loaded, missing = common.load_model(options, with_vae=False), f" (can't be loaded: {error})"
    config = loaded.config
    size = checked_size(loaded, size or config.image_size)
    parameters, flops = loaded.num_parameters(), loaded.flops(size)
    parts = list(dict.fromkeys([*parameters, *flops]))
    side = size // config.downsampling
    common.print_table(
        f"{model} ({config.name})",
        ("part", "parameters", f"GFLOPs a picture of {size} px"),
        [
            (part, f"{parameters[part]:,}" if part in parameters else "", flops[part] / 1e9 if part in flops else "")
            for part in parts
        ],
    )
    print(f"tokens: {side} x {side} of width {config.encoder.width}, one for each {config.downsampling} pixels a side")
    print(f"positions: {_positions(config)}")
    print(f"embedding: {config.embed_dim} numbers; has {_abilities(loaded)}")
    vae, licence = config.vae, config.vae.licence or "not stated"
    if config.input == "latents":
        print(
            f"VAE: {vae.kind} from {vae.source}, licence {licence}, {vae.channels} channels at 1/{vae.factor}{missing}"
        )
    figures = {"model": model, "size": size, "parameters": parameters, "flops": flops, "config": to_dict(config)}
    common.write_json(output.json, figures, output.overwrite)
    return 0


def _positions(config: ModelConfig) -> str:
    side = config.image_size // config.downsampling
    if config.external is not None:
        return f"the encoder's own, for {side} x {side} tokens alone"
    if config.stored_positions:
        return f"a stored table for {side} x {side} tokens, interpolated at other sizes"
    if config.positions == "scaled":
        return f"computed; at other sizes spread over what {side} x {side} tokens cover"
    return "computed from row and column, at any size"


def _abilities(model: "OpenVision3") -> str:
    config = model.config
    parts = {
        "reconstruction": config.decoder,
        "search and zero-shot classification": config.text_encoder,
        "captions": config.text_decoder,
    }
    return ", ".join(["tokens", *(name for name, part in parts.items() if part is not None)])


def reconstruct(
    images: Images,
    model: Model = ModelOptions(),
    batching: Batching = BatchOptions(),
    output: Output = OutputOptions(),
    out: Path | None = None,
    suffix: str = ".reconstructed.png",
) -> int:
    """Encodes each picture to tokens, decodes them, and writes the picture beside its input.

    A picture keeps its size (reduced to --max-side) unless --size is given: it is padded to whole tokens by reflection,
    and cropped back. The PSNR printed compares 8-bit pictures of the size written.

    Args:
        images: pictures, and folders of pictures (their earlier outputs are left out).
        out: folder for the outputs, instead of beside each input.
        suffix: takes the place of each input's extension; its own extension is the format.
    """
    if not is_picture_name(suffix):
        raise OpenVisionError(f"--suffix {suffix!r} must end in a picture's extension, such as .png, .jpg or .webp")
    found = find(images, output, suffix, out)
    loaded = common.load_model(model)
    from openvision3.data.transforms import to_pil
    from openvision3.evaluation.reconstruction import psnr
    from openvision3.evaluation.samples import to_uint8

    figures: list[dict[str, Any]] = []

    def save(picture: Picture, pixels: "Tensor", score: float) -> None:
        assert picture.output is not None
        image = to_pil(pixels)
        with common.whole_file(picture.output, output.overwrite) as temporary:
            image.save(temporary)
        figures.append({"input": str(picture.path), "output": str(picture.output), "size": image.size, "psnr": score})

    def work(pictures: list[Picture], pixels: "Tensor") -> list[Callable[[], None]]:
        decoded = loaded.decode(loaded.encode(pixels), grid=token_grid(loaded, pixels)).float().cpu()
        before, after = to_uint8(pixels.cpu()), to_uint8(decoded)
        writers = []
        for i, picture in enumerate(pictures):
            height, width = picture.size
            score = float(psnr(before[i : i + 1, :, :height, :width], after[i : i + 1, :, :height, :width]))
            writers.append(partial(save, picture, decoded[i, :, :height, :width], score))
        return writers

    outcome = Runner(found, loaded, batching).run(work)
    mean = sum(figure["psnr"] for figure in figures) / len(figures) if figures else None
    if mean is not None:
        print(f"PSNR to the prepared pictures, mean of {len(figures)}: {mean:.2f} dB")
    return outcome.finish(output, {"model": model.model, "mean_psnr": mean, "pictures": figures})


def caption(
    images: Images,
    model: Model = ModelOptions(),
    batching: Batching = BatchOptions(),
    output: Output = OutputOptions(),
    num_beams: int = 1,
    max_length: int | None = None,
) -> int:
    """Prints a line for each picture: its path, a tab, its caption.

    Args:
        images: pictures, and folders of pictures.
        num_beams: beams of the search; 1 is greedy.
        max_length: tokens at most; the model's own limit by default.
    """
    found = find(images, output)
    loaded = common.load_model(model)
    figures: list[dict[str, Any]] = []

    def work(pictures: list[Picture], pixels: "Tensor") -> list[Callable[[], None]]:
        texts = loaded.caption(pixels, num_beams=num_beams, max_length=max_length)
        for picture, text in zip(pictures, texts, strict=True):
            print(f"{picture.path}\t{text}", flush=True)
            figures.append({"input": str(picture.path), "caption": text})
        return []

    outcome = Runner(found, loaded, square(loaded, batching)).run(work)
    return outcome.finish(output, {"model": model.model, "pictures": figures})


def classify(
    images: Images,
    labels: str = "",
    model: Model = ModelOptions(),
    batching: Batching = BatchOptions(),
    output: Output = OutputOptions(),
    templates: tuple[str, ...] = (),
    top: int = 5,
) -> int:
    """Prints a line for each picture: its path, then tab-separated the best labels with their probabilities.

    Args:
        images: pictures, and folders of pictures.
        labels: comma-separated, or a file with one a line; by default the demo model's own names.
        templates: texts with {} for the label, whose embeddings are averaged; by default "a {}" and a few like it.
        top: labels printed for each picture.
    """
    if top < 1:
        raise OpenVisionError(f"--top {top}: expected at least 1")
    names = read_labels(labels, model.model)
    prompts = [prompts_for(name, templates) for name in names]
    found = find(images, output)
    loaded = common.load_model(model)
    from openvision3.evaluation.retrieval import require_text_encoder
    from openvision3.evaluation.samples import evaluating
    from openvision3.evaluation.zeroshot import label_embeddings

    require_text_encoder(loaded, "zero-shot classification")
    with evaluating(loaded):
        _, classes = label_embeddings(loaded, prompts)
    figures: list[dict[str, Any]] = []

    def work(pictures: list[Picture], pixels: "Tensor") -> list[Callable[[], None]]:
        embeddings = loaded.embed_image(pixels).float().cpu()
        probabilities = (loaded.temperature().float().cpu() * embeddings @ classes.T).softmax(-1)
        best, order = probabilities.topk(min(top, len(names)))
        for i, picture in enumerate(pictures):
            ranked = {names[j]: p for j, p in zip(order[i].tolist(), best[i].tolist(), strict=True)}
            print("\t".join([str(picture.path), *(f"{name} {p:.3f}" for name, p in ranked.items())]), flush=True)
            figures.append({"input": str(picture.path), "labels": ranked})
        return []

    outcome = Runner(found, loaded, square(loaded, batching)).run(work)
    return outcome.finish(output, {"model": model.model, "pictures": figures})


def read_labels(labels: str, model: str) -> list[str]:
    """Labels from `a,b`, from a file with one a line, or the demo's names; raises `OpenVisionError` for none."""
    if labels:
        path = Path(labels)
        if "," not in labels and path.is_file():
            try:
                parts = path.read_text(encoding="utf-8").splitlines()
            except UnicodeDecodeError as error:
                raise OpenVisionError(f"{path}: not UTF-8 text: {error}") from None
        else:
            parts = labels.split(",")
        names = list(dict.fromkeys(part.strip() for part in parts if part.strip()))
        if names:
            return names
        raise OpenVisionError(f"--labels {labels!r} holds no label")
    if model == "demo":
        from openvision3.data.demo import scene_names

        return list(scene_names())
    raise OpenVisionError("give the labels to choose from: --labels a,b or --labels FILE")


def prompts_for(label: str, templates: Sequence[str] = ()) -> list[str]:
    """The texts whose mean embedding stands for a label: the templates', else the demo's own for the demo's names."""
    for template in templates:
        if "{}" not in template:
            raise OpenVisionError(f"--templates {template!r} has no {{}} for the label")
    if templates:
        return [template.replace("{}", label) for template in templates]
    from openvision3.evaluation.zeroshot import label_prompts

    return label_prompts(label)


def token_grid(model: "OpenVision3", pixels: "Tensor") -> tuple[int, int]:
    side = model.config.downsampling
    return pixels.shape[2] // side, pixels.shape[3] // side
