"""TensorRT-LLM's expert statistics: a folder with meta_info.json and rank{r}.safetensors, summed over ranks.

Each tensor "{iteration}_{layer}" is [E], how often the tokens of that rank chose each expert; layers are real ids.
"""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from epsim import __version__
from epsim.errors import FormatError
from epsim.formats.loads_file import Loads
from epsim.formats.options import Options, check_experts, check_layer_ids, check_topk
from epsim.formats.reading import Ints, field, in_range, ints, mapping, read_json, whole
from epsim.json_file import check_regular
from epsim.scenario.describe import show

NAME = "tensorrt-llm-stats"
_NOUN = "a folder with meta_info.json and rank0.safetensors, rank1.safetensors, ..."
_RANK = re.compile(r"rank(\d{1,6})\.safetensors")
_KEY = re.compile(r"(\d{1,9})_(\d{1,9})")


def read(paths: list[Path], options: Options) -> Loads:
    """Return the counts by iteration, [N, L, E]."""
    folder = paths[0]
    if len(paths) != 1:
        raise FormatError(f"{paths[1]}: {NAME} is one folder; import them one by one")
    if not folder.is_dir():
        raise FormatError(f"{folder}: is not a folder; write the path of {_NOUN}")
    num_experts, topk = _meta(folder / "meta_info.json")
    check_experts(num_experts, options, f"{folder / 'meta_info.json'}: num_experts")
    check_topk(topk, options, f"{folder / 'meta_info.json'}: num_experts_per_token")
    ranks = _ranks(folder)
    first = _read_rank(ranks[0], num_experts)
    steps = sorted({step for step, _ in first})
    layer_ids = tuple(sorted({layer for _, layer in first}))
    count_NLE = np.zeros((len(steps), len(layer_ids), num_experts), dtype=np.int64)
    for i, path in enumerate(ranks):
        counts = first if i == 0 else _read_rank(path, num_experts)
        wanted = {(step, layer) for step in steps for layer in layer_ids}
        if differing := sorted(wanted ^ set(counts)):
            step, layer = differing[0]
            verb = "lacks" if (step, layer) in wanted else "has, and other ranks lack,"
            raise FormatError(f"{path}: {verb} {step}_{layer}; each rank must have each layer in each iteration")
        for (step, layer), count_E in counts.items():
            count_NLE[steps.index(step), layer_ids.index(layer)] += count_E
    check_layer_ids(layer_ids, options, str(folder))
    about = {"system": NAME, "files": [folder.name], "num_ranks": len(ranks), "num_experts_per_token": topk}
    return Loads(
        logical_count=count_NLE,
        layer_ids=layer_ids,
        about={**about, "steps": steps, "software": f"epsim {__version__}"},
    )


def _meta(path: Path) -> tuple[int, int]:
    fields = mapping(read_json(path, _NOUN), str(path), "a JSON object")
    num_experts = whole(field(fields, "num_experts", str(path)), f"{path}: num_experts", 1, 65536)
    topk = field(fields, "num_experts_per_token", str(path))
    return num_experts, whole(topk, f"{path}: num_experts_per_token", 1, num_experts)


def _ranks(folder: Path) -> list[Path]:
    """Return the file of each rank, in order."""
    ranks = {int(match[1]): path for path in folder.iterdir() if (match := _RANK.fullmatch(path.name))}
    if not ranks:
        raise FormatError(f"{folder}: there is no rank0.safetensors; write the path of {_NOUN}")
    if missing := sorted(set(range(max(ranks) + 1)) - set(ranks)):
        raise FormatError(f"{folder}: rank{missing[0]}.safetensors is missing of {max(ranks) + 1}; copy all of them")
    return [ranks[r] for r in sorted(ranks)]


def _read_rank(path: Path, num_experts: int) -> dict[tuple[int, int], Ints]:
    """Return [E] by (iteration, layer)."""
    counts: dict[tuple[int, int], Ints] = {}
    for key, value in _tensors(path).items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise FormatError(f"{path}: {show(key)} is not {{iteration}}_{{layer}}; write {_NOUN}")
        count_E = ints(value, ("expert",), f"{path}: {key}")
        if len(count_E) != num_experts:
            raise FormatError(f"{path}: {key}: has {len(count_E)} experts, meta_info.json {num_experts}; write as many")
        in_range(count_E, 0, 2**53, f"{path}: {key}", "counts are not negative")
        counts[int(match[1]), int(match[2])] = count_E
    if not counts:
        raise FormatError(f"{path}: has no tensors; nothing was recorded")
    return counts


def _tensors(path: Path) -> dict[str, Any]:
    if find_spec("safetensors") is None:
        raise FormatError(f"{path}: needs safetensors; install it with: pip install 'epsim[trace]'")
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        check_regular(path)
        return dict(load_file(path))
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror or error}; write the path of {_NOUN}") from error
    except (SafetensorError, KeyError, ValueError) as error:
        raise FormatError(f"{path}: is not a safetensors file, or damaged; copy it again") from error
