"""The command `epsim study specialise`: parse, call, print."""

from pathlib import Path
from typing import Annotated

import typer

from epsim.console import print_in_full
from epsim.errors import InputError
from epsim.interrupt import exit_early, run_to_end

study_app = typer.Typer(name="study", help="Compare many training runs.", no_args_is_help=True)


@study_app.callback()
def study() -> None:
    """Compare many training runs."""


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
    from epsim.atomic import check_folder
    from epsim.report.figure import require_matplotlib
    from epsim.report.study import study_table
    from epsim.study.document import write_document
    from epsim.study.methods import choose
    from epsim.study.plan import Study, StudyFolder
    from epsim.study.sections import COLUMNS, table_rows
    from epsim.study.specialise import StudyOutcome, progress, run_study
    from epsim.study.summary import Summary

    if output is None:
        raise InputError("study: no folder to write; write e.g. epsim study specialise -o out/study")
    if docs is not None:
        require_matplotlib()
        check_folder(docs.parent / "images")
    chosen = Study(
        folder=StudyFolder(output), methods=choose(methods), num_seeds=seeds, config=config,
        overrides=tuple(overrides or ()),
    )  # fmt: skip
    for needed in (config, scenario):
        if not needed.exists():
            raise InputError(f"{needed}: is not there; run in the root of epsim's repository, or name it by an option")

    def run() -> StudyOutcome | KeyboardInterrupt:
        try:
            return run_study(chosen, scenario, jobs=jobs, say=_say)
        except KeyboardInterrupt as interrupt:
            return interrupt

    outcome = run_to_end(run, f"{output} holds nothing new")
    if isinstance(outcome, KeyboardInterrupt):
        exit_early(outcome, f"{progress(chosen)}; the same command goes on from there")
    print_in_full(study_table(COLUMNS, table_rows(Summary(outcome.study))))
    _say(f"wrote {chosen.folder.study}")
    for path in write_document(docs, outcome.study, chosen.folder) if docs is not None else []:
        _say(f"wrote {path}")
    if outcome.failures:
        _say(f"epsim: {len(outcome.failures)} trainings or captures failed; run the same command to try these again")
        raise typer.Exit(2)


def _say(line: str) -> None:
    typer.echo(line, err=True)
