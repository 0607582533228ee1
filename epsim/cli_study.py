"""The commands `epsim study specialise` and `epsim study placement`: parse, call, print."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from epsim.console import print_in_full
from epsim.errors import InputError
from epsim.interrupt import exit_early, run_to_end, stop_at_hangup

if TYPE_CHECKING:
    from epsim.study.placement import PlacementStudy
    from epsim.study.plan import Study
    from epsim.study.specialise import StudyOutcome

study_app = typer.Typer(name="study", help="Compare many training runs, or many placements.", no_args_is_help=True)


@study_app.command()
def specialise(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder of all runs, traces and figures.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, metavar="N", help="Seeds 0 to N - 1.")] = 3,
    jobs: Annotated[int, typer.Option(min=1, max=1024, metavar="N", help="Trainings at once, of one thread each.")] = 2,
    methods: Annotated[
        str | None, typer.Option(metavar="LIST", help="Comma-separated; soft is always among them. Default: all.")
    ] = None,
    config: Annotated[Path, typer.Option(metavar="DIR", help="The folder of the training files.")] = Path(
        "scenarios/train"
    ),
    scenario: Annotated[Path, typer.Option(metavar="FILE", help="Whose times are simulated.")] = Path(
        "scenarios/digits.yaml"
    ),
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a field of every training.")
    ] = None,
    docs: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the document, and its figures to images/ beside it.")
    ] = None,
) -> None:
    """Train every method from the same beginnings, and compare how experts specialise and what that saves. Hours.

    What is complete in -o is not run again. epsim study specialise -o out/study
    """
    from epsim.study.methods import choose
    from epsim.study.plan import Study, StudyFolder, shortened

    if output is None:
        raise InputError("study: no folder to write; write e.g. epsim study specialise -o out/study")
    names = choose(methods)
    _check(docs, config, scenario)
    chosen = Study(
        folder=StudyFolder(shortened(output)), methods=names, num_seeds=seeds, config=shortened(config),
        overrides=tuple(overrides or ()),
    )  # fmt: skip
    outcome = _run(chosen, shortened(scenario), jobs)
    _say(f"wrote {chosen.folder.study}")
    _print(outcome, chosen, docs)
    if outcome.failures:
        _say(f"epsim: {len(outcome.failures)} trainings or captures failed; run the same command to try these again")
        raise typer.Exit(2)


def _check(docs: Path | None, config: Path, scenario: Path) -> None:
    """Raise InputError before hours of work that would end in it."""
    from epsim.atomic import check_folder, require_replaceable
    from epsim.report.figure import require_matplotlib

    if docs is not None:
        require_matplotlib()
        require_replaceable(docs)
        check_folder(docs.parent / "images")
    for needed in (config, scenario):
        if not needed.exists():
            raise InputError(f"{needed}: is not there; run in the root of epsim's repository, or name it by an option")


def _run(study: "Study", scenario: Path, jobs: int) -> "StudyOutcome":
    from epsim.study.specialise import progress, run_study

    def run() -> "StudyOutcome | KeyboardInterrupt":
        stop_at_hangup()
        try:
            return run_study(study, scenario, jobs=jobs, say=_say)
        except KeyboardInterrupt as interrupt:
            return interrupt

    outcome = run_to_end(run, f"{study.folder.path} holds nothing new")
    if isinstance(outcome, KeyboardInterrupt):
        exit_early(outcome, f"{progress(study)}; the same command goes on from there")
    return outcome


def _print(outcome: "StudyOutcome", study: "Study", docs: Path | None) -> None:
    """Print the means over seeds, and write the document if it is asked for."""
    from epsim.report.study import study_table
    from epsim.study.document import write_document
    from epsim.study.plan import shortened
    from epsim.study.sections import COLUMNS, table_rows
    from epsim.study.summary import Summary

    print_in_full(study_table(COLUMNS, table_rows(Summary(outcome.study))))
    for path in write_document(shortened(docs), outcome.study, study.folder) if docs is not None else []:
        _say(f"wrote {path}")


def _say(line: str) -> None:
    typer.echo(line, err=True)


@study_app.command()
def placement(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder of the values of every comparison.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, metavar="N", help="Splits of each trace.")] = 5,
    jobs: Annotated[int, typer.Option(min=1, max=1024, metavar="N", help="Comparisons at once.")] = 2,
    traces: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the traces.")] = Path("traces"),
    scenarios: Annotated[
        list[Path] | None,
        typer.Option("--scenario", metavar="FILE", help="Repeat for more; default: 2 Orins, 8 H100."),
    ] = None,
    docs: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also put the tables between the marks of this document.")
    ] = None,
) -> None:
    """Compare all placement policies on all captured traces, each on requests that it was not fitted to. Minutes.

    What is complete in -o is not run again, unless trace, scenario or epsim's version differ. If only epsim's code
    changed, take a new folder. epsim study placement -o out/placement --docs docs/placement.md
    """
    from epsim.study.placement import SCENARIOS, PlacementStudy, traces_of
    from epsim.study.plan import shortened

    if output is None:
        raise InputError("study: no folder to write; write e.g. epsim study placement -o out/placement")
    study = PlacementStudy(
        folder=shortened(output),
        scenarios=tuple(scenarios or map(Path, SCENARIOS)),
        traces=traces_of(shortened(traces)),
        num_seeds=seeds,
    )
    if docs is not None:
        _check_placement_document(docs)
    _run_placement(study, jobs, docs)


def _check_placement_document(docs: Path) -> None:
    """Raise InputError before minutes of work that would end in it."""
    from epsim.atomic import check_folder, require_replaceable
    from epsim.report.figure import require_matplotlib
    from epsim.study.placement_document import check_document

    require_matplotlib()
    check_document(docs)
    require_replaceable(docs)
    check_folder(docs.parent / "images")


def _run_placement(study: "PlacementStudy", jobs: int, docs: Path | None) -> None:
    from epsim.study.placement import command, run_placement_study

    stop_at_hangup()
    cases, failures = run_to_end(
        lambda: run_placement_study(study, jobs=jobs, say=_say),
        f"the same command goes on from what is in {study.folder}",
    )
    if docs is not None and cases:
        from epsim.study.placement_document import write_placement_document

        for path in write_placement_document(docs, cases, command(study, docs)):
            _say(f"wrote {path}")
    if failures:
        _say(f"epsim: {len(failures)} comparisons failed; run the same command to try these again")
        raise typer.Exit(2)
