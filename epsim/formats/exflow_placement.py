"""ExFlow's solution: CSV `Expert,Node`, a line per expert, whose id is layer * E + expert.

Node is what epsim calls a device. A device has a set of experts there, not slots; each expert is on one device.
"""

import csv
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from epsim.atomic import whole_file, write_errors
from epsim.errors import FormatError, PlacementError
from epsim.formats.options import Options
from epsim.formats.placement_checks import build
from epsim.formats.reading import read_text
from epsim.placement.file import MAX_DEVICES, MAX_EXPERTS, PlacementFile
from epsim.scenario.describe import show

NAME = "exflow"
_HEADER = ["Expert", "Node"]
_NOUN = "a CSV file with the header Expert,Node"
_MAX_LINES = 2**24


def read(path: Path, options: Options) -> PlacementFile:
    """Return the placement; devices with fewer experts than the fullest have empty slots at their end."""
    node_of_id = _lines(path)
    num_ids = len(node_of_id)
    if (missing := next((i for i in range(num_ids) if i not in node_of_id), None)) is not None:
        raise FormatError(f"{path}: Expert: there is no line for {missing} of {num_ids}; write each id from 0 once")
    num_experts, layer_ids = _shape(num_ids, options, path)
    node_LE = np.array([node_of_id[i] for i in range(num_ids)]).reshape(len(layer_ids), num_experts)
    num_devices = options.num_devices or int(node_LE.max()) + 1
    if node_LE.max() >= num_devices:
        raise FormatError(f"{path}: Node: there is a node {node_LE.max()}, --devices {num_devices}; write more")
    return build(
        str(path),
        layer_ids=layer_ids,
        num_experts=num_experts,
        num_devices=num_devices,
        physical_to_logical_LP=_slots(node_LE, num_devices),
        policy=NAME,
        description=f"imported from {path.name}",
    )


def _lines(path: Path) -> dict[int, int]:
    """Return the node of each id."""
    node_of_id: dict[int, int] = {}
    reader = csv.reader(io.StringIO(read_text(path, _NOUN), newline=""), strict=True)
    try:
        for row in reader:
            if reader.line_num == 1:
                if row != _HEADER:
                    raise FormatError(f"{path}: line 1: {show(','.join(row))} is not the header; write Expert,Node")
                continue
            where = f"{path}: line {reader.line_num}"
            if len(row) != 2:
                raise FormatError(
                    f"{where}: {show(','.join(row))} has {len(row)} values, not 2; write an id and a node"
                )
            expert, node = (
                _number(text, limit, where) for text, limit in zip(row, (_MAX_LINES, MAX_DEVICES), strict=True)
            )
            if expert in node_of_id:
                raise FormatError(
                    f"{where}: {expert} is there twice, and ExFlow has an expert on one node; leave one out"
                )
            node_of_id[expert] = node
    except csv.Error as error:
        raise FormatError(f"{path}: line {reader.line_num}: is not CSV ({error}); write {_NOUN}") from error
    if not node_of_id:
        raise FormatError(f"{path}: has no experts; write {_NOUN} and a line per expert")
    return node_of_id


def _number(text: str, limit: int, where: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) >= limit:
        raise FormatError(f"{where}: {show(text)} is not a whole number below {limit}; write one")
    return int(text)


def _shape(num_ids: int, options: Options, path: Path) -> tuple[int, tuple[int, ...]]:
    """Return the number of experts of a layer, and the layer ids."""
    layer_ids, num_experts = options.known_layer_ids, options.known_num_experts
    if num_experts is None and layer_ids is None:
        raise FormatError(
            f"{path}: does not say how many of its {num_ids} experts are in a layer; write --num-experts or --layer-ids"
        )
    num_experts = num_experts or num_ids // len(layer_ids or (0,))
    num_layers = len(layer_ids) if layer_ids is not None else num_ids // num_experts
    if not 1 <= num_experts <= MAX_EXPERTS or num_experts * num_layers != num_ids:
        raise FormatError(
            f"{path}: {num_ids} lines are not {num_layers} layers of {num_experts} experts; "
            "write other --num-experts or --layer-ids"
        )
    return num_experts, layer_ids or tuple(range(num_layers))


def _slots(node_LE: NDArray[np.int64], num_devices: int) -> NDArray[np.int32]:
    """Return int32 [L, P]: the experts of each device, ascending, then empty slots."""
    size = max(int(np.bincount(row_E, minlength=num_devices).max()) for row_E in node_LE)
    p2l_LRX = np.full((len(node_LE), num_devices, size), -1, dtype=np.int32)
    for layer, row_E in enumerate(node_LE):
        for device in range(num_devices):
            experts = np.flatnonzero(row_E == device)
            p2l_LRX[layer, device, : len(experts)] = experts
    return p2l_LRX.reshape(len(node_LE), -1)


def write(path: Path, placement: PlacementFile, num_layers: int | None) -> list[str]:
    """Write the CSV and return what is lost."""
    if num_layers is not None:
        raise FormatError(f"--num-layers {num_layers}: ExFlow's file has MoE layers only; leave it out")
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(_HEADER)
    for layer, row_P in enumerate(placement.physical_to_logical_LP):
        count_E = np.bincount(row_P[row_P >= 0], minlength=placement.num_experts)
        if count_E.max() > 1:
            raise PlacementError(
                f"physical_to_logical_map: layer {placement.layer_ids[layer]} has {count_E.max()} slots for expert "
                f"{int(count_E.argmax())}, and ExFlow has an expert on one node; leave the replicas out"
            )
        for expert, slot in enumerate(np.argsort(row_P, kind="stable")[len(row_P) - placement.num_experts :]):
            writer.writerow([layer * placement.num_experts + expert, int(slot) // placement.slots_per_device])
    with whole_file(path) as part, write_errors(path):
        part.write_bytes(text.getvalue().encode("ascii"))
    notes = ["ExFlow's file has no slots: which slot of a device an expert has, and empty ones, are not in it"]
    if placement.layer_ids != tuple(range(len(placement.layer_ids))):
        notes.append(f"ExFlow's file has no layer ids, and its layer 0 is layer {placement.layer_ids[0]}")
    return notes
