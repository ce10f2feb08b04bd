"""transformers' own common model tests (save and load, checkpointing, attention, initialisation ...) over our classes.

The tests come from the sdist of the installed transformers, unpacked in the user's cache and run there, in a process of
their own. The sdist lacks two mixins that they inherit from, for exporting and for generation: empty ones stand in.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SOURCE = Path(__file__).parent / "hf_common" / "modeling_openvision3.py"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "openvision3" / "transformers-sdist"
STAND_INS = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
}


def sdist() -> Path:
    """The unpacked sdist of the installed version, downloaded on first use."""
    version = importlib.metadata.version("transformers")
    folder = CACHE / f"transformers-{version}"
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
            arguments = ["--no-binary", ":all:", "--no-deps", "--dest", temporary, f"transformers=={version}"]
            subprocess.run([sys.executable, "-m", "pip", "download", "-q", *arguments], check=True, cwd=temporary)
            with tarfile.open(next(Path(temporary).glob("*.tar.gz"))) as archive:
                archive.extractall(temporary, filter="data")
            shutil.move(Path(temporary) / folder.name, folder)
    return folder


@pytest.mark.hf
def test_common_model_tests_of_transformers(capsys):
    tests = sdist() / "tests"
    for name, text in STAND_INS.items():
        (tests / name).parent.mkdir(exist_ok=True)
        (tests / name).write_text(text)
    ours = tests / "models" / "openvision3"
    ours.mkdir(parents=True, exist_ok=True)
    for folder in (tests, tests / "exporters", tests / "generation", tests / "models", ours):
        (folder / "__init__.py").touch()
    shutil.copy(SOURCE, ours / "test_modeling_openvision3.py")
    command = [sys.executable, "-m", "pytest", "-q", "-rsf", "-p", "no:cacheprovider", "tests/models/openvision3"]
    found = subprocess.run(
        [*command, *os.environ.get("HF_COMMON_ARGS", "").split()],
        cwd=tests.parent,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    with capsys.disabled():
        print("\n" + found.stdout[-20000:])
    assert found.returncode == 0, found.stderr[-2000:]
    passed = re.search(r"(\d+) passed", found.stdout)
    assert passed and int(passed[1]) >= 100
