"""Writes the reference of the public modules from their docstrings: `python docs/api.py [FOLDER]` (`make docs`).

A warning of pdoc (a name or a type that does not resolve) is an error.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

# what users of the package build on; the rest is the package's own
PUBLIC = (
    "config",
    "recipes",
    "vae",
    "losses",
    "model.openvision3",
    "hub.load",
    "hub.encoders",
    "hub.released",
    "data.transforms",
    "data.shards",
    "data.demo",
    "evaluation.evaluate",
    "training.loop",
    "generation.generator",
    "generation.sample",
    "vlm.folder",
    "vlm.answering",
)


def write(folder: Path, modules: Sequence[str] = PUBLIC) -> None:
    """Writes `openvision3` and these modules of it as HTML pages into a folder."""
    import openvision3

    for name in openvision3.__all__:  # pdoc looks for names that are there already, and they come on first use
        setattr(openvision3, name, getattr(openvision3, name))
    names = [f"openvision3.{module}" for module in modules]
    for name in names:
        importlib.import_module(name)  # outside of the filter: other libraries' warnings are theirs
    import pdoc.render

    pdoc.render.configure(show_source=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pdoc.pdoc("openvision3", "!openvision3[.].*", *names, output_directory=folder)


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "build/docs")
    write(target)
    print(target / "index.html")
