"""`FromFile`: a placement that someone else decided, read from epsim's own placement file or SGLang's JSON form."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from epsim.errors import PlacementError
from epsim.json_file import JsonContentError, decode_text, parse_json, read_regular
from epsim.placement.file import is_placement_file, parse_placement_file, ranges
from epsim.placement.placement import Placement
from epsim.placement.problem import PlacementProblem

_FORM = 'a JSON object {"physical_to_logical_map": [layers][slots]} of expert ids'


class FromFile:
    """Reads an epsim placement file, or `{"physical_to_logical_map": [L][P]}` (SGLang's `--init-expert-location`).

    epsim's own file must be for the layers of the trace; SGLang's form has no layer ids, only as many rows.
    P may exceed the number of experts (redundant experts; -1 is an empty slot) and must divide over the devices.
    """

    kind: ClassVar[str] = "file"

    def __init__(self, *, path: Path) -> None:
        self.path = path

    def place(self, problem: PlacementProblem) -> Placement:
        content = self._read()
        if is_placement_file(content):
            return self._place_own(content, problem)
        rows = self._rows(content)
        self._check_layers(len(rows), problem)
        lengths = {len(row) for row in rows}
        if len(lengths) != 1:
            raise PlacementError(f"placement.path: rows of {self.path} differ in length; each layer needs all slots")
        return problem.placement(self.kind, np.array(rows, dtype=np.int32))

    def _place_own(self, content: object, problem: PlacementProblem) -> Placement:
        try:
            placement = parse_placement_file(content)
        except PlacementError as error:
            raise PlacementError(f"placement.path: {self.path}: {error}") from error
        self._check_layers(len(placement.layer_ids), problem)
        if problem.trace is not None and placement.layer_ids != problem.trace.meta.layer_ids:
            raise PlacementError(
                f"placement.path: {self.path}: layer_ids: it is for layers {ranges(placement.layer_ids)}, "
                f"the trace has {ranges(problem.trace.meta.layer_ids)}; name a placement that was made for them"
            )
        for noun, found, needed in (
            ("experts", placement.num_experts, problem.num_experts),
            ("devices", placement.num_devices, problem.num_devices),
        ):
            if found != needed:
                raise PlacementError(
                    f"placement.path: {self.path} is for {found} {noun}, here are {needed}; "
                    "name a placement that was made for them"
                )
        return problem.placement(self.kind, placement.physical_to_logical_LP)

    def _check_layers(self, num_layers: int, problem: PlacementProblem) -> None:
        if num_layers != problem.num_layers:
            raise PlacementError(
                f"placement.path: {self.path} has {num_layers} layers, the trace {problem.num_layers}; "
                "write one row per MoE layer"
            )

    def _read(self) -> Any:
        try:
            return parse_json(decode_text(read_regular(self.path)))
        except OSError as error:
            raise PlacementError(
                f"placement.path: cannot read {self.path}: {error.strerror}; write the path of a placement file"
            ) from error
        except JsonContentError as error:
            raise PlacementError(f"placement.path: {self.path}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise PlacementError(f"placement.path: {self.path} is not JSON; write {_FORM}") from error

    def _rows(self, content: object) -> list[list[int]]:
        rows = content.get("physical_to_logical_map") if isinstance(content, dict) else None
        if not isinstance(rows, list) or not rows or not all(_is_row(row) for row in rows):
            raise PlacementError(f"placement.path: {self.path} has another form; write {_FORM}")
        return rows


def _is_row(row: object) -> bool:
    return isinstance(row, list) and bool(row) and all(type(e) is int and abs(e) < 2**31 for e in row)
