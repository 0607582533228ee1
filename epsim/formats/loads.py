"""The formats of loads by name: `LOADS` reads them; `export_loads` writes SGLang's input from a routing trace."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from epsim.atomic import whole_file, write_errors
from epsim.errors import FormatError
from epsim.formats import sglang_loads, tensorrt_llm_stats
from epsim.formats.loads_file import Loads
from epsim.formats.options import Options
from epsim.trace import TraceSource
from epsim.trace.statistics import expert_load

LOADS: dict[str, Callable[[list[Path], Options], Loads]] = {
    sglang_loads.STAT: sglang_loads.read_stat,
    sglang_loads.LOGICAL_COUNT: sglang_loads.read_logical_count,
    tensorrt_llm_stats.NAME: tensorrt_llm_stats.read,
}
EXPORT_NAME = sglang_loads.LOGICAL_COUNT


def export_loads(path: Path, trace: TraceSource, num_layers: int | None) -> list[str]:
    """Write {"logical_count": [L][E], ...} of a trace, all tokens together, and return what is lost.

    num_layers: layers of the model, dense ones too; those without experts get zeros. None: the trace's layers only.
    """
    if path.suffix != ".json":
        raise FormatError(f"-o {path}: does not end in .json; SGLang would take it for something else")
    count_LE = expert_load(trace).sum(axis=0)
    layer_ids = trace.meta.layer_ids
    if num_layers is not None:
        if layer_ids[-1] >= num_layers:
            raise FormatError(f"--num-layers {num_layers}: there is a layer {layer_ids[-1]}; write more than that")
        all_LE = np.zeros((num_layers, trace.meta.num_experts), dtype=np.int64)
        all_LE[list(layer_ids)] = count_LE
        count_LE, layer_ids = all_LE, tuple(range(num_layers))
    fields = {
        "logical_count": count_LE.tolist(),
        "layer_ids": list(layer_ids),
        "num_experts": trace.meta.num_experts,
        "model": trace.meta.model,
        "origin": trace.meta.kind,
    }
    with whole_file(path) as part, write_errors(path):
        part.write_text(json.dumps(fields) + "\n", encoding="utf-8")
    if layer_ids != tuple(range(len(layer_ids))):
        return [
            f"row 0 is layer {layer_ids[0]}; SGLang wants a row per layer of the model, dense ones too: "
            "write --num-layers"
        ]
    return []
