"""Loads of SGLang: what its recorder leaves in mode `stat` (.pt), and its input {"logical_count": ...} (.json, .pt).

Both are int [N, L, E] or [L, E] with a row per layer of the model; dense layers and unused steps are zero.
"""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from epsim import __version__
from epsim.errors import FormatError
from epsim.formats.loads_file import Loads
from epsim.formats.options import Options, check_experts, check_layer_ids, choose_layers, names
from epsim.formats.reading import Ints, field, in_range, ints, mapping, read_json
from epsim.formats.torch_file import load_torch, tensor
from epsim.scenario.describe import show

STAT = "sglang-stat"
LOGICAL_COUNT = "sglang-logical-count"
_STAT_NOUN = "a file of SGLang's recorder in mode stat"
_COUNT_NOUN = 'a file {"logical_count": [layers][experts]}'
_MAX_COUNT = 2**53  # what JSON keeps everywhere


def read_stat(paths: list[Path], options: Options) -> Loads:
    """Return the counts of a recorder's file, without the steps that were not used."""
    path = _one(paths, STAT)
    fields = mapping(load_torch(path, _STAT_NOUN), str(path), "a mapping")
    if "records" in fields:
        raise FormatError(
            f"{path}: records: it holds records of passes, not of mode stat; if they are of tokens, "
            "import it with --from sglang-per-token"
        )
    where = f"{path}: logical_count"
    count_NLE = ints(tensor(field(fields, "logical_count", str(path))), ("step", "layer", "expert"), where)
    used_N = np.asarray((count_NLE != 0).any(axis=(1, 2)))
    if not used_N.any():
        raise FormatError(f"{where}: is zero throughout; nothing was recorded")
    about = {"steps": [int(n) for n in np.flatnonzero(used_N)]}
    return _loads(count_NLE[used_N], where, paths, options, about, STAT)


def read_logical_count(paths: list[Path], options: Options) -> Loads:
    """Return the counts of SGLang's own input; layer ids that epsim wrote beside them are kept."""
    path = _one(paths, LOGICAL_COUNT)
    if path.suffix not in (".json", ".pt"):
        raise FormatError(f"{path}: ends neither in .json nor in .pt; SGLang takes no other file")
    content = load_torch(path, _COUNT_NOUN) if path.suffix == ".pt" else read_json(path, _COUNT_NOUN)
    fields = mapping(content, str(path), "a mapping")
    if "physical_to_logical_map" in fields:
        raise FormatError(f"{path}: physical_to_logical_map: it is a placement; import it with --from sglang")
    value = tensor(field(fields, "logical_count", str(path)))
    where = f"{path}: logical_count"
    count = ints(value, ("layer", "expert") if _depth(value) == 2 else ("step", "layer", "expert"), where)
    if "layer_ids" in fields:
        return _own(fields, count, path, options)
    return _loads(count, where, paths, options, {}, LOGICAL_COUNT)


def _own(fields: dict[str, Any], count: Ints, path: Path, options: Options) -> Loads:
    """Return loads with the layer ids that stand beside them, or those of them that the options name."""
    ids = tuple(ints(fields["layer_ids"], ("layer",), f"{path}: layer_ids").tolist())
    if len(ids) != count.shape[-2] or ids[0] < 0 or any(a >= b for a, b in pairwise(ids)):
        raise FormatError(
            f"{path}: layer_ids: {show(list(ids))} are not {count.shape[-2]} ascending ids, one per layer of "
            "logical_count; write those, or leave layer_ids out"
        )
    known = options.known_layer_ids or ids
    if not set(known) <= set(ids):
        check_layer_ids(ids, options, f"{path}: layer_ids")
    rows = [ids.index(layer_id) for layer_id in known]
    named = replace(options, layer_ids=known)
    return _loads(count.take(rows, axis=-2), f"{path}: logical_count", [path], named, {}, LOGICAL_COUNT)


def _loads(count: Ints, where: str, paths: list[Path], options: Options, about: dict[str, Any], system: str) -> Loads:
    in_range(count, 0, _MAX_COUNT, where, "counts are not negative")
    rows, layer_ids = choose_layers(count.shape[-2], options, where)
    check_experts(count.shape[-1], options, where)
    about = {"system": system, "files": names(paths), **about, "software": f"epsim {__version__}"}
    return Loads(logical_count=count.take(rows, axis=-2), layer_ids=layer_ids, about=about)


def _depth(value: object) -> int:
    depth = getattr(value, "ndim", None)
    if depth is not None:
        return int(depth)
    depth = 0
    while isinstance(value, list) and value and depth < 4:
        value, depth = value[0], depth + 1
    return depth


def _one(paths: list[Path], name: str) -> Path:
    if len(paths) != 1:
        raise FormatError(f"{paths[1]}: {name} is one file; import them one by one")
    return paths[0]
