"""Ctrl-C, SIGTERM and lost terminals during commands that take hours.

`run_to_end`, `run_in_parts`, `exit_early`, `stop_at_hangup`.
"""

import signal
from collections.abc import Callable
from typing import NoReturn, TypeVar

import typer

Outcome = TypeVar("Outcome")
INTERRUPTED = 128 + signal.SIGINT  # the exit code


def run_to_end(run: Callable[[], Outcome], nothing: str) -> Outcome:
    """Return what `run` returns; if it is interrupted before it can return, say `nothing` and exit.

    SIGTERM, with which schedulers end a job, ends it as Ctrl-C does.
    """
    return _run(run, lambda: f"interrupted before anything was done; {nothing}")


def run_in_parts(run: Callable[[], Outcome], rest: Callable[[], str]) -> Outcome:
    """Return what `run` returns; if it is interrupted, or its terminal is lost, say what `rest` finds and exit."""
    stop_at_hangup()
    return _run(run, lambda: f"interrupted; {rest()}")


def _run(run: Callable[[], Outcome], say: Callable[[], str]) -> Outcome:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run()
    except KeyboardInterrupt:
        _ignore_signals()
        typer.echo(f"epsim: {say()}", err=True)
        raise typer.Exit(INTERRUPTED) from None


def stop_at_hangup() -> None:
    """Let a terminal that goes away interrupt as Ctrl-C does: children in sessions of their own would go on.

    A program that was started with nohup goes on, too.
    """
    number = getattr(signal, "SIGHUP", None)  # there is none on Windows
    if number is not None and signal.getsignal(number) == signal.SIG_DFL:
        signal.signal(number, signal.default_int_handler)


def exit_early(stopped_by: BaseException, rest: str) -> NoReturn:
    """Say in one line what ended a run before its end, and `rest`; exit with a code that tells which it was."""
    interrupted = isinstance(stopped_by, KeyboardInterrupt)
    if interrupted:
        _ignore_signals()
    what = "interrupted" if interrupted else " ".join(str(stopped_by).splitlines())
    typer.echo(f"epsim: {what}; {rest}", err=True)
    raise typer.Exit(INTERRUPTED if interrupted else 2)


def _ignore_signals() -> None:
    """Another interrupt must not spoil the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
