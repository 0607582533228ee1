"""A raw mapping is held to a spec, `validated`; the first mistake becomes one line."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from epsim.errors import ScenarioError
from epsim.scenario.describe import describe

Spec = TypeVar("Spec", bound=BaseModel)


def validated(spec: type[Spec], raw: Mapping[str, Any], noun: str = "scenario") -> Spec:
    """Return the spec of a raw mapping, or raise ScenarioError. noun: what all of it is called, for messages."""
    try:
        return spec.model_validate(raw)
    except ValidationError as error:
        raise ScenarioError(describe(error, raw, spec, noun)) from error
    except UnicodeEncodeError as error:
        raise ScenarioError(f"{noun}: a text holds half a character (a lone surrogate); write it out") from error
