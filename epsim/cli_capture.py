"""`epsim trace` itself: the options of a capture, its progress bar, and what is said at its end."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from epsim.console import count_requests
from epsim.errors import InputError
from epsim.interrupt import exit_early, run_to_end

MODEL, REQUESTS, RUN, RECORD = "Model (one of two)", "Requests (one of three)", "How it runs", "What is recorded"


def option(help_text: str, panel: str, *names: str, **more: Any) -> Any:
    """Return a typer option in a panel of the help."""
    return typer.Option(*names, help=help_text, rich_help_panel=panel, **more)


def trace(
    context: typer.Context,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Trace file to write.")] = None,
    model: Annotated[str | None, option("Folder or hub name of a checkpoint.", MODEL, metavar="NAME")] = None,
    random_init: Annotated[
        str | None, option("Random weights in the shapes of a card: olmoe, deepseekmoe, ...", MODEL, metavar="CARD")
    ] = None,
    reduced: Annotated[
        bool, option("Random weights: narrow, with all layers, experts and top-k.", MODEL, "--reduced")
    ] = False,
    text_only: Annotated[bool, option("Random weights: no vision encoder.", MODEL, "--text-only")] = False,
    revision: Annotated[str | None, option("Branch, tag or commit on the hub.", MODEL)] = None,
    requests: Annotated[Path | None, option("Prompts, one JSON object per line.", REQUESTS, metavar="FILE")] = None,
    builtin: Annotated[
        str | None,
        option("The default: a set of epsim's: mixed, digits, photos, text or scenes.", REQUESTS, metavar="SET"),
    ] = None,
    mock: Annotated[bool, option("Random tokens. Their routing is more skewed than real.", REQUESTS, "--mock")] = False,
    num_requests: Annotated[int | None, option("How many; default 8, of a file all.", REQUESTS)] = None,
    text_tokens: Annotated[int, option("Of a mock request.", REQUESTS)] = 128,
    images: Annotated[int, option("Of a mock request.", REQUESTS)] = 1,
    max_new_tokens: Annotated[int, option("Output tokens of a request that does not say.", REQUESTS)] = 16,
    batch_size: Annotated[int, option("Requests that run together.", RUN)] = 8,
    chunk_size: Annotated[int | None, option("Run a prefill in pieces of so many tokens.", RUN)] = None,
    dtype: Annotated[str | None, option("bfloat16, float16, float32; default by device.", RUN)] = None,
    device: Annotated[str, option("auto, cpu, cuda, cuda:1.", RUN)] = "auto",
    experts_implementation: Annotated[str | None, option("How transformers runs the experts.", RUN)] = None,
    seed: Annotated[int, option("Of random weights, built-in and mock requests.", RUN)] = 0,
    threads: Annotated[int | None, option("Of torch on the CPU.", RUN)] = None,
    scores: Annotated[
        str,
        option(
            "attention, gaussian, gmm2, gmm4, comma-separated; all; none; auto: attention if the model takes images.",
            RECORD,
            metavar="LIST",
        ),
    ] = "auto",
    statistics: Annotated[
        list[Path] | None, option("Fitted statistics for gaussian, gmm2, gmm4; repeat.", RECORD, metavar="FILE")
    ] = None,
    compress: Annotated[bool, option("Compress the trace with zstd, for shipping.", RECORD, "--compress")] = False,
    note: Annotated[str, option("Free text for the trace, e.g. machine and date.", RECORD)] = "",
    repeat: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Run what a captured trace says of itself once more.")
    ] = None,
) -> None:
    """Run a real model and record where every token goes; or look at, check, make and convert routing traces.

    epsim trace --random-init olmoe --reduced -o t.arrow
    """
    if context.invoked_subcommand is not None:
        _require_nothing_given(context)
        return
    if output is None:
        raise InputError("trace: no file to write; write e.g. epsim trace --random-init olmoe --reduced -o t.arrow")
    from epsim.capture.extra import require_trace_extra

    if repeat is not None:
        _require_nothing_given(context, "output", "repeat")
        require_trace_extra()
        _run_and_say(output, lambda: _repeated(repeat, output))
        return
    from epsim.capture.models.source import ModelSource
    from epsim.capture.options import SCORE_NAMES, CaptureOptions, RequestSource

    if not mock:
        _require_not_given(context, "is of --mock requests", "text_tokens", "images")
    options = CaptureOptions(
        model=ModelSource(
            checkpoint=model,
            revision=revision,
            random_init=random_init,
            reduced=reduced,
            text_only=text_only,
            seed=seed,
            dtype=dtype,
            device=device,
            experts_implementation=experts_implementation,
        ),
        requests=RequestSource(
            path=None if requests is None else str(requests),
            builtin=builtin,
            mock=mock,
            num_requests=num_requests,
            seed=seed,
            text_tokens=text_tokens,
            images=images,
        ),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        chunk_size=chunk_size,
        scores={"auto": None, "all": SCORE_NAMES, "none": ()}.get(scores, tuple(scores.split(","))),
        statistics=tuple(str(path) for path in statistics or ()),
        num_threads=threads,
        compress=compress,
        note=note,
    )
    require_trace_extra()
    _run_and_say(output, lambda: _captured(options, output))


def _captured(options: Any, output: Path) -> Any:
    from epsim.capture.command import capture_trace

    return capture_trace(options, output, count=count_requests, say=_say)


def _repeated(source: Path, output: Path) -> Any:
    from epsim.capture.command import repeat_trace

    if source.resolve() == output.resolve():
        raise InputError(f"{output}: is the trace that is repeated; name another file with -o")
    return repeat_trace(source, output, count=count_requests, say=_say)


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _run_and_say(output: Path, run: Callable[[], Any]) -> None:
    """Say what the trace holds; if something ended the capture early, what, and exit with a code that tells."""
    outcome = run_to_end(run, f"{output} is not written")
    plural = "" if outcome.num_requests == 1 else "s"
    held = f"{outcome.num_requests} request{plural}, {outcome.num_tokens} tokens"
    if outcome.stopped_by is not None:
        exit_early(outcome.stopped_by, f"{output} holds what was done by then: {held}")
    typer.echo(f"wrote {output}: {held}", err=True)


def _require_nothing_given(context: typer.Context, *allowed: str) -> None:
    """Raise InputError if another option than the allowed ones is on the command line."""
    what = f"trace {context.invoked_subcommand}" if context.invoked_subcommand else "--repeat"
    others = (name for name in context.params if name not in allowed)
    _require_not_given(context, f"is of a new capture and not of {what}", *others)


def _require_not_given(context: typer.Context, why: str, *names: str) -> None:
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise InputError(f"--{name.replace('_', '-')}: {why}; leave it out")
