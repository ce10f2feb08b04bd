"""The command `ov3`: finds the command, imports only what it needs, and turns errors into one line and an exit code.

Exit codes: 0 all went well; 1 some inputs failed (each named on stderr, the others done); 2 wrong usage or a broken
model; 128 + N stopped by signal N.
"""

import difflib
import importlib
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from openvision3.config import OpenVisionError

DONE, SOME_FAILED, USAGE = 0, 1, 2
INTERRUPTED = 128 + signal.SIGINT


@dataclass(frozen=True)
class Command:
    """A command's one line of help, and the function that tyro turns into its options."""

    help: str
    module: str
    function: str
    takes_args: bool = False  # the function parses its own arguments (a list of strings)


COMMANDS: dict[str, Command] = {
    "quickstart": Command("train, measure and look at a small encoder, in minutes", "quickstart", "quickstart"),
    "info": Command("what a model is made of: parts, sizes, FLOPs", "inference", "info"),
    "encode": Command("pictures to unified tokens and embeddings (safetensors)", "encode", "encode"),
    "reconstruct": Command("pictures to tokens and back to pictures", "inference", "reconstruct"),
    "caption": Command("a caption for each picture", "inference", "caption"),
    "search": Command("the pictures of a folder that fit a text, or another picture, best", "search", "search"),
    "classify": Command("zero-shot: which of the labels fits each picture best", "inference", "classify"),
    "data make-demo": Command("write captioned scenes as indexed tars", "data", "make_demo"),
    "data index": Command("index tars, for random access and exact resume", "data", "index"),
    "data check": Command("read every sample of tars and report the unusable", "data", "check"),
    "data cache-latents": Command("the VAE latents of K crops a sample, to train from", "latents", "cache_latents"),
    "train": Command("train a recipe: ov3 train RECIPE [--field.sub value]", "train", "train", takes_args=True),
    "eval reconstruction": Command("PSNR, SSIM, LPIPS and Frechet distances", "evaluation", "reconstruction"),
    "eval zeroshot": Command("zero-shot classification, top-1 and top-5", "evaluation", "zeroshot"),
    "eval retrieval": Command("image-text retrieval, R@1/5/10 both ways", "evaluation", "retrieval"),
    "eval captioning": Command("caption exactness and CIDEr-D", "evaluation", "captioning"),
    "eval probe": Command("a linear probe on pooled embeddings", "evaluation", "probe"),
    "eval vae": Command("PSNR, SSIM, LPIPS of a frozen VAE alone", "evaluation", "vae"),
    "eval front": Command("a fast front against the VAE encoder it stands for", "front", "front"),
    "eval all": Command("all of these", "evaluation", "everything"),
    "generate stats": Command("exact statistics of a data set's tokens", "generate", "stats"),
    "generate train": Command("train a generator: ov3 generate train RECIPE", "generate", "train", takes_args=True),
    "generate sample": Command("pictures from a prompt or a class", "generate_sample", "sample"),
    "generate eval": Command("gFID, sFID, IS, precision, recall of pictures", "generate_eval", "generate_eval"),
    "vlm train": Command("LLaVA on a frozen encoder: ov3 vlm train RECIPE", "vlm_train", "train", takes_args=True),
    "vlm chat": Command("questions about a picture, in the terminal", "vlm_chat", "chat"),
    "vlm eval": Command("presence, counts, relations, captions; POPE, MME, ...", "vlm_eval", "vlm_eval"),
    "app": Command("a web page: reconstruct, caption, zero-shot, generate, ask", "app", "app"),
    "bench data": Command(
        "how fast training samples come, and how many cores feed a device", "bench_data", "bench_data"
    ),
    "bench front": Command("a fast encoder against FLUX.1's VAE encoder: cost at its size", "bench_front", "front"),
    "bench encode": Command("encoding and captions against others' public code", "bench_encode", "bench_encode"),
    "convert": Command("a model to a folder, the released layout or ONNX, verified", "convert", "convert"),
    "reproduce": Command("the paper's claims at laptop size: trainings, rules, verdicts", "reproduce", "reproduce"),
    "bench train": Command("the training step against one composed of public parts", "bench_train", "bench_train"),
    "assets list": Command("weights that are fetched by name, and which are here", "assets", "assets_list"),
    "assets fetch": Command("fetch weights by name", "assets", "assets_fetch"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; the entry point of `ov3`.

    `OV3_DEBUG=1` lets errors through with their traceback.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get("OV3_DEBUG", "") not in ("", "0")
    try:
        code = dispatch(args)
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # tyro and argparse: 0 after --help, 2 after wrong usage
        if isinstance(stop.code, str):
            return complain(stop.code)
        return stop.code or DONE
    except KeyboardInterrupt:
        print("ov3: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `ov3 ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return SOME_FAILED
    except Exception as error:
        if debug:
            raise
        code = getattr(error, "signal_number", 0)  # training's RunInterrupted: all is saved
        if not (getattr(error, "alike", False) and os.environ.get("RANK", "0") != "0"):
            complain(describe(error))
        if _in_a_world():  # the usual end could wait for the run's other processes
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(128 + code if code else USAGE)
        return 128 + code if code else USAGE


def dispatch(args: list[str]) -> int:
    """Finds the command that `args` begins with and runs it; raises `OpenVisionError` for one that there isn't."""
    if args[:1] in (["-h"], ["--help"]):
        print(overview())
        return DONE
    if args[:1] == ["--version"]:
        print(f"openvision3 {importlib.import_module('openvision3').__version__}")
        return DONE
    if not args:
        print(overview(), file=sys.stderr)
        return USAGE
    for length in (2, 1):
        name = " ".join(args[:length])
        if name in COMMANDS:
            return run(name, args[length:])
    return unknown(args)


def run(name: str, args: list[str]) -> int:
    """Imports the command's module, lets tyro parse `args`, and calls it; returns the exit code."""
    command = COMMANDS[name]
    function: Callable[..., int | None] = getattr(
        importlib.import_module(f"openvision3.commands.{command.module}"), command.function
    )
    if command.takes_args:
        return function(args) or DONE
    import tyro

    return tyro.cli(function, prog=f"ov3 {name}", args=args) or DONE


def unknown(args: list[str]) -> int:
    """Wrong or missing command: lists a group's commands, or names the nearest."""
    group = [name for name in COMMANDS if name.startswith(args[0] + " ")]
    if group:
        wanted = args[1:2]
        if wanted in (["-h"], ["--help"]):
            print(overview(group))
            return DONE
        said = f"{args[0]} has no command {wanted[0]!r}" if wanted else f"{args[0]} needs a command"
        raise OpenVisionError(f"{said}; it has {', '.join(name.split()[1] for name in group)}")
    names = sorted({name.split()[0] for name in COMMANDS})
    near = difflib.get_close_matches(args[0], names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "see ov3 --help"
    raise OpenVisionError(f"there is no command {args[0]!r}; {hint}")


def overview(names: Sequence[str] | None = None) -> str:
    """The list of commands that `ov3 --help` prints."""
    shown = names or list(COMMANDS)
    width = max(map(len, shown))
    lines = ["usage: ov3 COMMAND [OPTIONS]        (ov3 COMMAND --help for the options; ov3 --version)", ""]
    return "\n".join(lines + [f"  {name:<{width}}  {COMMANDS[name].help}" for name in shown])


def describe(error: Exception) -> str:
    """One line for the user. What should not happen also leaves its traceback in a file, named in the line."""
    text = " ".join(str(error).split())
    if isinstance(error, OpenVisionError) or hasattr(error, "signal_number"):
        return text
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename is not None else text
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory; a smaller --batch-size (or picture, or model) needs less"
    with tempfile.NamedTemporaryFile("w", prefix="ov3-error-", suffix=".txt", delete=False) as file:
        file.write("".join(traceback.format_exception(error)))
    return f"unexpected {type(error).__name__}: {text[:300]} (traceback in {file.name})"


def _in_a_world() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def complain(line: str) -> int:
    """Prints one line on stderr and returns the exit code for wrong usage."""
    print(f"ov3: {line}", file=sys.stderr)
    return USAGE


if __name__ == "__main__":
    sys.exit(main())
