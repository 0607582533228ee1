"""The commands `epsim trace ..`: parse, call, print."""

from pathlib import Path
from typing import Annotated

import typer

from epsim.cli_capture import trace
from epsim.console import print_in_full
from epsim.errors import InputError

trace_app = typer.Typer(name="trace", no_args_is_help=True)
trace_app.callback(invoke_without_command=True)(trace)

ScenarioPath = Annotated[Path, typer.Argument(help="Scenario file (YAML).", metavar="SCENARIO", readable=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Change a field, e.g. cluster.links[0].bandwidth='25 Gbit/s'."),
]
TracePath = Annotated[Path, typer.Argument(help="Routing trace (Arrow IPC).", metavar="FILE", readable=False)]


@trace_app.command()
def info(path: TracePath) -> None:
    """Print what a trace holds and where it comes from."""
    from epsim.report.tables import trace_table
    from epsim.trace.file import TraceFile
    from epsim.trace.info import summarise

    print_in_full(trace_table(summarise(TraceFile.open(path))))


@trace_app.command()
def check(path: TracePath) -> None:
    """Check every invariant of a trace; the first bad row is named."""
    from epsim.trace import check_trace
    from epsim.trace.file import TraceFile

    trace = TraceFile.open(path)
    check_trace(trace)
    typer.echo(f"{path}: {trace.num_tokens} tokens, every invariant holds")


@trace_app.command()
def export(
    path: TracePath,
    parquet: Annotated[bool, typer.Option("--parquet", help="As Parquet: a row per token and layer, for SQL.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Default: beside the trace, as *.parquet.")
    ] = None,
) -> None:
    """Export a trace for other tools."""
    from epsim.trace.file import TraceFile
    from epsim.trace.parquet import export_parquet

    if not parquet:
        raise InputError("trace export: no format given; write --parquet")
    target = output or path.with_suffix(".parquet")
    if target.resolve() == path.resolve():
        raise InputError(f"{path}: would be replaced by its own export; name another file with -o")
    export_parquet(TraceFile.open(path), target)
    typer.echo(f"wrote {target}", err=True)


@trace_app.command()
def sample(
    path: TracePath,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Trace file to write.")],
    requests: Annotated[int, typer.Option(metavar="N", help="How many requests to keep, evenly spaced.")] = 8,
    compress: Annotated[bool, typer.Option("--compress", help="Compress with zstd, for shipping.")] = False,
) -> None:
    """Copy some requests of a trace, whole, to a smaller one."""
    from epsim.trace.file import TraceFile, sample_trace

    if output.resolve() == path.resolve():
        raise InputError(f"{path}: would be replaced by a sample of itself; name another file with -o")
    kept = sample_trace(TraceFile.open(path), output, requests, "zstd" if compress else None)
    typer.echo(f"wrote {output}: {kept} requests", err=True)


@trace_app.command()
def make(
    scenario: ScenarioPath,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Trace file to write.")],
    overrides: Overrides = None,
    compress: Annotated[bool, typer.Option("--compress", help="Compress with zstd, for shipping.")] = False,
) -> None:
    """Write the trace that a scenario draws or names to a file."""
    from epsim.scenario import load_scenario
    from epsim.traces import write_trace

    write_trace(load_scenario(scenario, overrides or ()), output, compress=compress)
    typer.echo(f"wrote {output}", err=True)


@trace_app.command()
def stats(
    path: TracePath,
    devices: Annotated[int, typer.Option(min=1, metavar="N", help="Devices that the experts are spread over.")] = 2,
    placement: Annotated[
        str,
        typer.Option(
            metavar="POLICY|FILE",
            help="contiguous, round_robin, random; fitted to FILE: modality_bins, coactivation, ..; or JSON.",
        ),
    ] = "contiguous",
    homes: Annotated[str, typer.Option(metavar="POLICY", help="by_modality or balanced.")] = "by_modality",
    bins: Annotated[int | None, typer.Option(metavar="B", help="Expert bins by text bias; default: 8.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of placement random.")] = 0,
    plot: Annotated[Path | None, typer.Option(metavar="DIR", help="Also draw figures (PNG) into this folder.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print all values instead of tables.")] = False,
) -> None:
    """Say how experts specialise by modality, how even their load is, and what would cross between devices."""
    from epsim.atomic import check_folder
    from epsim.report.figure import require_matplotlib
    from epsim.report.files import to_json, write_files
    from epsim.report.trace_stats import trace_stats_tables
    from epsim.trace.file import TraceFile
    from epsim.trace_stats import Spread, sample_request, trace_stats

    if plot is not None:
        require_matplotlib()
        check_folder(plot)
    trace = TraceFile.open(path)
    spread = Spread(num_devices=devices, placement=placement, homes=homes, seed=seed)
    found = trace_stats(trace, spread, num_bins=bins)
    if plot is not None:
        from epsim.report.routing_plots import draw_routing, left_out

        written = write_files(plot, draw_routing(found, sample_request(trace)))
        typer.echo("wrote " + ", ".join(map(str, written)), err=True)
        for line in left_out(found):
            typer.echo(line, err=True)
    if json_output:
        typer.echo(to_json(found), nl=False)
    else:
        print_in_full(trace_stats_tables(found))
