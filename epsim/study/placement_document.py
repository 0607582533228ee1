"""The figures of docs/placement.md, put between the marks of a text that people write: `write_placement_document`.

The same values give the same bytes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from epsim.atomic import write_all
from epsim.errors import InputError
from epsim.report.heat_map import heat_map
from epsim.study.placement_tables import change_table, claims, cost_table, sizes_table
from epsim.units import format_time

BEGIN, END = "<!-- epsim study placement: begin -->", "<!-- epsim study placement: end -->"
IMAGES = "images"

Found = Mapping[str, Any]
Cases = Mapping[tuple[Path, Path], Found]


def check_document(path: Path) -> None:
    """Raise InputError where a document is not there or lacks the marks."""
    _parts(path)


def write_placement_document(path: Path, cases: Cases, command: str) -> list[Path]:
    """Put the tables between the marks of a document and write its figures, images/*.png beside it; return the paths.

    command: that made the values.
    """
    before, after = _parts(path)
    contents: dict[Path, bytes] = {}
    sections = [f"{BEGIN}\n\nMade by `{command}`; edit nothing between the marks by hand."]
    for scenario in dict.fromkeys(scenario for scenario, _ in cases):
        own = {trace: found for (other, trace), found in cases.items() if other == scenario}
        name = f"placement-{scenario.stem}.png"
        contents[path.parent / IMAGES / name] = heat_map(next(iter(own.values())))
        sections.append(_section(scenario, own, f"{IMAGES}/{name}"))
    contents[path] = (before + "\n\n".join([*sections, END]) + after).encode()
    write_all(contents)
    return list(contents)


def _parts(path: Path) -> tuple[str, str]:
    """Return the text before the first mark and after the last."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"--docs {path}: cannot be read; name a document with the marks {BEGIN} and {END}") from error
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"--docs {path}: lacks {END if begin else BEGIN}; write both marks where the tables go")
    return before, after


def _section(scenario: Path, found: Mapping[Path, Found], image: str) -> str:
    """Return the tables of a scenario, a column per trace."""
    first = next(iter(found.values()))
    columns = {trace.stem.removeprefix("digits-"): values for trace, values in found.items()}
    design, spec = first["design"], first["scenario"]
    parts = [
        f"### {spec['name']}",
        f"`{scenario.as_posix()}`: {len(first['devices'])} devices in {len(set(first['node_of_device']))} nodes, "
        f"{spec['transmission']['mode']}, dedup {spec['transmission']['dedup']}, homes {spec['homes']['policy']}. Each "
        f"of {design['num_seeds']} splits fits to {design['num_fit']} requests and holds out {design['num_held_out']}.",
        claims(columns),
        "Remote bytes per token, change in % [95 % interval]; first row: bytes.",
        change_table(columns, lambda policy: policy["metrics"]["remote_bytes_per_token"], _kilobytes),
    ]
    parts += [
        "Vectors per token if tokens stayed where their first expert was ([token-migration.md](token-migration.md)), "
        "change in %; keys and values, which come on top, are the same under all policies.",
        change_table(columns, lambda policy: policy["metrics"]["migrate_vector_bytes_per_token"], _kilobytes),
    ]
    for at, batch in enumerate(first["batches"]):
        for name, words in (("ttft_s", "TTFT"), ("tpot_s", "TPOT")):
            parts += [
                f"{words} at batch {batch['batch_size']} ({batch['num_batches']} simulated per split), change in %.",
                change_table(columns, _latency(at, name), format_time),
            ]
    parts += [
        "Transfer objective fitted to and held out, and on the first split the gap to its bound, (cost - bound) / "
        "cost: means over traces.",
        cost_table(columns),
        "Evenness of the devices, memory of replicas and time to place: means over traces.",
        sizes_table(columns),
        f"![Who sends how much to whom, by policy]({image})",
    ]
    return "\n\n".join(part for part in parts if part)


def _latency(at: int, name: str) -> Any:
    return lambda policy: policy["batch_sizes"][at][name]


def _kilobytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e3:.1f} kB"
