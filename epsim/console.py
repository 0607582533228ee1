"""What commands write to a terminal: tables in full, `print_in_full`; bars of steps and requests, `progress`,
`count_requests`.
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
    """Show a bar of simulated steps on stderr, only on a terminal; without `count`, steps without an end."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda: None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=count() if count else None)
        yield lambda: progress.advance(task)


@contextmanager
def count_requests(label: str, num_requests: int) -> Iterator[Callable[[int, int], None]]:
    """Show a bar of requests with tokens per second on stderr, only on a terminal; yields advance(requests, tokens)."""
    import time

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
        yield lambda requests, tokens: None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("requests, {task.fields[rate]} tokens/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    start, num_tokens = time.monotonic(), 0

    def advance(requests: int, tokens: int) -> None:
        nonlocal num_tokens
        num_tokens += tokens
        rate = f"{num_tokens / max(time.monotonic() - start, 1e-9):,.0f}"
        progress.update(task, advance=requests, rate=rate)

    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=num_requests, rate="-")
        yield advance
