"""The pages name files and functions; each is there."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "helm/README.md",
    *sorted(f"docs/{page.name}" for page in ROOT.glob("docs/*.md")),
]
_PATH = re.compile(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|md|sh|proto))(?::([\w.]+))?`")
_STEP = re.compile(r"^ *\d+\. ", re.MULTILINE)


@cache
def names_in(path):
    """`function`, `Class` and `Class.method` of a file."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if hasattr(inner, "name")}
    return names


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_function_that_a_page_names_exists(page):
    missing = [
        f"{path}:{name}"
        for path, name in _PATH.findall((ROOT / page).read_text())
        if not (ROOT / path).is_file() or (name and name not in names_in(ROOT / path))
    ]
    assert missing == []


def test_every_step_of_the_life_of_a_request_names_a_function():
    page = (ROOT / "docs" / "architecture.md").read_text()
    _, _, life = page.partition("## The life of a request")
    steps = _STEP.split(life.partition("Leaving at any point")[0])[1:]
    assert len(steps) == 18
    assert [step for step in steps if not any(name for _, name in _PATH.findall(step))] == []
