"""The benchmarks are scripts that no other test imports: each must find what it imports."""

import importlib.util
import sys
from pathlib import Path

import pytest

ELSEWHERE = {"app_load.py": "httpx"}  # needs Gradio's environment, .venv-app
FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("script", sorted(path.name for path in FOLDER.glob("*.py")))
def test_a_benchmark_finds_its_imports(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if script in ELSEWHERE:
        pytest.importorskip(ELSEWHERE[script])
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(f"benchmark_{script[:-3]}", FOLDER / script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there for their module
    spec.loader.exec_module(module)
    assert callable(getattr(module, "main", None)), script
