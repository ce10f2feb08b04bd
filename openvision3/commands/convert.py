"""`ov3 convert`: a model to another form, verified on the spot: folder, released layout, ONNX, transformers."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from openvision3.config import OpenVisionError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from openvision3.hub.verify import Difference
    from openvision3.model.openvision3 import OpenVision3

Target = Literal["folder", "released", "onnx", "onnx-vae", "transformers", "transformers-vision"]
Dtype = Literal["fp32", "bf16", "fp16"]
WantedVAE = Literal["any", "embedded", "inside"]  # "inside": that of the source's folder alone
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]

PICKLES = ("*.bin", "*.pt", "*.pth")
TOLERANCES: dict[Dtype, float] = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2}  # below fp32, it is the rounding of weights
ONNX_TOLERANCE = 1e-4
_TRANSFORMERS = (
    "configuration_openvision3.py",
    "modeling_openvision3.py",
    "image_processing_openvision3.py",
    "tokenizer.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "model.safetensors",
    "README.md",
    "config.json",
)
# the files of each form, in the order in which they are put in place; without the last there is no model
FILES: dict[Target, tuple[str, ...]] = {
    "folder": ("model.safetensors", "tokenizer.json", "README.md", "config.json"),
    "released": ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "README.md", "open_clip_config.json"),
    "onnx": ("model.onnx.data", "README.md", "model.onnx"),
    "onnx-vae": ("model.onnx.data", "README.md", "model.onnx"),
    "transformers": _TRANSFORMERS,
    "transformers-vision": _TRANSFORMERS,
}


@dataclass(frozen=True)
class Options:
    """What the forms' writers need to know."""

    to: Target
    dtype: Dtype
    size: int | None
    pickle: bool
    include_vae: bool

    def __post_init__(self) -> None:
        if self.to.startswith("onnx") and self.dtype != "fp32":
            raise OpenVisionError(f"ONNX is written in fp32: leave --dtype {self.dtype} out")
        if self.for_transformers and self.dtype != "fp32":
            raise OpenVisionError(
                f"--to {self.to} is written in fp32: leave --dtype {self.dtype} out, and load it with "
                "from_pretrained(folder, dtype=...)"
            )
        if self.include_vae and not self.for_transformers:
            raise OpenVisionError("--include-vae is for --to transformers and transformers-vision")
        if self.size is not None and not self.to.startswith("onnx"):
            raise OpenVisionError("--size fixes the pictures' size of --to onnx and onnx-vae; other forms have no such")
        if self.pickle and self.to != "released":
            raise OpenVisionError("--bin is for --to released")

    @property
    def for_transformers(self) -> bool:
        return self.to.startswith("transformers")

    @property
    def vae(self) -> "WantedVAE":
        """Which VAE has to come along."""
        if self.to == "onnx-vae" or self.include_vae:
            return "any"
        return "embedded" if self.for_transformers else "inside"

    @property
    def torch_dtype(self) -> "torch.dtype":
        import torch

        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.dtype]


def convert(
    source: tyro.conf.Positional[str],
    out: Path,
    to: Target = "folder",
    dtype: Dtype = "fp32",
    size: int | None = None,
    bin: Flag = False,
    include_vae: Flag = False,
    overwrite: Flag = False,
) -> int:
    """Writes a model in another form, after running both on the same input.

    The largest difference is printed; above the bound, nothing is written. A pickle is read by torch's loader that
    builds tensors and nothing else; one that holds more is refused.

    Args:
        source: a released checkpoint (folder or hub id), or a model folder, also one whose weights are a pickle.
        out: folder to write.
        to: folder: a model folder. released: the encoder in the layout of the released weights, which is open_clip's.
            onnx: the encoder, latents in. onnx-vae: VAE and encoder, images in. transformers: every part, as
            OpenVision3Model. transformers-vision: the encoder, with code that runs where openvision3 is not installed.
        dtype: of the weights on disk, for folder and released.
        size: ONNX: the only size of pictures, pixels (default: any; the model's own where its positions are a table).
        bin: released: also the pickle open_clip_pytorch_model.bin, as the authors published theirs.
        include_vae: transformers: also the weights of a VAE that has a licence of its own (the embedded one is always
            in); without them the encoder takes latents.
        overwrite: replace the model in `out`.
    """
    from openvision3.hub.verify import own_encoder

    options = Options(to, dtype, size, bin, include_vae)
    check_free(out, to, overwrite)
    with tempfile.TemporaryDirectory(prefix="ov3-convert-") as scratch:
        model, read = load_source(source, Path(scratch), options.vae)
        own_encoder(model)
        with staging(out) as stage:
            written = write(model, stage, options)
            checks = [*read, verify(model, stage, options)]
            check_free(out, to, overwrite)  # again: all this took a while
            install(stage, out, FILES[to])
    print(f"{out}: {written}")
    if missing := left_out(model, to):
        print(f"left out, for which this form has no place: {', '.join(missing)}")
    for check in checks:
        print(check)
    return 0


def load_source(source: str, scratch: Path, vae: WantedVAE) -> "tuple[OpenVision3, list[Difference]]":
    """The model, fp32 on the CPU, and how it compares with open_clip's tower where that can read the source.

    Its VAE comes along where it is inside, or wanted; others are named in the config and need not be had.
    """
    import openvision3
    from openvision3.hub.load import model_folder
    from openvision3.hub.released import is_released_folder
    from openvision3.model.folder import CONFIG, TOKENIZER, WEIGHTS

    folder = model_folder(source)
    if is_released_folder(folder):
        model = openvision3.load(folder, vae=_vae(folder, vae), device="cpu")
        check = _through_open_clip(folder, model, TOLERANCES["fp32"], "open_clip's tower, of the source")
        return model, [check] if check else []
    weights = pickled_weights(folder, WEIGHTS)
    if weights is None:
        return openvision3.load(folder, vae=_vae(folder, vae), device="cpu"), []
    write_safetensors(read_state(weights), scratch / WEIGHTS)
    for extra in (CONFIG, TOKENIZER):
        if (folder / extra).is_file():
            shutil.copyfile(folder / extra, scratch / extra)
    try:
        return openvision3.load(scratch, vae=_vae(scratch, vae), device="cpu"), []
    except OpenVisionError as error:  # which names the scratch copies
        named = str(error).replace(str(scratch / WEIGHTS), str(weights)).replace(str(scratch), str(folder))
        raise OpenVisionError(named) from None


def write(model: "OpenVision3", stage: Path, options: Options) -> str:
    """Writes the form into the empty folder `stage`, and says what it is."""
    if options.to == "folder":
        model.save(stage, dtype=options.torch_dtype)
        return f"{', '.join(f'{part} {count:,}' for part, count in model.num_parameters().items())} parameters"
    if options.for_transformers:
        from transformers.utils import logging

        from openvision3.hub.hf import save_transformers

        logging.disable_progress_bar()
        vision = options.to == "transformers-vision"
        save_transformers(model, stage, vision_only=vision, include_vae=options.include_vae)
        kind = json.loads((stage / "config.json").read_text(encoding="utf-8"))["architectures"][0]
        reads = "pictures" if model.vae is not None or model.config.input == "pixels" else "latents: no VAE is inside"
        return f"{kind}, reads {reads}"
    if options.to == "released":
        from openvision3.hub.open_clip import released_state, save_released

        save_released(model, stage, options.torch_dtype, options.pickle)
        return f"encoder, {len(released_state(model))} tensors"
    from openvision3.hub.onnx import export_onnx, input_name

    through_vae = options.to == "onnx-vae"
    any_size = export_onnx(model, stage, through_vae, options.size)
    side = options.size or model.config.image_size
    sizes = "pictures of any size" if any_size else f"pictures of {side} x {side} pixels alone"
    return f"input {input_name(model, through_vae)}, outputs tokens and pooled, {sizes}"


def verify(model: "OpenVision3", stage: Path, options: Options) -> "Difference":
    """Runs the model and what was written, read back from disk; raises `OpenVisionError` where they differ."""
    import openvision3
    from openvision3.hub import verify as v

    if options.to == "folder":
        again = openvision3.load(stage, vae=_vae(stage, "inside"), device="cpu")
        return v.compare(v.all_outputs(model), v.all_outputs(again), TOLERANCES[options.dtype], "openvision3")
    if options.for_transformers:
        from openvision3.hub.hf.convert import transformers_outputs

        gone = {"VAE pictures"} if model.config.decoder is None else set()  # nothing there decodes
        if options.to == "transformers-vision":
            gone = {"decoder", "token rms", "text encoder", "temperature", "text decoder", "VAE pictures"}
        expected = {name: tensor for name, tensor in v.all_outputs(model).items() if name not in gone}
        return v.compare(expected, transformers_outputs(stage, model.config), TOLERANCES["fp32"], "transformers")
    if options.to == "released":
        if difference := _through_open_clip(stage, model, TOLERANCES[options.dtype], "open_clip's tower"):
            return difference
        inputs = v.random_inputs(model.config, v.native_grid(model.config), batch=2)
        again = v.encoder_outputs(openvision3.load(stage, vae=None, device="cpu"), inputs)
        through = "openvision3 (open_clip_torch is not installed)"
        return v.compare(v.encoder_outputs(model, inputs), again, TOLERANCES[options.dtype], through)
    from openvision3.hub.onnx import MODEL, OnnxEncoder

    exported, vae = OnnxEncoder(stage / MODEL), options.to == "onnx-vae"
    rows, columns = v.native_grid(model.config)
    if options.size is not None:
        rows = columns = options.size // model.config.downsampling
    grids = [((rows, columns), 2), ((rows, columns), 1)]
    if exported.any_size:
        grids.append(((max(1, rows - 1), columns + 2), 3))
    cases = [v.random_inputs(model.config, grid, batch, images=vae) for grid, batch in grids]
    return v.compare_each(
        cases, lambda x: v.encoder_outputs(model, x, through_vae=vae), exported, ONNX_TOLERANCE, "onnxruntime"
    )


def left_out(model: "OpenVision3", to: Target) -> list[str]:
    """The model's parts that the form has no place for."""
    if to in ("folder", "transformers"):
        return []
    config = model.config
    parts = {
        "decoder": config.decoder,
        "text encoder": config.text_encoder,
        "text decoder": config.text_decoder,
        "VAE": model.vae if to in ("released", "onnx") else None,
    }
    return [name for name, part in parts.items() if part is not None]


def check_free(out: Path, to: Target, overwrite: bool) -> None:
    """Refuses a folder that holds anything, unless `overwrite` and it holds a model of the same form."""
    if not out.exists():
        return
    names = {path.name for path in out.iterdir()} if out.is_dir() else {""}
    if names and not overwrite:
        raise OpenVisionError(f"{out} exists already; choose another folder or pass --overwrite")
    marks = {files[-1] for files in FILES.values()} & names
    replaceable = marks == {FILES[to][-1]} and _is_ours(out, to)
    broken_off = names <= set(FILES[to][:-1])
    if names and not replaceable and not broken_off:
        raise OpenVisionError(f"{out} holds something that is no model of this form; choose another folder")


def _is_ours(folder: Path, to: Target) -> bool:
    """Whether the file that marks a model of that form is of one, and not another library's or a run's."""
    from openvision3.hub.encoders import encoder_kind

    if to.startswith("onnx"):
        return True
    try:
        if to.startswith("transformers"):
            config = json.loads((folder / FILES[to][-1]).read_text(encoding="utf-8"))
            return str(config.get("model_type")).startswith("openvision3")
        return encoder_kind(folder) == "openvision3"
    except (OpenVisionError, OSError, ValueError, AttributeError):
        return False


@contextlib.contextmanager
def staging(out: Path) -> Iterator[Path]:
    """An empty folder on the file system of `out`, removed at the end; the folders above `out` need not exist yet."""
    home = next(path for path in out.absolute().parents if path.exists())
    if not home.is_dir():
        raise OpenVisionError(f"{out} can't be made: {home} is a file")
    with tempfile.TemporaryDirectory(prefix=".ov3-convert-", dir=home) as name:
        stage = Path(name) / "model"  # not the temporary folder itself, which nobody else may read
        stage.mkdir()
        yield stage


def install(stage: Path, out: Path, files: tuple[str, ...]) -> None:
    """Moves what is in `stage` to `out`: by one rename where nothing is there, else file by file, the mark last."""
    assert {path.name for path in stage.iterdir()} <= set(files)
    for path in stage.iterdir():
        shutil.copymode(stage / "README.md", path)  # safetensors' files may be read by their owner alone
    out.parent.mkdir(parents=True, exist_ok=True)
    if not out.exists():
        stage.rename(out)
        return
    (out / files[-1]).unlink(missing_ok=True)
    for name in files:
        if (stage / name).is_file():
            (stage / name).replace(out / name)
        else:
            (out / name).unlink(missing_ok=True)


def pickled_weights(folder: Path, weights: str) -> Path | None:
    """The file of a model folder's weights where that is a pickle: under the right name, or under a pickle's."""
    from openvision3.model.folder import is_pickle

    if (folder / weights).is_file():
        return folder / weights if is_pickle(folder / weights) else None
    return next((path for pattern in PICKLES for path in sorted(folder.glob(pattern))), None)


def read_state(path: Path) -> "dict[str, Tensor]":
    """The tensors of a pickled state dict, alone or under "state_dict" or "model".

    Raises `OpenVisionError` for a pickle that asks for anything but tensors and plain containers.
    """
    import torch

    from openvision3.hub.released import check_tensors

    try:
        with path.open("rb") as file:  # by its content: torch chooses the reader of a path by its name
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can make its reader raise almost anything
        reason = " ".join(str(error).split())[:120]
        raise OpenVisionError(f"{path} is refused: it is not a plain table of tensors ({reason})") from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    check_tensors(path, state)
    return state


def write_safetensors(state: "dict[str, Tensor]", path: Path) -> None:
    """Writes tensors (shared memory is copied) as safetensors."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, path)


def _vae(folder: Path, wanted: WantedVAE) -> Literal["auto"] | None:
    """How a folder is to be loaded for that VAE to come along."""
    from openvision3.hub.released import is_released_folder, read_released_config
    from openvision3.model.folder import CONFIG, read_description

    if wanted == "any":
        return "auto"
    if is_released_folder(folder):
        config, architecture = read_released_config(folder), None
    elif (folder / CONFIG).is_file():
        config, architecture = read_description(folder)
    else:
        return None
    named = config.input == "latents" and (config.vae.kind, config.vae.source) == ("tiny", "embedded")
    return "auto" if architecture is not None or (wanted == "embedded" and named) else None


def _through_open_clip(folder: Path, model: "OpenVision3", tolerance: float, through: str) -> "Difference | None":
    """How open_clip's tower, with a released folder's weights, compares with the model; None without open_clip."""
    from openvision3.hub import verify as v
    from openvision3.hub.open_clip import open_clip_tower

    tower = open_clip_tower(folder)
    if tower is None:
        return None
    inputs = v.random_inputs(model.config, v.native_grid(model.config), batch=2)
    pooled, tokens = tower(inputs)
    return v.compare(v.encoder_outputs(model, inputs), {"tokens": tokens, "pooled": pooled}, tolerance, through)
