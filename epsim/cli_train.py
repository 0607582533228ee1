"""`epsim train`: its options, its progress bar, and what is said at its end."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from epsim.console import count_steps
from epsim.errors import InputError
from epsim.interrupt import exit_early, run_to_end


def train(
    training: Annotated[Path, typer.Argument(help="Training file (YAML).", metavar="FILE", readable=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder for the model and its figures.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Change a field, e.g. stages[0].steps=300."),
    ] = None,
    start: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Take stages that are the same from the folder of another run.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in -o that was ended early.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Of torch on the CPU.")] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Print the training file written out, and train nothing.")
    ] = False,
) -> None:
    """Train a small vision-language model whose experts specialise by modality, or a checkpoint.

    epsim train scenarios/train/attention.yaml -o out/attention
    """
    from epsim.scenario.load_train import load_train, train_yaml

    spec = load_train(training, overrides or ())
    if show:
        typer.echo(train_yaml(spec), nl=False)
        return
    folder = _checked_folder(training, output, start, threads)
    from epsim.capture.extra import require_trace_extra

    require_trace_extra()
    from epsim.specialize.command import train

    outcome = run_to_end(
        lambda: train(
            spec,
            folder,
            start=start,
            resume=resume,
            device=device,
            num_threads=threads,
            count=count_steps,
            say=lambda line: typer.echo(line, err=True),
        ),
        f"{folder} holds nothing new",
    )
    for line in outcome.lines:
        typer.echo(line)
    if outcome.stopped_by is not None:
        way_on = _way_on(folder, outcome.num_steps, resume=resume) if outcome.can_go_on else _way_around(folder)
        exit_early(outcome.stopped_by, way_on)


def _checked_folder(training: Path, output: Path | None, start: Path | None, threads: int | None) -> Path:
    """Return the folder to write into; raises InputError for options that cannot work."""
    from epsim.atomic import check_folder
    from epsim.capture.options import MAX_THREADS

    if output is None:
        raise InputError(f"train: no folder to write; write e.g. epsim train {training} -o out/{training.stem}")
    if start is not None and not start.is_dir():
        raise InputError(f"--start {start}: is not a folder; write the one of an earlier run")
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise InputError(f"--threads {threads}: must be from 1 to {MAX_THREADS}")
    check_folder(output)
    return output


def _way_on(folder: Path, num_steps: int, *, resume: bool) -> str:
    """Return what was done, and the command that goes on from there."""
    plural = "" if num_steps == 1 else "s"
    words = ["epsim", *sys.argv[1:], *([] if resume else ["--resume"])]
    if (folder / "last.pt").exists():
        return f"{folder} holds {num_steps} step{plural}; go on with: {shlex.join(words)}"
    return f"{folder} holds nothing to go on from; start again"


def _way_around(folder: Path) -> str:
    """Return how to begin again with other settings, from the stages that are complete, if any are."""
    start = f", with --start {folder} for the stages that are complete" if list(folder.glob("stage-*.pt")) else ""
    return f"{folder} holds the last good step; begin again into another folder{start}"
