"""vllm-ascend's `expert_map_path`: JSON with the experts of each device in each MoE layer.

{"moe_layer_count": L, "layer_list": [{"layer_id", "device_count": D, "device_list": [{"device_id", "device_expert"}]}]}
vllm-ascend goes by the order of the lists, and wants as many experts on each device.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from epsim.atomic import whole_file, write_errors
from epsim.errors import FormatError, PlacementError
from epsim.formats.options import Options
from epsim.formats.placement_checks import build
from epsim.formats.reading import field, in_range, ints, mapping, read_json, whole
from epsim.placement.file import PlacementFile
from epsim.scenario.describe import show

NAME = "vllm-ascend"
_NOUN = 'a file {"moe_layer_count", "layer_list"}'


def read(path: Path, options: Options) -> PlacementFile:
    """Return the placement; counts in the file must agree with its lists."""
    fields = mapping(read_json(path, _NOUN), str(path), "a JSON object")
    num_layers = whole(field(fields, "moe_layer_count", str(path)), f"{path}: moe_layer_count", low=1)
    layers = _list(field(fields, "layer_list", str(path)), f"{path}: layer_list")
    if len(layers) != num_layers:
        raise FormatError(f"{path}: moe_layer_count: {num_layers}, but layer_list has {len(layers)}; write that")
    rows: list[tuple[int, list[list[int]]]] = []
    for i, layer in enumerate(layers):
        where = f"{path}: layer_list[{i}]"
        holder = mapping(layer, where, "a layer")
        rows.append((whole(field(holder, "layer_id", where), f"{where}.layer_id"), _devices(holder, where)))
        for noun, first, here in (
            ("devices", len(rows[0][1]), len(rows[-1][1])),
            ("experts on a device", len(rows[0][1][0]), len(rows[-1][1][0])),
        ):
            if first != here:
                raise FormatError(f"{where}: has {here} {noun}, layer_list[0] {first}; write as many in each layer")
    p2l_LP = np.array([[expert for device in devices for expert in device] for _, devices in rows])
    in_range(p2l_LP, 0, 2**31 - 1, f"{path}: layer_list", "write expert ids")
    num_devices = len(rows[0][1])
    if options.num_devices not in (None, num_devices):
        raise FormatError(f"{path}: device_count: {num_devices}, --devices {options.num_devices}; leave that out")
    layer_ids = options.known_layer_ids or tuple(layer_id for layer_id, _ in rows)
    if len(layer_ids) != num_layers:
        raise FormatError(f"{path}: has {num_layers} layers, --layer-ids or the model {len(layer_ids)}; name as many")
    return build(
        str(path),
        layer_ids=layer_ids,
        num_experts=options.known_num_experts or int(p2l_LP.max()) + 1,
        num_devices=num_devices,
        physical_to_logical_LP=p2l_LP.astype(np.int32),
        policy=NAME,
        description=f"imported from {path.name}",
    )


def _devices(layer: dict[str, Any], where: str) -> list[list[int]]:
    """Return the experts of each device of a layer."""
    num_devices = whole(field(layer, "device_count", where), f"{where}.device_count", low=1)
    devices = _list(field(layer, "device_list", where), f"{where}.device_list")
    if len(devices) != num_devices:
        raise FormatError(f"{where}.device_count: {num_devices}, but device_list has {len(devices)}; write that")
    experts: list[list[int]] = []
    for d, device in enumerate(devices):
        place = f"{where}.device_list[{d}]"
        holder = mapping(device, place, "a device")
        if whole(field(holder, "device_id", place), f"{place}.device_id") != d:
            raise FormatError(f"{place}.device_id: {holder['device_id']} is not {d}; number the devices in their order")
        experts.append(ints(field(holder, "device_expert", place), ("slot",), f"{place}.device_expert").tolist())
        if len(experts[d]) != len(experts[0]):
            raise FormatError(
                f"{place}.device_expert: has {len(experts[d])} experts, the first device {len(experts[0])}; "
                "write as many on each device"
            )
    return experts


def write(path: Path, placement: PlacementFile, num_layers: int | None) -> list[str]:
    """Write the JSON and return what is lost; empty slots are left out if each device then has as many experts."""
    if num_layers is not None:
        raise FormatError(f"--num-layers {num_layers}: vllm-ascend's file has MoE layers only; leave it out")
    p2l_LRX = placement.physical_to_logical_LP.reshape(len(placement.layer_ids), placement.num_devices, -1)
    filled_LR = (p2l_LRX >= 0).sum(axis=2)
    if (filled_LR != filled_LR[0, 0]).any():
        row, device = np.argwhere(filled_LR != filled_LR[0, 0])[0]
        raise PlacementError(
            f"physical_to_logical_map: device {device} has {filled_LR[row, device]} experts in layer "
            f"{placement.layer_ids[row]}, device 0 has {filled_LR[0, 0]} in layer {placement.layer_ids[0]}; "
            "vllm-ascend wants as many on each device in each layer, fill the slots"
        )
    layers = [
        {
            "layer_id": layer_id,
            "device_count": placement.num_devices,
            "device_list": [
                {"device_id": d, "device_expert": row_X[row_X >= 0].tolist()} for d, row_X in enumerate(p2l_RX)
            ],
        }
        for layer_id, p2l_RX in zip(placement.layer_ids, p2l_LRX, strict=True)
    ]
    lines = ",\n".join(json.dumps(layer) for layer in layers)
    with whole_file(path) as part, write_errors(path):
        part.write_text(f'{{"moe_layer_count": {len(layers)}, "layer_list": [\n{lines}\n]}}\n', encoding="utf-8")
    return ["empty slots are not in vllm-ascend's file"] if (p2l_LRX < 0).any() else []


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise FormatError(f"{where}: {show(value)} is not a list with something in it; write one")
    return value
