"""The command `epsim place`: parse, call, print."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from epsim.cli_place_replay import (
    BatchSize,
    Every,
    MatchDevices,
    Plot,
    Replay,
    ReplayOptions,
    Then,
    Window,
    refuse_others,
    replay_place,
)
from epsim.cli_trace import Overrides
from epsim.console import print_in_full, progress
from epsim.errors import InputError
from epsim.interrupt import run_to_end

if TYPE_CHECKING:
    from epsim.lab.experiment import Design
    from epsim.lab.question import Chosen, Question
    from epsim.placement.file import PlacementFile

HEAT_MAP = "heat-map.png"


def place(
    trace: Annotated[Path, typer.Argument(help="Routing trace (Arrow IPC).", metavar="TRACE", readable=False)],
    policy: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND,PARAM=VALUE", help="A policy of docs/scenario.md, or all; repeat for more."),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="POLICY", help="What to compare with; default: the first policy.")
    ] = None,
    scenario: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Model, cluster, homes, transmission, workload; not trace and placement."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Preset or *.yaml; default: the one the trace names.")
    ] = None,
    cluster: Annotated[str | None, typer.Option(metavar="NAME", help="Preset or *.yaml.")] = None,
    overrides: Overrides = None,
    seeds: Annotated[
        int | None, typer.Option(metavar="N", help="Random splits of the requests, seeds 0 to N - 1; default: 5.")
    ] = None,
    fit_share: Annotated[float, typer.Option(metavar="SHARE", help="Of the requests, to fit to.")] = 0.5,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the placement, fitted to all requests (JSON).")
    ] = None,
    best: Annotated[
        str | None,
        typer.Option(metavar="METRIC", help="--out takes the best policy in bytes, devices, ttft, tpot or balance."),
    ] = None,
    pairs: Annotated[bool, typer.Option("--pairs", help="Also print who sends how much to whom.")] = False,
    heat_map: Annotated[Path | None, typer.Option(metavar="DIR", help="Also draw that into this folder (PNG).")] = None,
    replay: Replay = False,
    every: Every = None,
    window: Window = None,
    batch_size: BatchSize = None,
    then: Then = None,
    match_devices: MatchDevices = None,
    plot: Plot = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print all values instead of tables.")] = False,
) -> None:
    """Compare placement policies on requests that they were not fitted to.

    epsim place traces/digits-soft.arrow --policy all --scenario scenarios/digits.yaml

    With --replay: in the order of the requests, a placement fitted to the first of them against one that is refitted
    to recent steps, with the weights that it moves.
    """
    from epsim.atomic import check_folder, check_outputs, require_writable
    from epsim.lab.choice import check_metric, check_second_tokens
    from epsim.lab.experiment import Design, check_design
    from epsim.lab.question import ask, choose, files_read
    from epsim.report.figure import require_matplotlib

    if not policy:
        raise InputError("--policy: is missing; write e.g. --policy contiguous --policy modality_bins, or --policy all")
    of_replay = ReplayOptions(
        every=every, window=window, batch_size=batch_size, then=then, match_devices=match_devices, plot=plot
    )
    if replay:
        refuse_others({"--seeds": seeds, "--out": out, "--best": best, "--pairs": pairs, "--heat-map": heat_map})
        question = ask(trace, scenario=scenario, model=model, cluster=cluster, overrides=overrides or ())
        replay_place(question, policy, baseline, fit_share=fit_share, options=of_replay, json_output=json_output)
        return
    of_replay.refuse()
    if best is not None:
        check_metric(best)
        if out is None:
            raise InputError(f"--best {best}: says which placement to write; name a file with --out")
    given = [text[1:] for text in overrides or () if text.startswith("@")]
    given += [name for name in (model, cluster) if name is not None and name.endswith((".yaml", ".yml"))]
    check_outputs({"--out": out}, (trace, scenario, *map(Path, given)))
    if heat_map is not None:
        require_matplotlib()
        check_folder(heat_map)
    question = ask(trace, scenario=scenario, model=model, cluster=cluster, overrides=overrides or ())
    if best is not None:
        check_second_tokens(best, question)
    chosen = choose(policy, baseline, question)
    check_outputs({"--out": out}, files_read(question, chosen, scenario))
    if out is not None:
        require_writable(out)
    design = Design(fit_share=fit_share) if seeds is None else Design(num_seeds=seeds, fit_share=fit_share)
    check_design(question, design)
    found, placement = run_to_end(
        lambda: _run(question, chosen, design, writes=out is not None, best=best), "no file was written"
    )
    _print(found, pairs=pairs or heat_map is not None, json_output=json_output)
    _write(found, placement, out, heat_map)


def _run(
    question: "Question", chosen: "Chosen", design: "Design", *, writes: bool, best: str | None
) -> "tuple[dict[str, Any], PlacementFile | None]":
    """Return the comparison, and the placement to write, if one is to be."""
    from epsim.lab.choice import placement_file
    from epsim.lab.experiment import compare_policies, count_steps

    with progress(lambda: count_steps(question, chosen, design), question.spec.name) as advance:
        found = compare_policies(question, chosen, design, advance)
    return found, placement_file(question, chosen, found, best) if writes else None


def _write(found: dict[str, Any], placement: "PlacementFile | None", out: Path | None, heat_map: Path | None) -> None:
    from epsim.report.files import write_files

    if heat_map is not None:
        from epsim.report.heat_map import heat_map as drawn

        for path in write_files(heat_map, {HEAT_MAP: drawn(found)}):
            typer.echo(f"wrote {path}", err=True)
    if out is not None and placement is not None:
        from epsim.placement.file import write_placement_file

        write_placement_file(out, placement)
        typer.echo(f"wrote {out}: {placement.policy}, fitted to all requests", err=True)


def _print(found: dict[str, Any], *, pairs: bool, json_output: bool) -> None:
    from epsim.report.files import to_json
    from epsim.report.heat_map import pair_maps
    from epsim.report.placement import placement_tables

    if json_output:
        typer.echo(to_json(found), nl=False)
        return
    print_in_full(placement_tables(found))
    if pairs:
        print_in_full(pair_maps(found))
