"""The options and the work of `epsim place --replay`: check, call, print."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from epsim.console import print_in_full, progress
from epsim.errors import InputError
from epsim.interrupt import run_to_end

if TYPE_CHECKING:
    from epsim.lab.question import Question

FIGURE = "replay.png"

Replay = Annotated[
    bool,
    typer.Option("--replay", help="Instead: serve the requests in their order, placements fixed against refitted."),
]
Every = Annotated[int | None, typer.Option(metavar="N", help="--replay: refit after every N steps.")]
Window = Annotated[int | None, typer.Option(metavar="W", help="--replay: to the last W steps; default: N.")]
BatchSize = Annotated[
    int | None, typer.Option(metavar="B", help="--replay: requests of a batch; default: the workload's first.")
]
Then = Annotated[
    list[Path] | None,
    typer.Option(metavar="TRACE", help="--replay: another trace after it in time; repeat for more.", readable=False),
]
MatchDevices = Annotated[
    bool | None,
    typer.Option(
        "--match-devices/--no-match-devices",
        help="--replay: like devices of a node may trade all they hold, so that less moves (default: they may).",
        show_default=False,
    ),
]
Plot = Annotated[
    Path | None, typer.Option(metavar="DIR", help="--replay: also draw what happens over steps into this folder (PNG).")
]


@dataclass(frozen=True, kw_only=True)
class ReplayOptions:
    """What the command line says of a replay, None where it says nothing."""

    every: int | None
    window: int | None
    batch_size: int | None
    then: Sequence[Path] | None
    match_devices: bool | None
    plot: Path | None

    def refuse(self) -> None:
        """Raise InputError for an option that means nothing without --replay."""
        for field, value in vars(self).items():
            if value not in (None, []):
                option = "--" + field.replace("_", "-")
                raise InputError(f"{option}: has no meaning without --replay; leave it out, or write --replay")


def refuse_others(options: Mapping[str, Any]) -> None:
    """Raise InputError for an option, by its name, that is given and means nothing with --replay."""
    for option, value in options.items():
        if value not in (None, False):
            raise InputError(
                f"{option}: has no meaning with --replay, which serves requests in one order; leave it out"
            )


def replay_place(
    question: "Question",
    policy: Sequence[str],
    baseline: str | None,
    *,
    fit_share: float,
    options: ReplayOptions,
    json_output: bool,
) -> None:
    """Run `epsim place --replay` and print what it gives."""
    from epsim.atomic import check_folder
    from epsim.lab.question import choose
    from epsim.lab.replay import Parts, ReplayDesign, count_replay_steps, replay_policies
    from epsim.lab.sequence import followed_by
    from epsim.lab.serving import Schedule
    from epsim.report.figure import require_matplotlib
    from epsim.report.files import to_json, write_files
    from epsim.report.replay import replay_tables

    if options.every is None:
        raise InputError("--every: is missing; write after how many steps placements are refitted, e.g. --every 16")
    if options.plot is not None:
        require_matplotlib()
        check_folder(options.plot)
    schedule = Schedule(
        every=options.every,
        window=options.every if options.window is None else options.window,
        match_devices=options.match_devices is not False,
    )
    design = ReplayDesign(schedule=schedule, fit_share=fit_share, batch_size=options.batch_size)
    question = followed_by(question, options.then or ())
    chosen = choose(policy, baseline, question, "contiguous")
    parts = Parts.of(question, design)

    def run() -> dict[str, Any]:
        with progress(lambda: count_replay_steps(parts, chosen), question.spec.name) as advance:
            return replay_policies(parts, chosen, design, advance)

    found = run_to_end(run, "no file was written")
    if options.plot is not None:
        from epsim.report.replay_plot import replay_figure

        for path in write_files(options.plot, {FIGURE: replay_figure(found)}):
            typer.echo(f"wrote {path}", err=True)
    if json_output:
        typer.echo(to_json(found), nl=False)
    else:
        print_in_full(replay_tables(found))
