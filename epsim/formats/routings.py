"""The formats of routings by name, `ROUTINGS`: each reads files, writes a routing trace and returns a line about it."""

from collections.abc import Callable
from pathlib import Path

from epsim.formats import flame_moe, sglang_per_token, sglang_routed_experts, vllm_routed_experts
from epsim.formats.options import Options

ROUTINGS: dict[str, Callable[[list[Path], Path, Options], list[str]]] = {
    module.NAME: module.read for module in (sglang_per_token, sglang_routed_experts, vllm_routed_experts, flame_moe)
}
