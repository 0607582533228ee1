"""The command line: parse, call, print. Errors are one line on stderr, exit code 2 for bad input and 1 otherwise.

Only typer and the exceptions are imported at start; each command imports what it needs.
"""

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from epsim import __version__
from epsim.cli_calibrate import calibrate
from epsim.cli_formats import export_command, import_command
from epsim.cli_measure import measure_app
from epsim.cli_place import place
from epsim.cli_study import study_app
from epsim.cli_trace import Overrides, ScenarioPath, trace_app
from epsim.cli_train import train
from epsim.cli_validate import validate_app
from epsim.console import print_in_full, progress
from epsim.errors import EpsimError, InputError
from epsim.process_end import leave, was_rank

app = typer.Typer(
    name="epsim",
    help="Predict what expert placement, dedup and asynchronous transmission do to TTFT and TPOT.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
scenario_app = typer.Typer(name="scenario", help="Look at scenarios.", no_args_is_help=True)
app.add_typer(scenario_app)
app.add_typer(trace_app)
app.add_typer(study_app)
app.add_typer(validate_app)
app.add_typer(measure_app)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"epsim {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every command; --debug is read by `main`."""


@app.command()
def simulate(
    scenario: ScenarioPath,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for results.json, steps.parquet and timeline.json.", metavar="DIR"),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print results.json instead of tables.")] = False,
) -> None:
    """Simulate a scenario: TTFT, TPOT and where the time goes, per batch size."""
    from epsim.atomic import check_folder
    from epsim.report.files import to_json, write_run
    from epsim.report.tables import simulation_tables
    from epsim.run import count_steps, simulate
    from epsim.scenario import load_scenario

    if out is not None:
        check_folder(out)
    spec = load_scenario(scenario, overrides or ())
    with progress(lambda: count_steps(spec), spec.name) as advance:
        outcome = simulate(spec, advance, with_timeline=out is not None)
    if out is not None:
        paths = write_run(
            out,
            results=outcome.results,
            steps=outcome.steps,
            slices=outcome.slices,
            device_names=outcome.device_names,
        )
        typer.echo("wrote " + ", ".join(map(str, paths)), err=True)
    if json_output:
        typer.echo(to_json(outcome.results), nl=False)
    else:
        print_in_full(simulation_tables(outcome.results))


@app.command()
def compare(
    scenario: ScenarioPath,
    axis: Annotated[
        list[str], typer.Option(metavar="PATH=V1,V2", help="Values of a field to compare; repeat for a grid.")
    ],
    baseline: Annotated[
        str | None,
        typer.Option(metavar="PATH=V,PATH=V", help="What to compare with; default: the first values."),
    ] = None,
    overrides: Overrides = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the rows as CSV.")] = None,
) -> None:
    """Simulate a grid of scenarios and print the differences to a baseline, best first."""
    from epsim.atomic import check_file
    from epsim.compare import compare, parse_axes, parse_baseline
    from epsim.report.files import write_csv
    from epsim.report.tables import comparison_tables
    from epsim.scenario import load_raw

    if csv is not None:
        check_file(csv)
    axes = parse_axes(axis)
    reference = parse_baseline(baseline, axes)
    raw = load_raw(scenario, overrides or ())
    with progress(None, "comparing") as advance:
        rows = compare(raw, axes, reference, advance)
    if csv is not None:
        write_csv(csv, rows)
    print_in_full(comparison_tables(rows, list(axes)))


app.command()(calibrate)
app.command()(place)
app.command()(train)
app.command("import")(import_command)
app.command("export")(export_command)


@scenario_app.command()
def schema() -> None:
    """Print the JSON schema of a scenario (for editors: yaml-language-server)."""
    import json

    from epsim.scenario import scenario_schema

    typer.echo(json.dumps(scenario_schema(), indent=2))


@scenario_app.command()
def show(scenario: ScenarioPath, overrides: Overrides = None) -> None:
    """Print the scenario with presets, overrides and defaults written out; it is a scenario again."""
    from epsim.scenario import load_scenario
    from epsim.scenario.yaml_text import dump_yaml

    spec = load_scenario(scenario, overrides or ())
    typer.echo(dump_yaml(spec.model_dump(mode="json", by_alias=True)), nl=False)


def main() -> None:
    """Entry point of the `epsim` command."""
    # Matrices here are small: threads of BLAS wait for each other longer than they compute (it is not loaded yet).
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # "µs" on an ASCII terminal
    try:
        _run()
    except BaseException as ended:
        if was_rank():
            leave(_code_of(ended))
        raise
    if was_rank():
        leave(0)


def _code_of(ended: BaseException) -> int:
    """Return the exit code that Python would have ended with, and print what it would have printed."""
    if isinstance(ended, SystemExit):
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    traceback.print_exception(ended)
    return 1


def _run() -> None:
    try:
        app(standalone_mode=True)
        sys.stdout.flush()
    except Exception as error:
        line = _one_line(error)
        if line is None or "--debug" in sys.argv:
            raise
        typer.echo(f"epsim: {line}", err=True)
        sys.exit(2 if isinstance(error, InputError) else 1)


def _one_line(error: Exception) -> str | None:
    """Return what to say of an error that is not epsim's own fault; None for one that is."""
    if isinstance(error, EpsimError):
        return " ".join(str(error).splitlines())
    if isinstance(error, MemoryError):
        return "not enough memory on this machine; use smaller batches or shorter requests"
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        return f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    if isinstance(error, RuntimeError) and "cannot cache function" in str(error):
        return "no place to keep compiled kernels; set NUMBA_CACHE_DIR to a folder that can be written to"
    return None


if __name__ == "__main__":
    main()
