"""Device profiles: the YAML of one fitted device type, which a cluster names in place of its fields."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from epsim.atomic import whole_file
from epsim.calibrate.parameters import Parameter, ParameterError
from epsim.errors import OutputError
from epsim.scenario.fields import ClusterField

_TYPES = "device_types"  # below `cluster`
FIRST_WORDS = "A device profile fitted to measurements by epsim"


def fitted_type(parameters: Sequence[Parameter]) -> str:
    """Return the one device type that the parameters belong to; ParameterError where there is none, or several."""
    names = [name for name in dict.fromkeys(_type_of(parameter.field) for parameter in parameters) if name is not None]
    if len(names) != 1:
        found = "several device types are fitted: " + ", ".join(names) if names else "no device type is fitted"
        raise ParameterError(f"--device: {found}; a profile is of one, so fit one, or use the printed --set lines")
    return names[0]


def _type_of(field: str) -> str | None:
    """Return the device type that a field is of, whichever way it is written; None for none."""
    steps = ClusterField(path=field).steps
    return steps[1] if steps[0] == _TYPES else None


def profile_text(cluster: Mapping[str, Any], device_type: str, header: Sequence[str]) -> str:
    """Return the YAML of a device type of a cluster, every field written out, under the lines of a comment.

    cluster: a dump of a ClusterSpec in SI units, with the fitted values written to it.
    """
    content = _written(cluster["device_types"][device_type], f"cluster.{_TYPES}.{device_type}")
    comment = "".join(f"# {line}".rstrip() + "\n" for line in header)
    return comment + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110)


def _written(value: Any, path: str) -> Any:
    if isinstance(value, Mapping):
        return {name: _written(part, f"{path}.{name}") for name, part in value.items()}
    return value if value is None else ClusterField(path=path).format(value)


def check_profile_path(path: Path | None) -> None:
    """Raise OutputError where a scenario could not name the file, or it would replace what is no profile."""
    if path is None:
        return
    if path.suffix != ".yaml":
        raise OutputError(f"--device {path}: scenarios name profiles by a path that ends in .yaml; write such a name")
    if path.exists() and not path.read_bytes().startswith(f"# {FIRST_WORDS}".encode()):
        raise OutputError(f"--device {path}: is there already and is no device profile; name another file")


def write_profile(path: Path, text: str) -> None:
    """Write a profile whole or not at all."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def set_lines(values: Mapping[str, float]) -> list[str]:
    """Return fitted values outside device types, which a profile cannot hold, as arguments of --set."""
    return [
        f"{field}={ClusterField(path=field).format(value)}"
        for field, value in values.items()
        if _type_of(field) is None
    ]
