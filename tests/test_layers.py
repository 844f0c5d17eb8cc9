"""Imports run one way: every import of every module is read and compared with the plan."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "cogvlm"

# A part may import the parts on earlier lines, and itself; parts on one line do not know each
# other.
PLAN = """
errors score
settings journal tensors
config fetch convert
hub catalog
models processor
packed linear
quantize backend devices
memory adapter reader
load remote
engine
data
serve train eval export caption chat
doctor
cli __init__
__main__
"""
LEVEL = {part: i for i, line in enumerate(PLAN.strip().splitlines()) for part in line.split()}
# No torch until a function needs it.
TORCHLESS = set(
    """__init__ backend caption catalog chat cli convert data devices doctor errors fetch
    hub journal processor remote settings""".split()  # noqa: SIM905
)


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Line, absolute name, and whether it runs when the module is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    late = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    package = ["cogvlm", *path.relative_to(SOURCE).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, node not in late
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            name = ".".join(filter(None, [base, node.module]))
            # `from . import hub` and `from .. import errors` name modules behind the import.
            for alias in node.names:
                full = f"{name}.{alias.name}" if name == "cogvlm" else name
                yield node.lineno, full, node not in late


def test_every_part_is_in_the_plan() -> None:
    found = {part_of(path) for path in modules()}
    assert {"errors", "config", "hub", "cli"} <= found
    assert found <= set(LEVEL)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_follow_the_arrows(path: Path) -> None:
    part = part_of(path)
    for line, name, _ in imports(path):
        if not name.startswith("cogvlm."):
            continue
        other = name.split(".")[1]
        if other == "__version__" or other == part or part == "__init__":
            continue
        assert other in LEVEL, f"{path}:{line}: {name} is not in the plan"
        assert LEVEL[other] < LEVEL[part], f"{path}:{line}: {part} may not import {other}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_heavy_packages_wait_until_they_are_needed(path: Path) -> None:
    early = {name.split(".")[0] for _, name, now in imports(path) if now}
    if part_of(path) in TORCHLESS:
        assert not early & {"torch", "transformers", "safetensors", "huggingface_hub", "av"}
    assert not {name.split(".")[0] for _, name, _ in imports(path)} & {
        "torchvision",
        "xformers",
        "triton",
        "decord",
        "cv2",
    }


@pytest.mark.parametrize(
    "module", ["cogvlm", "cogvlm.cli", "cogvlm.hub", "cogvlm.doctor", "cogvlm.processor"]
)
def test_importing_brings_no_torch_and_writes_nothing(module: str) -> None:
    code = (
        f"import sys, {module}; heavy = {{'torch', 'transformers'}} & set(sys.modules); "
        "sys.exit(' '.join(heavy) or None)"
    )
    path = str(SOURCE.parent)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r}); {code}"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_no_file_grows_beyond_what_is_read_in_one_go() -> None:
    long = {str(p.relative_to(SOURCE)): len(p.read_text().splitlines()) for p in modules()}
    assert {name: lines for name, lines in long.items() if lines > 600} == {}
