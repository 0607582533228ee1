"""The command `epsim calibrate`: parse, call, print."""

from pathlib import Path
from typing import Annotated

import typer

from epsim.console import print_in_full, progress


def calibrate(
    measured: Annotated[Path, typer.Argument(help="Measured TTFT and TPOT (CSV).", metavar="MEASURED", readable=False)],
    scenario: Annotated[Path, typer.Option(help="Scenario of the measurements.", metavar="FILE")],
    parameters: Annotated[Path | None, typer.Option(metavar="FILE", help="What to fit, with bounds (YAML).")] = None,
    compare: Annotated[str | None, typer.Option(metavar="COL=V", help="Also fit changes from these rows.")] = None,
    hold_out: Annotated[
        list[str] | None, typer.Option(metavar="COL=V,V", help="Predict these rows from others.")
    ] = None,
    folds: Annotated[int | None, typer.Option(metavar="K", help="Predict each K-th of the rows from the rest.")] = None,
    refit_intervals: Annotated[
        bool, typer.Option("--refit-intervals", help="Intervals by refitting, not linearised (slow).")
    ] = False,
    pair_weight: Annotated[float, typer.Option(min=0, max=100, help="Weight of a change beside a level.")] = 3.0,
    seed: Annotated[int, typer.Option(min=0, help="Of starts and folds.")] = 0,
    processes: Annotated[int | None, typer.Option(metavar="N", help="Default: one for each core.")] = None,
    device: Annotated[
        Path | None, typer.Option("--device", "-o", metavar="FILE", help="Write the fitted device as a profile (YAML).")
    ] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write every cell as CSV.")] = None,
    cells: Annotated[bool, typer.Option("--cells", help="Also print every cell.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of tables.")] = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a field of the scenario.")
    ] = None,
) -> None:
    """Fit a cluster's device and link figures to measured TTFT and TPOT, and say how far to believe them."""
    from epsim.atomic import check_outputs
    from epsim.calibrate.calibration import device_profile, report
    from epsim.calibrate.command import prepare, run
    from epsim.calibrate.profile import check_profile_path, write_profile
    from epsim.report.calibration import calibration_tables
    from epsim.report.files import to_json, write_csv

    check_outputs({"--device": device, "--csv": csv}, (measured, scenario, parameters))
    check_profile_path(device)
    prepared = prepare(
        measured, scenario, overrides=overrides or (), parameters=parameters, compare=compare, folds=folds,
        hold_outs=hold_out or (), pair_weight=pair_weight, seed=seed, profiled=refit_intervals,
        wants_profile=device is not None,
    )  # fmt: skip
    with progress(None, "calibrating") as advance:
        found = run(prepared, processes, advance)
    described = report(found, measured.name)
    if device is not None:
        write_profile(device, device_profile(found, measured.name, prepared.command))
    if csv is not None:
        write_csv(csv, described["cells"])
    if json_output:
        typer.echo(to_json(described), nl=False)
    else:
        print_in_full(calibration_tables(described, with_cells=cells))
