"""TensorRT-LLM's MoE load balancer: YAML with num_slots, layer_updates_per_iter and initial_global_assignments.

The assignments map a real layer id to P expert ids, slot by slot; rank r owns the slots from r * P / ep_size on.
"""

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from epsim.atomic import whole_file, write_errors
from epsim.errors import FormatError
from epsim.formats.options import Options, check_layer_ids
from epsim.formats.placement_checks import build, filled
from epsim.formats.reading import field, in_range, ints, mapping, only_keys, read_text, whole
from epsim.placement.file import PlacementFile
from epsim.placement.placement import IntArray
from epsim.scenario.describe import show
from epsim.scenario.yaml_text import parse_yaml

NAME = "tensorrt-llm"
_KEYS = ("num_slots", "layer_updates_per_iter", "initial_global_assignments")
_NOUN = f"a YAML file with {', '.join(_KEYS)}"


def read(path: Path, options: Options) -> PlacementFile:
    """Return the placement; the number of devices (ep_size) is asked for, as the file does not say it."""
    text = read_text(path, _NOUN)
    try:
        content = parse_yaml(text)
    except ValueError as error:
        raise FormatError(f"{path}: is not YAML: {error}; write {_NOUN}") from error
    fields = mapping(content, str(path), "a mapping")
    only_keys(fields, _KEYS, str(path))
    num_slots = whole(field(fields, "num_slots", str(path)), f"{path}: num_slots", low=1)
    updates = field(fields, "layer_updates_per_iter", str(path))
    if type(updates) is not int or updates != 0:
        raise FormatError(
            f"{path}: layer_updates_per_iter: {show(updates)} is not 0: the placement would change "
            "while it serves; write 0"
        )
    layer_ids, p2l_LP = _assignments(field(fields, "initial_global_assignments", str(path)), num_slots, path)
    check_layer_ids(layer_ids, options, f"{path}: initial_global_assignments")
    if options.num_devices is None:
        raise FormatError(f"{path}: does not say over how many devices its {num_slots} slots lie; write --devices")
    num_experts = options.known_num_experts or int(p2l_LP.max(initial=0)) + 1
    return build(
        str(path),
        layer_ids=layer_ids,
        num_experts=num_experts,
        num_devices=options.num_devices,
        physical_to_logical_LP=p2l_LP,
        policy=NAME,
        description=f"imported from {path.name}",
    )


def _assignments(value: object, num_slots: int, path: Path) -> tuple[tuple[int, ...], IntArray]:
    where = f"{path}: initial_global_assignments"
    rows: dict[Any, Any] = mapping(value, where, "a mapping from layer ids to expert ids")
    if not rows:
        raise FormatError(f"{where}: is empty; write a row per MoE layer")
    for layer_id, row in rows.items():
        whole(layer_id, where)
        row_P = ints(row, ("slot",), f"{where}[{layer_id}]")
        if len(row_P) != num_slots:
            raise FormatError(f"{where}[{layer_id}]: has {len(row_P)} slots, num_slots is {num_slots}; write as many")
        in_range(row_P, 0, 2**31 - 1, f"{where}[{layer_id}]", "write expert ids")
    layer_ids = tuple(sorted(int(layer_id) for layer_id in rows))
    return layer_ids, np.array([rows[layer_id] for layer_id in layer_ids], dtype=np.int32)


def write(path: Path, placement: PlacementFile, num_layers: int | None) -> list[str]:
    """Write the YAML and return what is lost."""
    if num_layers is not None:
        raise FormatError(f"--num-layers {num_layers}: TensorRT-LLM's file has layer ids; leave it out")
    p2l_LP = filled(placement, "TensorRT-LLM")
    content = {
        "num_slots": int(p2l_LP.shape[1]),
        "layer_updates_per_iter": 0,
        "initial_global_assignments": dict(zip(placement.layer_ids, p2l_LP.tolist(), strict=True)),
    }
    text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=2**31)
    with whole_file(path) as part, write_errors(path):
        part.write_text(text, encoding="utf-8")
    return [
        f"TensorRT-LLM's file does not say that it is for {placement.num_devices} devices; start it with that ep_size"
    ]
