"""All of `epsim validate published` as plain values: `published_report`, and the device that fits table S11 best."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from epsim import __version__
from epsim.calibrate.profile import set_lines
from epsim.errors import InputError
from epsim.trace.synthetic import published_workload
from epsim.validate.affine import affine_report
from epsim.validate.latency import (
    DATA_NAME,
    PARAMETERS_NAME,
    SCENARIO,
    images_report,
    latency_report,
    load_case,
    run_studies,
)
from epsim.validate.parameters import fitted_profile, parameter_report
from epsim.validate.parts import parts_report
from epsim.validate.published import PUBLISHED_NAME, data_path, load_published
from epsim.validate.targets import target_report
from epsim.validate.transfer import transfer_report

Advance = Callable[[str], None]


def published_report(scenarios: Path, advance: Advance = lambda text: None) -> tuple[dict[str, Any], str]:
    """Return the report, and the device that fits all rows of table S11 as the text of a profile.

    scenarios: the folder with `s10/` and `s11/`; InputError where they are not. advance: is told what comes next.
    """
    require_scenarios(scenarios)
    published, case = load_published(), load_case(scenarios)
    advance("table S10: transfer ratios")
    s10 = transfer_report(scenarios)
    fits = run_studies(case, advance)
    s11 = latency_report(case, fits)
    advance("intervals of the fitted values")
    s11["parameters"] = parameter_report(case, fits)
    s11["images"] = with_prompt_tokens(images_report(case, fits["in_sample"].predicted, advance))
    s11["parts"] = parts_report(case, fits["in_sample"].values)
    s11["set"] = set_lines(fits["in_sample"].values)
    report = {
        "epsim_version": __version__,
        "citation": published.citation,
        "mismatches": list(published.mismatches),
        "s10": s10,
        "s11": s11,
        "s12": affine_report(published),
    }
    return report | {"targets": target_report(report)}, fitted_profile(case, fits)


def require_scenarios(scenarios: Path) -> None:
    """Raise InputError where the folder does not hold the scenarios of tables S10 and S11."""
    for needed in (scenarios / "s10", scenarios / SCENARIO):
        if not needed.exists():
            raise InputError(
                f"--scenarios {scenarios}: there is no {needed}; run in the root of epsim's repository, or name the "
                "folder"
            )


def files_read(scenarios: Path) -> list[Path]:
    """Return the files that a report is made of: the scenarios and the packaged data."""
    packaged = (data_path(name) for name in (PUBLISHED_NAME, DATA_NAME, PARAMETERS_NAME))
    return [*scenarios.glob("s10/*.yaml"), scenarios / SCENARIO, *packaged]


def with_prompt_tokens(images: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the entries with the prompt tokens of an MMMU request."""
    found = []
    for entry in images:
        workload = published_workload("MMMU", num_requests=1, num_images=entry["images"])
        found.append({**entry, "prompt_tokens": workload.num_vision_tokens + workload.num_text_tokens})
    return found
