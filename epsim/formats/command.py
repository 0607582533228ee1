"""What `epsim import` and `epsim export` do: `import_files` and `export_file`. Both return lines for people.

A command writes one file, whole or not at all.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from epsim.atomic import check_outputs
from epsim.errors import FormatError, OutputError, PlacementError
from epsim.formats.loads import EXPORT_NAME, LOADS, export_loads
from epsim.formats.loads_file import write_loads
from epsim.formats.options import TAKEN, Options, check_taken
from epsim.formats.placements import PLACEMENTS
from epsim.formats.routings import ROUTINGS
from epsim.placement.file import read_placement_file, write_placement_file
from epsim.scenario.describe import closest
from epsim.trace.file import TraceFile


def import_files(
    paths: Sequence[Path], name: str, output: Path, options: Options, beside: Sequence[Path] = ()
) -> list[str]:
    """Read files of another system and write epsim's own: a placement, loads, or a routing trace.

    beside: files that the options were read from, which are not written over either.
    """
    check_outputs({"-o": output}, [*paths, *beside])
    if folder := next((path for path in paths if path.is_dir() and path.resolve() in output.resolve().parents), None):
        raise OutputError(f"-o {output}: lies in {folder}, which is read for this; name a path outside of it")
    sources = list(paths)
    if name in TAKEN:
        check_taken(name, options)
    if name in PLACEMENTS:
        if len(sources) != 1:
            raise FormatError(f"{sources[1]}: a placement is one file; import them one by one")
        placement = PLACEMENTS[name].read(sources[0], options)
        write_placement_file(output, placement)
        size = f"{len(placement.layer_ids)} layers, {placement.num_experts} experts"
        slots = placement.physical_to_logical_LP.shape[1]
        return [f"wrote {output}: a placement, {size}, {slots} slots on {placement.num_devices} devices"]
    if name in LOADS:
        loads = LOADS[name](sources, options)
        write_loads(output, loads)
        lines = [f"wrote {output}: loads, {len(loads.layer_ids)} layers, {loads.logical_count.shape[-1]} experts"]
        if idle := loads.idle_layers:
            listed = ", ".join(map(str, idle[:5])) + (", ..." if len(idle) > 5 else "")
            lines.append(f"note: no expert of layers {listed} was ever chosen; --layer-ids leaves dense ones out")
        return lines
    if name not in ROUTINGS:
        _unknown("--from", name, [*PLACEMENTS, *LOADS, *ROUTINGS])
    return ROUTINGS[name](sources, output, options)


def export_file(path: Path, name: str, output: Path, num_layers: int | None) -> list[str]:
    """Write a placement of epsim's, or the loads of a routing trace, as another system reads them."""
    check_outputs({"-o": output}, [path])
    if name in PLACEMENTS:
        placement = read_placement_file(path)
        try:
            notes = PLACEMENTS[name].write(output, placement, num_layers)
        except PlacementError as error:  # what the other system cannot carry
            raise PlacementError(f"{path}: {error}") from error
    elif name == EXPORT_NAME:
        notes = export_loads(output, TraceFile.open(path), num_layers)
    else:
        _unknown("--to", name, [*PLACEMENTS, EXPORT_NAME])
    return [*(f"note: {note}" for note in notes), f"wrote {output}"]


def _unknown(option: str, name: str, known: list[str]) -> NoReturn:
    raise FormatError(f'{option}: "{name}" is not a format{closest(name, known)}')
