"""epsim's own placement file: `PlacementFile`, `read_placement_file`, `write_placement_file`.

JSON: {"format": "epsim-placement", "version": 1, "layer_ids": [L], "num_experts": E, "num_devices": R,
"physical_to_logical_map": [L][P], "policy": "...", "description": "..."}. Letters as in `Placement`: L MoE layers,
E logical experts, P slots of all devices, R devices; slot p lies on device p // (P / R), -1 is an empty slot.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from epsim.atomic import whole_file, write_errors
from epsim.errors import PlacementError
from epsim.json_file import JsonContentError, decode_text, parse_json, read_regular
from epsim.placement.placement import IntArray

FORMAT = "epsim-placement"
VERSION = 1
MAX_EXPERTS = 65536
MAX_DEVICES = 65536

_KEYS = (
    "format",
    "version",
    "layer_ids",
    "num_experts",
    "num_devices",
    "physical_to_logical_map",
    "policy",
    "description",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacementFile:
    """A placement with the real ids of its layers, as it goes into a file.

    layer_ids: ids of the MoE layers in the model, ascending.
    physical_to_logical_LP: int32, the logical expert in each slot, -1 if empty; read-only.
    policy, description: what made it, and from what; for people.
    Raises PlacementError, which names a field and no file, unless every layer has a slot for every expert and the slots
    divide over the devices.
    """

    layer_ids: tuple[int, ...]
    num_experts: int
    num_devices: int
    physical_to_logical_LP: IntArray
    policy: str
    description: str = ""

    def __post_init__(self) -> None:
        self._check_header()
        p2l_LP = np.array(self.physical_to_logical_LP, dtype=np.int32)
        p2l_LP.flags.writeable = False
        object.__setattr__(self, "physical_to_logical_LP", p2l_LP)
        if p2l_LP.ndim != 2 or p2l_LP.shape[0] != len(self.layer_ids):
            raise PlacementError(
                f"physical_to_logical_map: has {len(p2l_LP)} rows, layer_ids {len(self.layer_ids)}; write one per layer"
            )
        if not p2l_LP.shape[1] or p2l_LP.shape[1] % self.num_devices:
            raise PlacementError(
                f"physical_to_logical_map: {p2l_LP.shape[1]} slots do not divide over num_devices {self.num_devices}; "
                f"use a multiple of {self.num_devices} slots"
            )
        self._check_slots(p2l_LP)

    def _check_header(self) -> None:
        for name, limit in (("num_experts", MAX_EXPERTS), ("num_devices", MAX_DEVICES)):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= limit:
                raise PlacementError(f"{name}: {_show(value)} is not a whole number from 1 to {limit}; write one")
        ids = self.layer_ids
        if not ids or any(type(i) is not int or not 0 <= i < 2**31 for i in ids):
            raise PlacementError(f"layer_ids: {_show(list(ids))} are not layer numbers; write e.g. [0, 1, 2]")
        if unordered := next(((a, b) for a, b in pairwise(ids) if a >= b), None):
            raise PlacementError(
                f"layer_ids: {unordered[1]} after {unordered[0]}; write each once, ascending, with its row"
            )
        for name in ("policy", "description"):
            if not isinstance(getattr(self, name), str):
                raise PlacementError(f"{name}: {_show(getattr(self, name))} is not text; write text")

    def _check_slots(self, p2l_LP: IntArray) -> None:
        wrong_LP = (p2l_LP < -1) | (p2l_LP >= self.num_experts)
        if wrong_LP.any():
            row, slot = np.argwhere(wrong_LP)[0]
            raise PlacementError(
                f"physical_to_logical_map: layer {self.layer_ids[row]}, slot {slot} holds expert {p2l_LP[row, slot]}; "
                f"experts are numbered 0 to {self.num_experts - 1}, and -1 is an empty slot"
            )
        for layer_id, row_P in zip(self.layer_ids, p2l_LP, strict=True):
            there_E = np.zeros(self.num_experts, dtype=bool)
            there_E[row_P[row_P >= 0]] = True
            if not there_E.all():
                raise PlacementError(
                    f"physical_to_logical_map: layer {layer_id} has no slot for expert {int(np.argmin(there_E))}; "
                    "every expert must be on some device"
                )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PlacementFile) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())

    @property
    def slots_per_device(self) -> int:
        """P / R."""
        return int(self.physical_to_logical_LP.shape[1]) // self.num_devices

    def to_json(self) -> str:
        """Return the content of the file: JSON, a line per field and per layer."""
        fields = {
            "format": FORMAT,
            "version": VERSION,
            "layer_ids": list(self.layer_ids),
            "num_experts": self.num_experts,
            "num_devices": self.num_devices,
            "physical_to_logical_map": self.physical_to_logical_LP.tolist(),
            "policy": self.policy,
            "description": self.description,
        }
        return json_lines(fields, "physical_to_logical_map")


def json_lines(fields: dict[str, Any], matrix: str) -> str:
    """Return a JSON object with a line per field, and per row of the field `matrix`."""
    lines = []
    for name, value in fields.items():
        text = json.dumps(value)
        if name == matrix:
            text = "[\n    " + ",\n    ".join(map(json.dumps, value)) + "\n  ]"
        lines.append(f"  {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def ranges(ids: Sequence[int]) -> str:
    """Return ascending ids as people write them.

    >>> ranges([1, 3, 4, 5])
    '1, 3-5'
    """
    runs = [list(run) for _, run in groupby(enumerate(ids), lambda place: place[1] - place[0])]
    return ", ".join(f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs)


def is_placement_file(content: object) -> bool:
    """Whether parsed JSON claims to be an epsim placement file."""
    return isinstance(content, dict) and content.get("format") == FORMAT


def parse_placement_file(content: object) -> PlacementFile:
    """Return the placement in parsed JSON; raises PlacementError, which names the field and no file."""
    if not isinstance(content, dict):
        raise PlacementError(f'is not a JSON object; write {{"format": "{FORMAT}", ...}}')
    if content.get("format") != FORMAT:
        raise PlacementError(
            f'format: {_show(content.get("format"))} is not "{FORMAT}"; '
            "bring a file of another system in with epsim import"
        )
    if content.get("version") != VERSION or type(content["version"]) is not int:
        raise PlacementError(f"version: {_show(content.get('version'))} is not {VERSION}, the one this epsim reads")
    if missing := [key for key in _KEYS if key not in content]:
        raise PlacementError(f"{missing[0]}: is missing; write it")
    if unknown := sorted(set(content) - set(_KEYS)):
        raise PlacementError(f"{unknown[0]}: is not a field of a placement file; leave it out")
    if not isinstance(content["layer_ids"], list):
        raise PlacementError(f"layer_ids: {_show(content['layer_ids'])} is not a list; write e.g. [0, 1, 2]")
    return PlacementFile(
        layer_ids=tuple(content["layer_ids"]),
        num_experts=content["num_experts"],
        num_devices=content["num_devices"],
        physical_to_logical_LP=_slots(content["physical_to_logical_map"]),
        policy=content["policy"],
        description=content["description"],
    )


def read_placement_file(path: Path) -> PlacementFile:
    """Return the placement in an epsim placement file; raises PlacementError, one line with file and field."""
    try:
        content = parse_json(decode_text(read_regular(path)))
    except OSError as error:
        raise PlacementError(f"{path}: cannot be read: {error.strerror}; write the path of a placement file") from error
    except JsonContentError as error:
        raise PlacementError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise PlacementError(f"{path}: is not JSON; write the path of an epsim placement file") from error
    try:
        return parse_placement_file(content)
    except PlacementError as error:
        raise PlacementError(f"{path}: {error}") from error


def write_placement_file(path: Path, placement: PlacementFile) -> None:
    """Write the file, whole or not at all."""
    with whole_file(path) as part, write_errors(path):
        part.write_text(placement.to_json(), encoding="utf-8")


def _slots(rows: object) -> IntArray:
    name = "physical_to_logical_map"
    if not isinstance(rows, list) or not rows:
        raise PlacementError(f"{name}: {_show(rows)} is not a list of rows; write [layers][slots] of expert ids")
    for i, row in enumerate(rows):
        if not isinstance(row, list) or not row:
            raise PlacementError(f"{name}[{i}]: {_show(row)} is not a row of expert ids; write a list")
        if len(row) != len(rows[0]):
            raise PlacementError(
                f"{name}[{i}]: {len(row)} slots, row 0 has {len(rows[0])}; write all slots in each row"
            )
        for p, expert in enumerate(row):
            if type(expert) is not int or abs(expert) >= 2**31:
                raise PlacementError(f"{name}[{i}][{p}]: {_show(expert)} is not an expert id; write a whole number")
    return np.array(rows, dtype=np.int32)


def _show(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
