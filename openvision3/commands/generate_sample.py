"""`ov3 generate sample`: pictures from a trained generator, each a function of (seed, its number)."""

import itertools
import json
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro
from PIL import Image

from openvision3 import files
from openvision3.commands import common
from openvision3.commands.contact_sheet import labelled_sheet
from openvision3.config import OpenVisionError
from openvision3.evaluation.picture_sets import OVERVIEW

if TYPE_CHECKING:
    from openvision3.distributed import World
    from openvision3.generation.generator import Generator
    from openvision3.generation.sample import SamplerConfig

RECORD, LIST, PACKED = "generation.json", "samples.jsonl", "samples.npz"
FEW, ON_SHEET = 8, 64  # pictures of each text where no number is given; on the sheet at most
MAX_PICTURES, MAX_LINE = 10_000_000, 10_000


@dataclass(frozen=True)
class Wanted:
    """One picture to draw."""

    text: str  # what the generator reads
    label: str = ""  # the class that it is measured by, where it is known


@dataclass(frozen=True)
class SampleOptions:
    """What is drawn, how, and where it goes."""

    generator: str = "demo"  # "demo", a generator's folder, or its run's
    model: str = ""  # the frozen model; empty: the one that the generator names
    prompt: tuple[str, ...] = ()  # texts to draw, each `num` times
    class_: Annotated[tuple[str, ...], tyro.conf.arg(name="class")] = ()  # class names (or numbers), each `num` times
    prompts: Path | None = None  # file of texts, one a line; or .jsonl with "prompt", and "class" to be measured by
    num: int = 0  # pictures of each text; 0: 8, or with neither texts nor classes one of each class
    per_class: int = 0  # of every class so many, in the order of the classes; with --num as the total
    seed: int = 0
    steps: int = 0  # 0: the generator's own
    solver: Literal["euler", "heun"] = "euler"
    guidance: float = 0.0  # scale of classifier-free guidance; 0: the generator's own; 1: none
    guidance_from: float = 0.0  # guided while t is in this interval; t = 1 is noise
    guidance_to: float = 1.0
    autoguidance: str = ""  # folder of a weaker generator of the same tokens, which guides in place of the null class
    batch_size: int = 16
    device: str = "auto"
    dtype: Literal["fp32", "bf16"] = "fp32"  # of the arithmetic
    out: Path = Path("samples")  # folder
    npz: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # also all pictures in one samples.npz, as ADM's are
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


def sample(options: Annotated[SampleOptions, tyro.conf.arg(name="")] = SampleOptions()) -> int:
    """Draws pictures: PNG files, a list of what each shows (samples.jsonl) and a sheet. Goes on where it was stopped.

    The k-th picture of a seed is the same for any batch size and number of devices (`torchrun ... -m openvision3
    generate sample`), beyond rounding.
    """
    from openvision3.generation.generator import load_generator
    from openvision3.training.parallel import open_world

    with open_world(options.device) as (world, device):
        generator = load_generator(options.generator, options.model, options.autoguidance, device)
        sampler = chosen_sampler(options, generator)
        wanted = wanted_pictures(options, generator)
        world.agree(lambda: begin(options, generator, sampler, wanted))
        if world.rank == 0 and (said := unlearned(generator.description.names, [item.text for item in wanted])):
            print(said, file=sys.stderr)
        draw(options, generator, sampler, wanted, world)
        world.gather_objects(None)  # all have written theirs
        if world.rank == 0:
            finish(options, wanted)
            print(options.out)
    return 0


def chosen_sampler(options: SampleOptions, generator: "Generator") -> "SamplerConfig":
    """The options' sampler, with the generator's own where they say nothing."""
    from openvision3.generation.sample import SamplerConfig, check_sampler

    told = generator.description
    sampler = SamplerConfig(
        options.steps or told.steps,
        options.solver,
        options.guidance or (told.guidance if not options.autoguidance else 1.0),
        options.guidance_from,
        options.guidance_to,
    )
    check_sampler(sampler)
    if options.autoguidance and not options.guidance:
        raise OpenVisionError("--autoguidance needs its scale: --guidance 1.42, say")
    return sampler


def wanted_pictures(options: SampleOptions, generator: "Generator") -> list[Wanted]:
    """The pictures to draw, in their order. Raises `OpenVisionError` where nothing is named, or too much."""
    description = generator.description
    if options.num < 0 or options.per_class < 0 or options.batch_size < 1:
        raise OpenVisionError("--num and --per-class must be at least 0, --batch-size at least 1")
    of_text = description.generator.condition == "text"
    texts = [Wanted(text) for text in options.prompt]
    if options.prompts is not None:
        texts += read_prompts(options.prompts)
    texts += [Wanted(class_prompt(name) if of_text else name, name) for name in options.class_]
    if texts and options.per_class:
        raise OpenVisionError("--per-class draws all classes: leave out --prompt, --prompts and --class")
    if texts:
        each = options.num or (1 if options.prompts is not None else FEW)
        wanted = [item for item in texts for _ in range(each)]
    elif of_text:
        raise OpenVisionError('this generator draws texts: give --prompt "a lion by the water", or --prompts FILE')
    else:
        names = description.classes or tuple(map(str, range(description.generator.num_classes)))
        each = options.per_class or 1
        every = [Wanted(name, name) for name in names for _ in range(each)]
        wanted = every[: options.num] if options.num else every
        if options.num > len(every):
            raise OpenVisionError(f"--num {options.num} is more than {each} of each of {len(names)} classes")
    if len(wanted) > MAX_PICTURES:
        raise OpenVisionError(f"{len(wanted):,} pictures are too many for one command: at most {MAX_PICTURES:,}")
    return wanted


def unlearned(names: Sequence[str], texts: Sequence[str]) -> str:
    """One line on the prompts that name nothing, or other things, than what a generator of scenes has seen; or ""."""
    from openvision3.data import grammar

    if not names:
        return ""
    unknown: dict[str, None] = {}
    for text in dict.fromkeys(texts):
        things = grammar.parse(text).things
        unknown |= dict.fromkeys([name for name in things if name not in names] if things else [text])
    if not unknown:
        return ""
    first = ", ".join(repr(what[:80]) for what in list(unknown)[:3]) + (", ..." if len(unknown) > 3 else "")
    return (
        f"note: this generator never saw {first}; it was trained on scenes of {len(names)} things (`names` in its "
        f"config.json: {', '.join(names[:3])}, ...), and draws something else for others"
    )


def class_prompt(name: str) -> str:
    """A thing's name as the demo's captions say it: "a panda"."""
    from openvision3.data.grammar import with_article

    return with_article(name)


def read_prompts(path: Path) -> list[Wanted]:
    """The texts of a file: lines, or JSON lines with "prompt" and perhaps "class". Raises `OpenVisionError`."""
    found: list[Wanted] = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(itertools.islice(file, MAX_PICTURES), start=1):
                if len(line) > MAX_LINE:
                    raise OpenVisionError(f"{path}, line {number}: longer than {MAX_LINE} letters")
                if not line.strip():
                    continue
                if path.suffix != ".jsonl":
                    found.append(Wanted(line.strip()))
                    continue
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                    raise OpenVisionError(f'{path}, line {number}: expected {{"prompt": "..."}}')
                found.append(Wanted(row["prompt"], str(row.get("class", ""))))
    except UnicodeDecodeError:
        raise OpenVisionError(f"{path} is no UTF-8 text") from None
    except ValueError as error:
        raise OpenVisionError(f"{path} is not valid JSON lines: {error}") from None
    if not found:
        raise OpenVisionError(f"{path} holds no prompts")
    return found


def begin(options: SampleOptions, generator: "Generator", sampler: "SamplerConfig", wanted: Sequence[Wanted]) -> None:
    """Enters the folder: a new one, or one that the same command began. Raises `OpenVisionError` for any other."""
    from dataclasses import asdict

    record: dict[str, Any] = {
        "generator": asdict(generator.description),
        "sampler": asdict(sampler),
        "autoguidance": options.autoguidance,
        "seed": options.seed,
        "dtype": options.dtype,
        "pictures": len(wanted),
        "texts": list(dict.fromkeys(item.text for item in wanted)),
    }
    record = json.loads(json.dumps(record))
    path = options.out / RECORD
    if options.out.exists() and any(options.out.iterdir()):
        old = json.loads(path.read_text()) if path.is_file() else None
        if old is None or (old != record and not options.overwrite):
            raise OpenVisionError(
                f"{options.out} holds other pictures; choose another folder (--out)"
                + (" or pass --overwrite" if old is not None else "")
            )
        if old != record:
            for name in [*(f"{number:06d}.png" for number in range(old["pictures"])), LIST, OVERVIEW, PACKED]:
                (options.out / name).unlink(missing_ok=True)
    common.write_json(path, record, overwrite=True)


def picture_path(folder: Path, number: int) -> Path:
    """Where the picture of a number lies."""
    return folder / f"{number:06d}.png"


def draw(
    options: SampleOptions, generator: "Generator", sampler: "SamplerConfig", wanted: Sequence[Wanted], world: "World"
) -> None:
    """Draws this process's share of the pictures that are not there yet."""
    share = range(len(wanted) * world.rank // world.size, len(wanted) * (world.rank + 1) // world.size)
    missing = [number for number in share if not picture_path(options.out, number).exists()]
    with common.Progress(len(missing), "pictures") as progress:
        for start in range(0, len(missing), options.batch_size):
            numbers = missing[start : start + options.batch_size]
            texts = [wanted[number].text for number in numbers]
            images = generator.images(texts, numbers, options.seed, sampler, options.dtype)
            pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            for number, picture in zip(numbers, pixels, strict=True):
                with files.whole_file(picture_path(options.out, number)) as temporary:
                    Image.fromarray(picture).save(temporary, format="PNG")
            progress.advance(len(numbers))


def finish(options: SampleOptions, wanted: Sequence[Wanted]) -> None:
    """Writes what each picture shows, a sheet of the first ones, and the npz where it was asked for."""
    names = [picture_path(options.out, number).name for number in range(len(wanted))]
    with files.whole_file(options.out / LIST) as temporary, temporary.open("w", encoding="utf-8") as file:
        for number, (name, item) in enumerate(zip(names, wanted, strict=True)):
            row = {"file": name, "prompt": item.text, "seed": options.seed, "number": number}
            file.write(json.dumps(row | ({"class": item.label} if item.label else {}), ensure_ascii=False) + "\n")
    step = max(1, len(wanted) // ON_SHEET)
    shown = range(0, len(wanted), step)[:ON_SHEET]
    sheet = labelled_sheet([(options.out / names[number], wanted[number].text) for number in shown])
    with files.whole_file(options.out / OVERVIEW) as temporary:
        sheet.save(temporary, format="PNG")
    if options.npz:
        write_npz(options.out / PACKED, [options.out / name for name in names])


def write_npz(path: Path, pictures: Sequence[Path]) -> None:
    """All pictures as `arr_0`, uint8 (N, H, W, 3), one at a time: as ADM's evaluation reads them."""
    first = np.asarray(Image.open(pictures[0]))
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(pictures), *first.shape)}
    with (
        files.whole_file(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_2_0(member, header)  # type: ignore[arg-type]
        for picture in pictures:
            member.write(np.ascontiguousarray(Image.open(picture)).tobytes())
