"""The methods that are compared: `METHODS`; `choose` some of them; `published_specialisation`, the paper's figures.

Each is a training file of scenarios/train.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from epsim.errors import InputError
from epsim.scenario.yaml_text import parse_yaml
from epsim.validate.published import PUBLISHED_NAME, data_text

BASE = "soft"  # its first stages are those of all others
METHODS: Mapping[str, str] = {  # the training file without its suffix, and what it is
    BASE: "soft routing",
    "binning": "bins and balance within them, no objective",
    "attention": "SMoES attention-soft",
    "attention-fixed": "SMoES attention-soft, fixed bins",
    "gaussian": "SMoES gaussian-soft",
    "gmm2": "SMoES, mixtures of 2 Gaussians",
    "hard-score": "SMoES hard-score",
    "kl": "divergence between bins",
    "smar": "SMAR [1.5, 2.0]",
    "hard": "hard routing t32-v32",
    "hard-48-16": "hard routing t48-v16",
    "moiie": "MoIIE t16-v16-s32",
    "moiie-24-24-16": "MoIIE t24-v24-s16",
    "moiie-32-16-16": "MoIIE t32-v16-s16",
}
IN_TABLE_S10 = {BASE: "baseline", "attention": "attention-soft", "gaussian": "gaussian-soft"}  # its names for them


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """What SMoES says of a method on OLMoE; None: nothing.

    Attributes:
        tables: where it says so.
        msi: SMoES eq. 19.
        multimodal_percent, language_percent, overall_percent: change of the mean accuracy against soft routing.
    """

    tables: str
    msi: float | None
    multimodal_percent: float | None
    language_percent: float | None
    overall_percent: float | None


def published_specialisation() -> dict[str, PublishedRow]:
    """Return the rows of the paper's tables on OLMoE, by method."""
    content = parse_yaml(data_text(PUBLISHED_NAME))["specialisation_olmoe"]
    return {
        name: PublishedRow(tables=row["in"], **dict(zip(content["columns"], row["values"], strict=True)))
        for name, row in content["rows"].items()
    }


def choose(names: str | None) -> tuple[str, ...]:
    """Return the methods of a comma-separated list, in the order of `METHODS`; None: all. `BASE` is always among them.

    Raises InputError for one that is not known.
    """
    if names is None:
        return tuple(METHODS)
    asked = {name.strip() for name in names.split(",")}
    for name in sorted(asked - set(METHODS)):
        raise InputError(f'--methods: "{name}" is not a method; write some of {",".join(METHODS)}')
    return tuple(name for name in METHODS if name == BASE or name in asked)
