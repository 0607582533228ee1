"""Who may import what, how large a module may be, and what the command line must not load at its start."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "epsim"
MODULES = sorted(PACKAGE.rglob("*.py"))

ANYONE_MAY = {"__init__", "units", "errors"}  # __init__: the version
PARTS = {"atomic", "batch", "cluster", "cost", "metrics", "model", "placement", "scenario", "sim", "trace", "traffic"}
PARTS |= {"layout", "parallelism"}
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": set(),
    "units": set(),
    "errors": set(),
    "atomic": set(),
    "json_file": set(),
    "trace": {"atomic"},
    "cluster": set(),
    "model": set(),
    "placement": {"atomic", "json_file", "trace", "cluster"},
    "traffic": {"trace", "placement", "cluster"},
    "cost": {"atomic", "cluster", "model", "placement"},
    "sim": {"traffic", "cost", "cluster", "model"},
    "metrics": set(),
    "layout": {"cluster", "cost", "model", "placement", "trace"},
    "batch": {"cluster", "cost", "layout", "metrics", "model", "placement", "sim", "trace", "traffic"},
    "report": {"atomic", "metrics"},
    "scenario": set(),
    "migration": {"cluster", "model", "placement", "trace", "traffic"},
    "formats": {"atomic", "json_file", "model", "placement", "scenario", "trace"},
    "traces": {"model", "scenario", "trace"},
    "parallelism": {"layout", "model", "placement", "scenario"},
    "fitting": {"cluster", "layout", "placement", "scenario", "trace"},
    "layer_clock": {
        "batch",
        "cluster",
        "cost",
        "fitting",
        "layout",
        "model",
        "placement",
        "scenario",
        "sim",
        "trace",
        "traffic",
    },
    "run": PARTS | {"fitting", "layer_clock", "traces"},
    "compare": {"run", "scenario"},
    "lab": PARTS | {"fitting", "migration", "run", "traces"},
    "calibrate": {"atomic", "batch", "cluster", "model", "run", "scenario"},
    "validate": {
        "atomic",
        "batch",
        "calibrate",
        "cluster",
        "cost",
        "measured",
        "metrics",
        "placement",
        "report",
        "run",
        "scenario",
        "sim",
        "trace",
        "traffic",
    },
    "study": {"atomic", "lab", "metrics", "placement", "report", "run", "scenario", "trace", "trace_stats", "validate"},
    "trace_stats": {"metrics", "placement", "trace", "traffic"},
    "warm_up": {"run", "scenario"},
    "capture": {"atomic", "model", "scenario", "trace"},
    "specialize": {"atomic", "capture", "model", "scenario", "trace"},
    "measured": {"atomic", "batch", "cluster", "compare", "run", "scenario", "sim"},
    "measure": {
        "atomic",
        "batch",
        "cluster",
        "cost",
        "measured",
        "model",
        "placement",
        "process_end",
        "run",
        "scenario",
        "sim",
        "trace",
        "traffic",
    },
    "__main__": {"cli"},
    "console": set(),
    "interrupt": set(),
    "process_end": set(),
    "cli_calibrate": {"atomic", "calibrate", "console", "report"},
    "cli_capture": {"capture", "console", "interrupt"},
    "cli_formats": {"formats", "model", "placement", "scenario"},
    "cli_measure": {
        "atomic",
        "capture",
        "cli_measure_run",
        "cli_trace",
        "console",
        "cost",
        "interrupt",
        "measure",
        "model",
        "report",
        "scenario",
    },
    "cli_measure_run": {
        "atomic",
        "capture",
        "cli_trace",
        "compare",
        "console",
        "interrupt",
        "measure",
        "measured",
        "report",
        "scenario",
    },
    "cli_place": {"atomic", "cli_place_replay", "cli_trace", "console", "interrupt", "lab", "placement", "report"},
    "cli_place_replay": {"atomic", "console", "interrupt", "lab", "report"},
    "cli_study": {"atomic", "console", "interrupt", "report", "study"},
    "cli_trace": {"atomic", "cli_capture", "console", "report", "scenario", "trace", "trace_stats", "traces"},
    "cli_validate": {"atomic", "calibrate", "console", "report", "validate"},
    "cli_train": {"atomic", "capture", "console", "interrupt", "scenario", "specialize"},
    "cli": {
        "atomic",
        "process_end",
        "run",
        "compare",
        "scenario",
        "report",
        "console",
        "cli_calibrate",
        "cli_formats",
        "cli_measure",
        "cli_place",
        "cli_study",
        "cli_trace",
        "cli_train",
        "cli_validate",
    },
}
UNITS_AND_ERRORS_USE_NOTHING = {"units", "errors"}
HEAVY_AT_HOME = {
    "torch": {"capture", "formats", "measure", "specialize"},
    "transformers": {"capture", "specialize"},
    "tokenizers": {"capture"},
    "safetensors": {"capture", "formats"},
    "PIL": {"capture"},
    "sklearn": {"capture"},
    "skimage": {"capture"},
    "numba": {"migration", "placement", "sim", "trace", "traffic"},
    "networkx": {"cluster", "measure"},
    "simpy": {"sim"},
    "pyarrow": {"formats", "trace", "report"},
    "pydantic": {"scenario", "calibrate", "measured"},
    "typer": {
        "cli",
        "cli_calibrate",
        "cli_capture",
        "cli_formats",
        "cli_measure",
        "cli_measure_run",
        "cli_place",
        "cli_place_replay",
        "cli_study",
        "cli_trace",
        "cli_train",
        "cli_validate",
        "console",
        "interrupt",
    },
    "rich": {"console", "report"},
    "matplotlib": {"report", "validate"},
}
MAX_LINES = 300
LONGER_FOR_NOW: dict[str, int] = {}


def part_of(path: Path) -> str:
    """Return the folder under epsim/ that a module is in, or its own name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(path: Path) -> set[str]:
    """Return the full names of all modules and names in them that a module imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_parts(path: Path) -> set[str]:
    """Return the parts of epsim that a module imports; `from epsim import __version__` is `__init__`."""
    known = {part_of(module) for module in MODULES}
    parts = {name.split(".")[1] for name in imported_names(path) if name.startswith("epsim.")}
    return {part if part in known else "__init__" for part in parts}


def test_every_part_is_in_the_table() -> None:
    assert {part_of(path) for path in MODULES} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_table(path: Path) -> None:
    part = part_of(path)
    general = set() if part in UNITS_AND_ERRORS_USE_NOTHING else ANYONE_MAY
    assert imported_parts(path) <= MAY_IMPORT[part] | general | {part}


def test_the_table_has_no_way_back() -> None:
    """Take away, again and again, the parts that import nothing that is left: a cycle would stay."""
    left = {part: set(others) for part, others in MAY_IMPORT.items()}
    while free := {part for part, others in left.items() if not others & set(left)}:
        left = {part: others for part, others in left.items() if part not in free}
    assert not left


@pytest.mark.parametrize("library", HEAVY_AT_HOME)
def test_libraries_stay_in_their_parts(library: str) -> None:
    users = {part_of(path) for path in MODULES if library in {name.split(".")[0] for name in imported_names(path)}}
    assert users <= HEAVY_AT_HOME[library]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_are_short_and_say_what_they_are(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= LONGER_FOR_NOW.get(str(path.relative_to(ROOT)), MAX_LINES)
    assert ast.get_docstring(ast.parse(text))


def loaded_by(code: str) -> set[str]:
    """Return the top-level modules that are loaded after running code in a new process."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*{{name.split('.')[0] for name in sys.modules}})"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    return set(done.stdout.split())


def test_importing_the_command_line_is_light() -> None:
    loaded = loaded_by("import epsim.cli")
    assert "typer" in loaded
    assert not loaded & {"torch", "numpy", "numba", "scipy", "networkx", "simpy", "pyarrow", "pydantic", "yaml"}


def test_a_simulation_loads_no_torch() -> None:
    parts = "run", "compare", "report.files", "report.tables", "study.specialise", "study.document"
    loaded = loaded_by(f"import {', '.join(f'epsim.{part}' for part in parts)}")
    assert "numpy" in loaded
    assert not loaded & {"torch", "transformers", "matplotlib"}
