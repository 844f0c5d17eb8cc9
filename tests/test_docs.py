"""What the documents say exists, exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from typer.main import get_command

from cogvlm.cli import app

ROOT = Path(__file__).parents[1]
FOLDERS = ("", "docs/", "benchmarks/", "examples/", "recipes/", "src/**/")
DOCUMENTS = sorted(p for folder in FOLDERS for p in ROOT.glob(f"{folder}*.md"))
READMES = [ROOT / "README.md", ROOT / "README.zh.md"]


def test_the_documents_are_found() -> None:
    assert {"README.md", "README.zh.md", "CHANGELOG.md"} <= {p.name for p in DOCUMENTS}


@pytest.mark.parametrize("path", DOCUMENTS, ids=[str(p.relative_to(ROOT)) for p in DOCUMENTS])
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=[str(p.relative_to(ROOT)) for p in DOCUMENTS])
def test_commands_exist_with_their_options(path: Path) -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    blocks = re.findall(r"```\w*\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for line in "\n".join(blocks).splitlines():
        found = re.match(r"\s*(?:\.venv/bin/)?cogvlm (\w+)(.*)", line)
        if not found:
            continue
        name, rest = found.groups()
        assert name in commands, line
        command = commands[name]
        if hasattr(command, "commands"):
            name, _, rest = rest.strip().partition(" ")
            assert name in command.commands, line
            command = command.commands[name]
        known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
        words = re.sub(r'"[^"]*"', "", rest.split(" #")[0]).split()
        assert {w.split("=")[0] for w in words if w.startswith("-")} <= known | {"--help"}, line


@pytest.mark.parametrize("path", READMES, ids=lambda p: p.name)
def test_make_targets_exist(path: Path) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    used = re.findall(r"^make (\w+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {"demo", "test"} <= set(used) <= set(targets)


def test_the_tree_in_the_readme_is_the_tree() -> None:
    text = READMES[0].read_text(encoding="utf-8")
    tree = re.search(r"```\nsrc/cogvlm/\n(.*?)```", text, flags=re.DOTALL)
    assert tree
    named = set(re.findall(r"[\w.]+\.py|(?<=^  )\w+/", tree.group(1), flags=re.MULTILINE))
    folder = ROOT / "src" / "cogvlm"
    real = {p.name for p in folder.glob("*.py")} | {
        f"{p.name}/" for p in folder.iterdir() if p.is_dir() and p.name != "__pycache__"
    }
    assert named == real - {"__init__.py"}


@pytest.mark.parametrize("path", READMES, ids=lambda p: p.name)
def test_python_examples_use_exported_names(path: Path) -> None:
    import cogvlm

    for block in re.findall(r"```python\n(.*?)```", path.read_text("utf-8"), flags=re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "cogvlm":
                assert {alias.name for alias in node.names} <= set(cogvlm.__all__)


def test_nothing_names_a_machine_or_a_registry() -> None:
    """A user's clone holds no absolute home, work or index address."""
    words = re.compile(r"/home/\w+/|/root/|/" + r"work/|pypi\." + r"org|python" + r"hosted")
    for path in [*DOCUMENTS, *ROOT.glob("src/**/*.py"), *ROOT.glob("recipes/*.yaml")]:
        assert not words.search(path.read_text(encoding="utf-8")), path
