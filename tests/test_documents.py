"""The documents: generated pages are current, and every code that the software sends is explained."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMANDS = ROOT / "docs" / "reference" / "commands.md"
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


def options_of_commands() -> dict[str, set[str]]:
    """The options of each documented command, as `module subcommand`, from the generated reference."""
    sections = re.split(r"^## `python -m (.+)`$", COMMANDS.read_text(), flags=re.MULTILINE)[1:]
    found = zip(sections[::2], sections[1::2], strict=True)
    return {name: {"--help", *re.findall(r"`(--[a-z0-9-]+)`", text)} for name, text in found}


def commands_in(text: str) -> list[str]:
    """The command lines of a document's code blocks that run one of the project's modules."""
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL))
    lines = [line.split("#")[0] for line in blocks.replace("\\\n", " ").splitlines()]
    return [line.split(" -m ", 1)[1].strip() for line in lines if re.search(r" -m (workers|edje|trt)\.", line)]


def test_commands_in_the_documents_have_the_options_they_use():
    known = options_of_commands()
    pages = [ROOT / "README.md", *ROOT.glob("docs/*/*.md")]
    lines = [(page.name, line) for page in pages for line in commands_in(page.read_text())]
    wrong = []
    for page, line in lines:
        words = line.split()
        name = next((each for each in (" ".join(words[:2]), words[0]) if each in known), None)
        if name is not None:
            used = {word.split("=")[0] for word in words if re.match(r"--[a-z]", word)}
            wrong += [(page, line, option) for option in sorted(used - known[name])]

    assert len(lines) > 20
    assert wrong == []


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
