"""Every command, Python block, path and link of the documentation is one that there is."""

import ast
import functools
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tyro

import openvision3
from openvision3 import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "openvision3" / "weights").glob("*/*.md")])
ENDS = {"|", "&&", "||", ";", "&", ">", "<"}


@dataclass(frozen=True)
class Block:
    """A block of code of a page; `language` is empty for an indented one."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, and its indented ones after an empty line."""
    lines, i = page.read_text(encoding="utf-8").split("\n"), 0
    while i < len(lines):
        start = i
        if lines[i].startswith("```"):
            i = lines.index("```", i + 1)
            yield Block(page, start + 2, lines[start][3:].strip(), "\n".join(lines[start + 1 : i]))
        elif lines[i].startswith("    ") and i and not lines[i - 1].strip():
            while i < len(lines) and lines[i].startswith("    "):
                i += 1
            yield Block(page, start + 1, "", "\n".join(line[4:] for line in lines[start:i]))
        i += 1


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command of a block of shell, without comments; pipes and lists apart."""
    for line in block.text.replace("\\\n", " ").split("\n"):
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word in ENDS:
                if words:
                    yield words
                words = []
            else:
                words.append(word)


SHELL = [(block, words) for page in PAGES for block in blocks(page) if block.language in ("bash", "sh", "")
         for words in commands(block)]  # fmt: skip
PYTHON = [block for page in PAGES for block in blocks(page) if block.language == "python"]


def ov3_arguments(words: list[str]) -> list[str] | None:
    """What `ov3` is given by a command, also through torchrun; None for another program's."""
    if Path(words[0]).name == "ov3":
        return words[1:]
    return words[words.index("openvision3") + 1 :] if "openvision3" in words[:-1] and "-m" in words else None


def parse(args: list[str]) -> None:
    """Parses a command's arguments as `ov3` does, and runs nothing; raises, or exits with 2, for wrong ones."""
    name = next((" ".join(args[:n]) for n in (2, 1) if " ".join(args[:n]) in cli.COMMANDS), None)
    if name is None:
        cli.dispatch(args)  # --help and --version; else an error that names the command
        return
    command, rest = cli.COMMANDS[name], args[len(name.split()) :]
    if command.takes_args:
        parse_recipe(name, rest)
        return
    function = getattr(importlib.import_module(f"openvision3.commands.{command.module}"), command.function)

    @functools.wraps(function)
    def nothing(*args: object, **kwargs: object) -> None:
        pass

    tyro.cli(nothing, prog=f"ov3 {name}", args=rest)


def parse_recipe(name: str, args: list[str]) -> None:
    """The same for the commands that take a recipe and its fields."""
    from openvision3.commands.train import chosen_recipe, resolve
    from openvision3.generation.recipes import GENERATOR_RECIPES
    from openvision3.recipes import RECIPES
    from openvision3.vlm.recipes import VLM_RECIPES

    recipes = {"train": RECIPES, "generate train": GENERATOR_RECIPES, "vlm train": VLM_RECIPES}[name]
    recipe = chosen_recipe(f"ov3 {name}", recipes, args)
    assert not isinstance(recipe, int), args
    resolve(recipe, args[1:], f"ov3 {name} {args[0]}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_parse(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = []
    for block, words in SHELL:
        args = ov3_arguments(words) if block.page == page else None
        try:
            if args is not None:
                parse(args)
        except (Exception, SystemExit) as error:
            said = capsys.readouterr().err.strip() or error
            wrong.append(f"{block}: {shlex.join(words)}: {said}")
    assert not wrong, "\n".join(wrong)


def test_commands_in_the_text_are_there() -> None:
    groups = {name.split()[0] for name in cli.COMMANDS}
    wrong = []
    for page in PAGES:
        for words in re.findall(r"`ov3 ([^`]+)`", page.read_text(encoding="utf-8")):
            first, second = [*words.split(), ""][:2]
            alone = first in cli.COMMANDS or first.startswith("-")
            known = (
                alone
                or first in groups
                and (f"{first} {second.split('|')[0]}" in cli.COMMANDS or second in ("", "..."))
            )
            if not known and first.isalpha() and first.islower():  # not COMMAND
                wrong.append(f"{page.relative_to(ROOT)}: ov3 {words}")
    assert not wrong, "\n".join(wrong)


def test_the_parser_refuses_what_there_is_not() -> None:
    from openvision3.config import OpenVisionError

    block = Block(
        ROOT / "x.md", 1, "bash", "echo a | ov3 info demo  # comment\nov3 caption a.jpg \\\n  --model demo && ls"
    )
    assert list(commands(block)) == [
        ["echo", "a"], ["ov3", "info", "demo"], ["ov3", "caption", "a.jpg", "--model", "demo"], ["ls"]
    ]  # fmt: skip
    parse(["info", "demo"])
    parse(["train", "demo", "--stage1.samples", "3"])
    for args in (["inform"], ["train", "demos"], ["train", "demo", "--stage1.sample", "3"]):
        with pytest.raises(OpenVisionError):
            parse(args)
    for args in (["info", "--modle", "x"], ["train", "demo", "--stage1.samples", "x"]):
        with pytest.raises(SystemExit) as stop:
            parse(args)
        assert stop.value.code == 2


def test_scripts_tests_and_make_targets_are_there() -> None:
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)) | {
        ".venv-lmms",
        ".venv-app",
    }
    missing = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for path in re.findall(r"\b(?:benchmarks|tests|examples)/[\w/-]+\.(?:py|sh|ipynb)", text):
            if not (ROOT / path).exists():
                missing.append(f"{page.name}: {path}")
        for target in re.findall(r"(?:^|`)make ([\w.-]+)", text, re.MULTILINE):
            if target not in targets:
                missing.append(f"{page.name}: make {target}")
    assert not missing, "\n".join(missing)


def test_links_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http:", "https:", "mailto:")) and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_blocks_name_what_there_is(block: Block) -> None:
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                importlib.import_module(name.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            module = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name), f"{node.module} has no {name.name}"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ov3":
            assert node.attr in openvision3.__all__, f"openvision3 has no {node.attr}"
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
        ):
            check_call(node, node.func.value.id)


def check_call(node: ast.Call, owner: str) -> None:
    """Calls of the package and of a model of it take the arguments that they are given."""
    from openvision3.model.openvision3 import OpenVision3

    assert isinstance(node.func, ast.Attribute)
    if owner == "ov3":
        called = getattr(openvision3, node.func.attr)
        inspect.signature(called).bind(*node.args, **{str(k.arg): k for k in node.keywords})
    elif owner == "model" and hasattr(OpenVision3, node.func.attr) and node.func.attr != "from_pretrained":
        signature = inspect.signature(getattr(OpenVision3, node.func.attr))
        signature.bind(None, *node.args, **{str(k.arg): k for k in node.keywords})


# packages, each of which may import those before it and itself (docs/ARCHITECTURE.md); single files are free
ORDER = (
    "data",
    "model",
    "hub",
    "evaluation",
    "training",
    "generation",
    "vlm",
    "reproduction",
    "bench",
    "app",
    "commands",
)
EXCEPT = {("evaluation/front.py", "bench")}  # timing of a front beside its quality


def imports(file: Path) -> Iterator[str]:
    """The packages of ours that a file imports, wherever; without those for type checkers alone."""
    nodes: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("openvision3."):
            yield (node.module or "").split(".")[1]
        nodes.extend(ast.iter_child_nodes(node))


def test_imports_point_one_way() -> None:
    package = ROOT / "openvision3"
    wrong = set()
    for file in package.rglob("*.py"):
        home = file.relative_to(package).parts[0]
        if home in ORDER:
            later = ORDER[ORDER.index(home) + 1 :]
            wrong |= {(str(file.relative_to(package)), name) for name in imports(file) if name in later}
    assert wrong == EXCEPT


def test_assets_are_named_with_their_licences() -> None:
    from openvision3.assets import list_assets

    text = (ROOT / "THIRD_PARTY.md").read_text()
    for asset in list_assets():
        rows = [row for row in text.split("\n") if row.startswith("|") and f"`{asset.name}`" in row]
        assert len(rows) == 1 and f"`{asset.archive.project}`" in rows[0], asset.name
        assert asset.licence.split()[0] in rows[0], asset.name


def test_the_version_is_the_citations() -> None:
    assert f"version: {openvision3.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.slow
def test_trainings_of_the_docs_resolve(capsys: pytest.CaptureFixture[str]) -> None:
    """Each distinct `train` command that needs no model of its own runs with --dry-run."""
    seen: set[str] = set()
    for block, words in SHELL:
        args = ov3_arguments(words) or []
        name = next((" ".join(args[:n]) for n in (2, 1) if " ".join(args[:n]) in cli.COMMANDS), "")
        if not name.endswith("train") or name.startswith("bench") or "--init" in args or "--help" in args:
            continue
        args = [arg for arg in args if arg != "--dry-run"]
        if shlex.join(args) in seen:
            continue
        seen.add(shlex.join(args))
        code = cli.main([*args, "--dry-run"])
        out, err = capsys.readouterr()
        assert code == 0, f"{block}: {shlex.join(args)}: {err}"
        assert out.strip()
    assert len(seen) > 10


@pytest.mark.slow
def test_the_reference_is_written_without_a_warning(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "docs" / "api.py", tmp_path], check=True, cwd=ROOT)
    page = (tmp_path / "openvision3" / "hub" / "load.html").read_text(encoding="utf-8")
    assert "Loads a model in eval mode" in page
    assert "crop_back" in (tmp_path / "openvision3.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/USING.md"])
def test_the_pages_python_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A page's blocks one after another, as a reader would, after the commands that they need."""
    from PIL import Image

    from openvision3.config import SceneConfig
    from openvision3.data.demo import render, scene

    monkeypatch.chdir(tmp_path)
    Image.fromarray(render(scene(SceneConfig(), "val", 0, 0), 150)).crop((0, 0, 150, 120)).save("picture.jpg")
    if page != "README.md":
        (tmp_path / "pictures").mkdir()
        (tmp_path / "pictures" / "picture.jpg").symlink_to(tmp_path / "picture.jpg")
        needed = [["encode", "pictures", "--out", "tokens"]]
        for form, out in (("transformers", "converted/transformers"), ("transformers-vision", "converted/vision")):
            needed.append(["convert", "demo", "--out", out, "--to", form])
        for args in needed:
            assert cli.main(args) == 0, capsys.readouterr().err
    names: dict[str, Any] = {}
    for block in PYTHON:
        if block.page == ROOT / page:
            exec(compile(block.text, str(block), "exec"), names)
    if page == "README.md":
        assert names["images_hat"].shape[2:] == (128, 128) and names["similarity"].shape == (1, 2)
    else:
        assert names["images_hat"].shape[2:] == (120, 150) and names["best"] == ["picture.jpg"]
        assert names["probabilities"].shape == (1, 2) and len(names["labels"]) == 2
