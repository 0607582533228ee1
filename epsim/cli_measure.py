"""The commands `epsim measure`: parse, call, print."""

import itertools
from pathlib import Path
from typing import Annotated

import typer

from epsim.cli_measure_run import network, run
from epsim.cli_trace import Overrides, ScenarioPath
from epsim.console import count_steps, print_in_full
from epsim.interrupt import run_in_parts

measure_app = typer.Typer(name="measure", help="Measure real machines.", no_args_is_help=True)
REACH = "How far (default: what the scenario can ask for)"


def _most(help_text: str) -> int | None:
    option: int | None = typer.Option(None, min=1, help=help_text, rich_help_panel=REACH, metavar="N")
    return option


@measure_app.callback()
def measure() -> None:
    """Measure real machines, for scenarios to be simulated with what was measured."""


@measure_app.command()
def device(
    scenario: ScenarioPath,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Profile to write (JSON).")],
    processes: Annotated[int, typer.Option(min=1, metavar="N", help="So many measure at once, as ranks would.")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Of each process; default: its share of the cores.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Samples of a cell and process.")] = 20,
    on: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    max_requests: int | None = _most("Requests of a home."),
    max_prompt: int | None = _most("Tokens of a prompt."),
    max_context: int | None = _most("Tokens of a request, with output."),
    max_tokens: int | None = _most("Tokens of a home in a prefill."),
    max_experts: int | None = _most("Experts of a device in a layer."),
    max_pairs: int | None = _most("(token, expert) pairs of a device in a layer."),
    max_vectors: int | None = _most("Vectors of a message."),
    max_images: int | None = _most("Images of a home."),
    overrides: Overrides = None,
) -> None:
    """Time the parts of a scenario's model on this machine, each inside passes through all layers.

    The profile goes into scenarios as cluster.device_types.<type>.profile.
    """
    from epsim.atomic import check_outputs
    from epsim.capture.extra import require_trace_extra
    from epsim.cost.profile import write_profile
    from epsim.report.device_profile import profile_tables
    from epsim.scenario import load_scenario

    check_outputs({"-o": output}, (scenario,))
    spec = load_scenario(scenario, overrides or ())
    require_trace_extra()
    from epsim.measure.device import measure_device, prepare, summary, wire_of
    from epsim.measure.ranges import ranges_of
    from epsim.model import ModelCard

    ranges = ranges_of(spec).widened(
        requests=max_requests,
        prompt=max_prompt,
        context=max_context,
        tokens=max_tokens,
        experts=max_experts,
        pairs=max_pairs,
        vectors=max_vectors,
        images=max_images,
    )
    job = prepare(
        ModelCard.from_mapping(spec.model.model_dump()),
        ranges,
        wire=wire_of(spec),
        device=on,
        num_processes=processes,
        num_threads=threads,
        repeats=repeats,
    )
    with count_steps("measuring", job.num_advances) as show:
        done = itertools.count(1)
        profile = run_in_parts(
            lambda: measure_device(job, lambda: show(next(done), "of a kind")), lambda: "no file was written"
        )
    write_profile(output, profile)
    print_in_full(profile_tables(summary(profile)))
    typer.echo(f"wrote {output}", err=True)


measure_app.command()(network)
measure_app.command()(run)
