"""The formats of placements by name, `PLACEMENTS`: each reads a file into a `PlacementFile` and writes one."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from epsim.formats import exflow_placement, sglang_placement, tensorrt_llm_placement, vllm_ascend_placement
from epsim.formats.options import Options
from epsim.placement.file import PlacementFile


@dataclass(frozen=True, kw_only=True)
class PlacementFormat:
    """read: the file and what it does not say; write: the file, the placement, --num-layers; returns what is lost."""

    read: Callable[[Path, Options], PlacementFile]
    write: Callable[[Path, PlacementFile, int | None], list[str]]


PLACEMENTS: dict[str, PlacementFormat] = {
    module.NAME: PlacementFormat(read=module.read, write=module.write)
    for module in (sglang_placement, tensorrt_llm_placement, vllm_ascend_placement, exflow_placement)
}
