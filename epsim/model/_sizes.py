"""The check that the shapes of every model card share: `check_sizes`."""

from dataclasses import fields
from typing import Any

from epsim.errors import ScenarioError


def check_sizes(owner: Any, where: str, *may_be_zero: str) -> None:
    """Raise ScenarioError unless every number in the fields of dataclass `owner` is positive.

    `where` is the path of the owner ("model.moe."), `may_be_zero` names the fields that may be 0.
    """
    for field in fields(owner):
        value = getattr(owner, field.name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        least, ok = ("0 or more", value >= 0) if field.name in may_be_zero else ("positive", value > 0)
        if not ok:
            raise ScenarioError(f"{where}{field.name}: {value} is not {least}; write the checkpoint's size")
