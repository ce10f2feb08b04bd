"""The wheel and the sdist: what is in them, and the quickstart from the wheel alone, outside of the checkout."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import openvision3

ROOT = Path(__file__).parents[1]
MOST = 60_000_000  # bytes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel made of it, by the setuptools that is here."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "-o", folder, ROOT], check=True)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def packaged() -> set[str]:
    """The files of the package that are in git, or lie here where there is no git."""
    git = subprocess.run(["git", "-C", ROOT, "ls-files", "openvision3"], capture_output=True, text=True)
    if git.returncode == 0 and git.stdout:
        return set(git.stdout.split("\n")[:-1])
    found = (path for path in (ROOT / "openvision3").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(ROOT)) for path in found}


def test_the_package_is_whole_and_alone(built: tuple[Path, Path]) -> None:
    sdist, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == packaged()
    assert "openvision3/py.typed" in inside and "openvision3/weights/demo/model.safetensors" in inside
    print(f"wheel: {wheel.stat().st_size / 1e6:.1f} MB, sdist: {sdist.stat().st_size / 1e6:.1f} MB")
    assert wheel.stat().st_size <= MOST
    with tarfile.open(sdist) as archive:
        files = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert packaged() <= files
    tops = {"openvision3", "openvision3.egg-info", "tests", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml"}
    assert {name.split("/")[0] for name in files} <= tops | {"setup.cfg"}


def test_quickstart_from_the_wheel_alone(built: tuple[Path, Path], tmp_path: Path) -> None:
    """In an environment of its own, which takes what the package needs from this one."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    where = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    ).stdout.strip()
    beneath = sysconfig.get_path("purelib")
    Path(where, "beneath.pth").write_text(f"import site; site.addsitedir({beneath!r})\n")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}

    def run(*command: str | Path) -> str:
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    run(python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", built[1])
    assert run(python, "-c", "import openvision3; print(openvision3.__file__)").startswith(str(tmp_path / "venv"))
    ov3 = python.with_name("ov3")
    assert run(ov3, "--version") == f"openvision3 {openvision3.__version__}\n"
    said = run(ov3, "quickstart", "--samples", "128")
    assert "report: runs/quickstart/report.html" in said
    assert (tmp_path / "runs" / "quickstart" / "report.html").stat().st_size > 10_000
    assert "demo" in run(ov3, "info", "demo")
