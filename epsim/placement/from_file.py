"""`FromFile`: a placement that someone else decided, read from SGLang's JSON form."""

import json
from pathlib import Path
from typing import ClassVar

import numpy as np

from epsim.errors import PlacementError
from epsim.placement.placement import Placement
from epsim.placement.problem import PlacementProblem

_FORM = 'a JSON object {"physical_to_logical_map": [layers][slots]} of expert ids'


class FromFile:
    """Reads `{"physical_to_logical_map": [L][P]}`, the form of SGLang's `--init-expert-location`.

    P may exceed the number of experts (redundant experts; -1 is an empty slot) and must divide over the devices.
    """

    kind: ClassVar[str] = "file"

    def __init__(self, *, path: Path) -> None:
        self.path = path

    def place(self, problem: PlacementProblem) -> Placement:
        rows = self._read()
        if len(rows) != problem.num_layers:
            raise PlacementError(
                f"placement.path: {self.path} has {len(rows)} layers, the trace {problem.num_layers}; "
                "write one row per MoE layer"
            )
        lengths = {len(row) for row in rows}
        if len(lengths) != 1:
            raise PlacementError(f"placement.path: rows of {self.path} differ in length; each layer needs all slots")
        return problem.placement(self.kind, np.array(rows, dtype=np.int32))

    def _read(self) -> list[list[int]]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except OSError as error:
            raise PlacementError(f"placement.path: cannot read {self.path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise PlacementError(f"placement.path: {self.path} is not JSON; write {_FORM}") from error
        rows = content.get("physical_to_logical_map") if isinstance(content, dict) else None
        if not isinstance(rows, list) or not rows or not all(_is_row(row) for row in rows):
            raise PlacementError(f"placement.path: {self.path} has another form; write {_FORM}")
        return rows


def _is_row(row: object) -> bool:
    return isinstance(row, list) and bool(row) and all(type(e) is int and abs(e) < 2**31 for e in row)
