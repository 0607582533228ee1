"""The command `epsim study specialise`: parse, call, print."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from epsim.console import print_in_full
from epsim.errors import InputError
from epsim.interrupt import exit_early, run_to_end, stop_at_hangup

if TYPE_CHECKING:
    from epsim.study.plan import Study
    from epsim.study.specialise import StudyOutcome

study_app = typer.Typer(name="study", help="Compare many training runs.", no_args_is_help=True)


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
