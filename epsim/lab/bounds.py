"""The proven lower bounds of `epsim.placement.bounds`, while that module is not everywhere: None without it."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

_bounds: Any = import_module("epsim.placement.bounds") if find_spec("epsim.placement.bounds") else None


def transfer_bound_L(*arguments: Any) -> Any:
    """Return the bound, or None."""
    return _bounds and _bounds.transfer_bound_L(*arguments)


def max_load_bound_L(*arguments: Any) -> Any:
    """Return the bound, or None."""
    return _bounds and _bounds.max_load_bound_L(*arguments)
