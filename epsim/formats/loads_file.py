"""How often experts were chosen, as a file: `Loads`, `write_loads`. SGLang takes the file as it is.

JSON: {"logical_count": [L][E] or [N][L][E], "layer_ids": [L], "num_experts": E, "system": "...", "files": [...]}
and for N steps perhaps "steps": [N]. Letters: N steps, L layers, E logical experts.
"""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from epsim.atomic import whole_file, write_errors
from epsim.formats.reading import Ints


@dataclass(frozen=True, kw_only=True, eq=False)
class Loads:
    """logical_count: int64 [L, E], or [N, L, E] by step. layer_ids: real ids of the L layers. about: further keys."""

    logical_count: Ints
    layer_ids: tuple[int, ...]
    about: dict[str, Any]

    def __post_init__(self) -> None:
        if self.logical_count.ndim not in (2, 3) or self.logical_count.shape[-2] != len(self.layer_ids):
            raise ValueError("logical_count must be (layers, experts) or (steps, layers, experts)")
        if any(a >= b for a, b in pairwise(self.layer_ids)):
            raise ValueError("layer_ids must ascend")

    @property
    def idle_layers(self) -> list[int]:
        """Ids of layers of which no expert was ever chosen: dense ones, most likely."""
        count_L = self.logical_count.sum(axis=-1)
        count_L = count_L.sum(axis=0) if count_L.ndim == 2 else count_L
        return [layer_id for layer_id, count in zip(self.layer_ids, count_L, strict=True) if count == 0]


def write_loads(path: Path, loads: Loads) -> None:
    """Write the file, whole or not at all."""
    fields = {
        "logical_count": loads.logical_count.tolist(),
        "layer_ids": list(loads.layer_ids),
        "num_experts": int(loads.logical_count.shape[-1]),
        **loads.about,
    }
    with whole_file(path) as part, write_errors(path):
        part.write_text(json.dumps(fields) + "\n", encoding="utf-8")
