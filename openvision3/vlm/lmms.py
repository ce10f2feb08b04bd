"""Public benchmarks of vision-language models, run by lmms-eval in an environment of its own."""

# lmms-eval and what it needs are in an environment of their own
# pyright: reportMissingImports=false

import contextlib
import json
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from openvision3.config import OpenVisionError
from openvision3.files import whole_file

# Ours: lmms-eval's. SEED, ScienceQA and MMMU as LLaVA reports them: with videos' frames, with pictures, validation.
SUITES = {
    "pope": "pope",
    "mme": "mme",
    "seed": "seedbench",
    "gqa": "gqa",
    "scienceqa": "scienceqa_img",
    "mmmu": "mmmu_val",
    "textvqa": "textvqa_val",
}
_SHOWN = 10  # errors


def run_lmms(
    suite: str,
    model: str,
    limit: int | None = None,
    out: Path | None = None,
    data: Path | None = None,
    batch_size: int = 8,
    device: str = "auto",
    dtype: str = "fp32",
) -> int:
    """Prints lmms-eval's scores of a model on a suite; 1 where answers are empty or failed, which are shown, else 0.

    `model`: "demo" or a folder. `limit`: so many of the first samples; None: all. `out`: a file for the scores and
    errors as JSON. `data` is a folder with copies of the hub's data sets, each in a folder of its name, such as
    `data/POPE`; without it, they come from the hub or from its cache. Raises `OpenVisionError` where lmms-eval is not
    installed, the model or the data can't be had, or the suite is unknown.
    """
    if suite not in SUITES:
        raise OpenVisionError(f"there is no suite {suite!r}: expected one of {', '.join(SUITES)}")
    if data is not None and not data.is_dir():
        raise OpenVisionError(f"{data} is no folder of data sets")
    figures = _evaluate(suite, model, limit, data, batch_size, device, dtype)
    if out is not None:
        with whole_file(out) as path:
            path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(f"{model} on {suite} (lmms-eval {figures['lmms_eval']}, {figures['asked']} answers)")
    for name, value in figures["scores"].items():
        print(f"{name:28} {value:.4f}")
    errors = figures["errors"]
    if errors:
        print(f"{len(errors)} of {figures['asked']} answers are empty or failed; they count as wrong:", file=sys.stderr)
        for error in errors[:_SHOWN]:
            print(f"  {error['task']} {error['sample']}: {error['reason']}", file=sys.stderr)
    return 1 if errors else 0


def _evaluate(
    suite: str, model: str, limit: int | None, data: Path | None, batch_size: int, device: str, dtype: str
) -> dict[str, Any]:
    try:
        from importlib.metadata import version

        from lmms_eval.evaluator import simple_evaluate
        from lmms_eval.models import get_model
        from lmms_eval.tasks import TaskManager
        from loguru import logger
    except ImportError as error:
        raise OpenVisionError(
            f"{suite} needs lmms-eval, in an environment of its own: `make .venv-lmms`, then .venv-lmms/bin/ov3 "
            f"in place of ov3; or pip install 'openvision3[vlm,bench]' ({error})"
        ) from None
    from tenacity import RetryError

    logger.remove()
    logger.add(sys.stderr, level="WARNING", format="{message}")
    try:
        asked: Any = get_model("openvision3")(model, device, dtype, batch_size)
    except ValueError:
        raise OpenVisionError(
            "lmms-eval does not know openvision3: install openvision3 into the environment of lmms-eval again"
        ) from None
    with tempfile.TemporaryDirectory() as scratch, _data_sets(data):
        try:
            found: Any = simple_evaluate(
                model=asked,
                tasks=[SUITES[suite]],
                limit=limit,
                batch_size=batch_size,
                bootstrap_iters=0,
                log_samples=False,
                task_manager=TaskManager("WARNING", model_name="openvision3"),
                cli_args=Namespace(output_path=scratch, process_with_media=True),  # some tasks write files of their own
                process_docs_parallel=1,
            )
        except RetryError as error:  # lmms-eval tries the loading of data again, whatever went wrong
            cause = error.last_attempt.exception()
            if isinstance(cause, OpenVisionError):
                raise cause from None
            raise
    values = found["results"][SUITES[suite]].items()
    return {
        "suite": suite,
        "model": model,
        "lmms_eval": version("lmms-eval"),
        "limit": limit,
        "asked": asked.asked,
        "scores": {
            name.split(",")[0]: value
            for name, value in values
            if isinstance(value, int | float) and "_stderr" not in name
        },
        "errors": [asdict(error) for error in asked.errors],
    }


@contextlib.contextmanager
def _data_sets(folder: Path | None) -> Iterator[None]:
    """Makes the tasks read the folder's data sets, and the public ones of the hub without a login.

    Not by lmms-eval's settings: they do not reach the second data set of GQA, nor the tasks' wish for a login.
    """
    import datasets
    from huggingface_hub import get_token

    original = datasets.load_dataset

    def load_dataset(path: str, *args: Any, **options: Any) -> Any:
        if options.get("token") is True and get_token() is None:
            options["token"] = None
        where = path
        if folder is not None:
            where = str(folder / path.split("/")[-1])
            if not Path(where).is_dir():
                raise OpenVisionError(f"{where} does not exist: expected a copy of the hub's data set {path}")
        try:
            return original(where, *args, **options)
        except Exception as error:  # the libraries of data sets and of the hub raise errors of many kinds
            reason = " ".join(str(error).split())[:200]
            raise OpenVisionError(
                f"{where} can't be read: {reason}. Where there is no network, name a folder with a copy of {path}"
            ) from None

    datasets.load_dataset = load_dataset
    try:
        yield
    finally:
        datasets.load_dataset = original
