"""SGLang's `--init-expert-location`: exactly {"physical_to_logical_map": [L][P]}, as .json or .pt.

SGLang has a row per layer of the model, dense ones too (`num_hidden_layers`), and no ids. Letters: L rows, P slots.
"""

import json
from pathlib import Path

import numpy as np

from epsim.atomic import whole_file, write_errors
from epsim.errors import FormatError
from epsim.formats.options import Options, choose_layers
from epsim.formats.placement_checks import build, filled
from epsim.formats.reading import Ints, in_range, ints, mapping, only_keys, parse_json, read_text
from epsim.formats.torch_file import load_torch, save_torch, tensor
from epsim.placement.file import PlacementFile

NAME = "sglang"
_KEY = "physical_to_logical_map"
_NOUN = 'a file {"physical_to_logical_map": [layers][slots]}, .json or .pt'


def read(path: Path, options: Options) -> PlacementFile:
    """Return the placement; the number of devices is asked for, as the file does not say it."""
    if path.suffix not in (".json", ".pt"):
        raise FormatError(f"{path}: ends neither in .json nor in .pt; SGLang takes no other file")
    content = load_torch(path, _NOUN) if path.suffix == ".pt" else parse_json(read_text(path, _NOUN), str(path), _NOUN)
    fields = mapping(content, str(path), "a mapping")
    if "logical_count" in fields:
        raise FormatError(
            f"{path}: logical_count: it holds loads, from which SGLang makes a placement of its own, and no placement; "
            "import it with --from sglang-logical-count"
        )
    only_keys(fields, (_KEY,), str(path))
    if _KEY not in fields:
        raise FormatError(f"{path}: {_KEY} is missing; write {_NOUN}")
    where = f"{path}: {_KEY}"
    p2l_LP = ints(tensor(fields[_KEY]), ("layer", "slot"), where)
    rows, layer_ids = choose_layers(len(p2l_LP), options, where)
    p2l_LP = p2l_LP[rows]
    if options.num_devices is None:
        raise FormatError(
            f"{path}: does not say over how many devices its {p2l_LP.shape[1]} slots lie; write --devices"
        )
    num_experts = options.known_num_experts or int(p2l_LP.max(initial=0)) + 1
    in_range(p2l_LP, 0, num_experts - 1, where, f"experts are numbered 0 to {num_experts - 1}")
    return build(
        str(path),
        layer_ids=layer_ids,
        num_experts=num_experts,
        num_devices=options.num_devices,
        physical_to_logical_LP=p2l_LP.astype(np.int32),
        policy=NAME,
        description=f"imported from {path.name}",
    )


def write(path: Path, placement: PlacementFile, num_layers: int | None) -> list[str]:
    """Write the map and return what is lost; layers up to `num_layers` that are not there get SGLang's first map."""
    if path.suffix not in (".json", ".pt"):
        raise FormatError(f"-o {path}: ends neither in .json nor in .pt; SGLang takes no other file")
    p2l_LP = filled(placement, "SGLang")
    if num_layers is not None:
        p2l_LP = _every_layer(placement, num_layers)
    if path.suffix == ".pt":
        save_torch(path, {_KEY: p2l_LP.astype(np.int32)})
    else:
        rows = ",\n".join(f"  {json.dumps(row)}" for row in p2l_LP.tolist())
        with whole_file(path) as part, write_errors(path):
            part.write_text(f'{{"{_KEY}": [\n{rows}\n]}}\n', encoding="utf-8")
    return _notes(placement, num_layers)


def _every_layer(placement: PlacementFile, num_layers: int) -> Ints:
    """Return a row per layer of the model; dense ones get arange(P) % E, which nothing reads."""
    if placement.layer_ids[-1] >= num_layers:
        raise FormatError(
            f"--num-layers {num_layers}: there is a layer {placement.layer_ids[-1]}; write more than that"
        )
    first_P = np.arange(placement.physical_to_logical_LP.shape[1]) % placement.num_experts
    p2l_LP: Ints = np.tile(first_P, (num_layers, 1)).astype(np.int64)
    p2l_LP[list(placement.layer_ids)] = placement.physical_to_logical_LP
    return p2l_LP


def _notes(placement: PlacementFile, num_layers: int | None) -> list[str]:
    notes = [f"SGLang's file does not say that it is for {placement.num_devices} devices; start it with that --ep-size"]
    if num_layers is None and placement.layer_ids != tuple(range(len(placement.layer_ids))):
        notes.append(
            f"SGLang's file has no layer ids, and row 0 is layer {placement.layer_ids[0]}; SGLang wants a row per "
            "layer of the model, dense ones too: write --num-layers"
        )
    return notes
