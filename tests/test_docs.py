"""The documents say what the program does: their commands run and print what they show, their doctests hold."""

import doctest
import importlib
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import epsim

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONSOLE = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)


def words(line: str) -> str:
    return " ".join(line.split())


def commands(document: Path) -> list[tuple[str, list[str]]]:
    """Return each `$ command` of the console blocks with the lines that the document shows below it."""
    found: list[tuple[str, list[str]]] = []
    for block in CONSOLE.findall(document.read_text(encoding="utf-8")):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            elif words(line) and words(line) != "...":
                found[-1][1].append(words(line))
    return found


def test_the_readme_has_commands() -> None:
    assert len(commands(ROOT / "README.md")) >= 8


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_print_what_the_document_shows(document: Path, tmp_path: Path) -> None:
    for folder in ("scenarios", "traces"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "out").mkdir()
    for command, shown in commands(document):
        program, *arguments = shlex.split(command)
        assert program == "epsim", f"{document.name}: only epsim's own commands are run: {command}"
        done = subprocess.run(
            [sys.executable, "-m", "epsim.cli", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        printed = {words(line) for line in done.stdout.splitlines()}
        missing = [line for line in shown if line not in printed]
        assert not missing, f"{command}\ndoes not print {missing}"


@pytest.mark.parametrize("name", [m.name for m in pkgutil.walk_packages(epsim.__path__, "epsim.")])
def test_doctests(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name}: {target}"
