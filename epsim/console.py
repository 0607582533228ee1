"""What commands write to a terminal: tables in full, `print_in_full`; bars of simulated steps, requests and training
steps, `progress`, `count_requests`, `count_steps`. Bars are on stderr, and only if that is a terminal.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer


def print_in_full(renderable: Any) -> None:
    """Print tables in full, however narrow the terminal: a wrapped line can be read, a cut one cannot."""
    from rich.console import Console

    console = Console(markup=False, emoji=False, width=1000)  # names are the user's
    with console.capture() as captured:
        console.print(renderable)
    typer.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


@contextmanager
def progress(count: Callable[[], int] | None, label: str) -> Iterator[Callable[[], None]]:
    """Show a bar of simulated steps; without `count`, steps without an end."""
    with _bar(label, count, "steps", remaining=False) as update:
        yield lambda: update(advance=1)


@contextmanager
def count_requests(label: str, num_requests: int) -> Iterator[Callable[[int, int], None]]:
    """Show a bar of requests with tokens per second; yields advance(requests, tokens)."""
    import time

    start, num_tokens = time.monotonic(), 0

    def advance(requests: int, tokens: int) -> None:
        nonlocal num_tokens
        num_tokens += tokens
        rate = f"{num_tokens / max(time.monotonic() - start, 1e-9):,.0f}"
        update(advance=requests, what=f"requests, {rate} tokens/s")

    with _bar(label, lambda: num_requests, "requests, - tokens/s") as update:
        yield advance


@contextmanager
def count_steps(label: str, num_steps: int) -> Iterator[Callable[[int, str], None]]:
    """Show a bar of training steps; yields advance(steps done so far, a note such as "loss 1.23")."""
    with _bar(label, lambda: num_steps, "steps") as update:
        yield lambda step, note: update(completed=step, what=f"steps, {note}" if note else "steps")


@contextmanager
def _bar(
    label: str, count: Callable[[], int] | None, what: str, *, remaining: bool = True
) -> Iterator[Callable[..., None]]:
    """Show a bar with the time; yields update(advance=, completed=, what=), which does nothing where there is none.

    count: how many there are, asked only if the bar is shown; None: not known.
    what: is counted, and more about it if need be.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda **changes: None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[what]}", markup=False),
        TimeElapsedColumn(),
        *([TimeRemainingColumn()] if remaining else []),
    )
    with Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task(label, total=count() if count else None, what=what)
        yield lambda **changes: shown.update(task, **changes)
