"""What docs/validation.md says of fitted values: `parameters_section`, `influence_sentence`."""

from collections.abc import Mapping, Sequence
from typing import Any

from epsim.validate.markdown import capital, table
from epsim.validate.parameters import short_name
from epsim.validate.prose import INTERVALS

METRICS = ("ttft", "tpot")


def influence_sentence(studies: Sequence[Mapping[str, Any]]) -> str:
    """Return the parameters that the fitted rows of a study say nothing of, and what they are left at."""
    blind = [
        f"{study['title']}: {', '.join(names)}"
        for study in studies
        if (names := [f"`{short_name(entry['field'])}` at {entry['text']}" for entry in study["without_influence"]])
    ]
    if not blind:
        return "Every parameter moves some fitted row of every study."
    return (
        "Some studies fit rows that say nothing of a parameter (no derivative at the fit): its value comes from where "
        "the search started and the weak ridge towards the specification, not from any measurement. "
        f"{capital('; '.join(blind))}."
    )


def parameters_section(parameters: Sequence[Mapping[str, Any]], cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return heading, the count of what the data do not determine, what intervals mean, and the table."""
    rows = [
        (
            f"`{entry['name']}`",
            entry["text"]["specified"] or "none",
            entry["text"]["value"],
            interval_text(entry),
            f"{entry['text']['low']} .. {entry['text']['high']}",
            entry["reason"],
        )
        for entry in parameters
    ]
    loose = [f"`{entry['name']}`" for entry in parameters if not entry["determined"]]
    said = (
        f"{len(parameters) - len(loose)} of {len(parameters)} parameters are determined by the data; not determined: "
        f"{', '.join(loose) or 'none'}. For these the cost, linearised at the fit, sets no narrower bound, with the "
        "others moved to suit."
    )
    columns = ("parameter", "specification", "fitted", "95 % interval", "bounds", "why these bounds")
    return ["### Fitted values", said, intervals_text(cells), table(columns, rows)]


def intervals_text(cells: Sequence[Mapping[str, Any]]) -> str:
    """Return what the intervals are worth; cells: of the fit to all rows."""
    errors = {
        (cell["benchmark"], cell["batch_size"], metric, cell["method"]): cell[metric]["error_percent"]
        for cell in cells
        for metric in METRICS
    }
    pairs = [(off, errors[*key, "attention-soft"]) for (*key, method), off in errors.items() if method == "baseline"]
    return INTERVALS.format(same=sum((a > 0) == (b > 0) for a, b in pairs), pairs=len(pairs))


def interval_text(entry: Mapping[str, Any]) -> str:
    """Return a parameter's interval, and why it does not determine the parameter where it does not."""
    text = f"{entry['text']['interval_low']} .. {entry['text']['interval_high']}"
    return text if entry["determined"] else f"undetermined: {text}, {entry['undetermined_because']}"
