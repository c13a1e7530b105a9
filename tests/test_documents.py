"""The documents: generated pages are current, and every code that the software sends is explained."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ERRORS = ROOT / "docs" / "reference" / "errors.md"
#: Calls whose string arguments in lower case with underscores are codes.
CARRIERS = {"Poison", "Refused", "EventError", "ImageError", "ApiError", "NoRanking", "warn"} | {
    "_without_ranking",
    "_error_reply",
}
CODE = re.compile(r"[a-z]+(_[a-z]+)*")
#: Arguments of these calls that are no codes.
NOT_CODES = {"replace"}


def codes_in(path: Path) -> set[str]:
    """Every code that a module passes to an error or a warning."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name not in CARRIERS:
            continue
        arguments = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "code")]
        found |= {
            argument.value
            for argument in arguments
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str) and CODE.fullmatch(argument.value)
        }
    return found - NOT_CODES


def test_every_code_is_explained():
    sources = [*ROOT.glob("workers/**/*.py"), *ROOT.glob("protocols/**/*.py"), ROOT / "edje" / "images.py"]
    sent = set().union(*map(codes_in, sources))
    explained = set(re.findall(r"`([a-z_]+)`", ERRORS.read_text()))

    assert len(sent) > 40
    assert sorted(sent - explained) == []


def test_generated_pages_are_current():
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
