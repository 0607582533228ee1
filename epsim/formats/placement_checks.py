"""What all formats of placements check: `build` one that was read, `filled` for systems without empty slots."""

from typing import Any

from epsim.errors import FormatError, PlacementError
from epsim.formats.reading import Ints
from epsim.placement.file import PlacementFile


def build(where: str, **fields: Any) -> PlacementFile:
    """Return the placement, or raise FormatError that names the file."""
    try:
        return PlacementFile(**fields)
    except PlacementError as error:
        raise FormatError(f"{where}: {error}") from error


def filled(placement: PlacementFile, system: str) -> Ints:
    """Return int64 [L, P], the map; raises PlacementError if a slot is empty."""
    p2l_LP: Ints = placement.physical_to_logical_LP.astype("int64")
    empty_LP = p2l_LP < 0
    if empty_LP.any():
        row, slot = divmod(int(empty_LP.argmax()), p2l_LP.shape[1])
        raise PlacementError(
            f"physical_to_logical_map: layer {placement.layer_ids[row]}, slot {slot} is empty, and {system} has an "
            "expert in every slot; fill it"
        )
    return p2l_LP
