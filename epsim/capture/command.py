"""The whole of `epsim trace`: from `CaptureOptions` to a trace file, `capture_trace`."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from epsim.atomic import check_outputs, require_writable
from epsim.capture.capture import Advance, CaptureOutcome, capture_batches
from epsim.capture.forward import run_batch
from epsim.capture.model import MoeModel
from epsim.capture.models.device import memory_errors
from epsim.capture.models.load import load_model
from epsim.capture.models.processor import load_processor
from epsim.capture.options import CaptureOptions, statistics_path
from epsim.capture.prompts.batches import ahead, batches
from epsim.capture.provenance import make_meta, options_of_trace, require_same_run
from epsim.capture.scores.estimators import make_fit, make_score
from epsim.capture.scores.gaussian import score_name
from epsim.capture.scores.gaussian_statistics import GaussianStatistics
from epsim.capture.scores.statistics_file import load_statistics, save_statistics
from epsim.capture.workload import Workload, make_workload
from epsim.errors import InputError
from epsim.trace.meta import TraceMeta

CountRequests = Callable[[str, int], AbstractContextManager[Advance]]  # a label and how many: a progress bar


def capture_trace(
    options: CaptureOptions,
    path: Path,
    *,
    count: CountRequests,
    say: Callable[[str], None],
) -> CaptureOutcome:
    """Load the model, run the requests and write their routing to `path`.

    Statistics of Gaussian scores that no file gives are fitted in a first pass over the same prompts, and saved beside
    the trace (`statistics_path`).

    Args:
        count: called with a label and the number of requests at the start of each pass over them.
        say: told in a line what is run, once the model is loaded.
    """
    return _capture(options, path, count, say, lambda meta: None)


def repeat_trace(
    source: Path,
    path: Path,
    *,
    count: CountRequests,
    say: Callable[[str], None],
) -> CaptureOutcome:
    """Run once more what the trace `source` says of itself, to `path`: the same bytes on the same machine.

    Raises InputError if the model or the requests are not the same any more; says it of another device or library.
    """
    options, meta, num_requests = options_of_trace(source)
    if meta.num_requests_asked not in (None, num_requests):
        say(f"{source}: holds {num_requests} of {meta.num_requests_asked} requests; all of them are run")
    return _capture(options, path, count, say, lambda now: require_same_run(source, now, meta, say))


def _capture(
    options: CaptureOptions,
    path: Path,
    count: CountRequests,
    say: Callable[[str], None],
    check: Callable[[TraceMeta], None],
) -> CaptureOutcome:
    require_writable(path)
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    given = _given_statistics(options)
    model = load_model(options.model)
    options = options.for_model(takes_images=model.is_vlm)
    processor = load_processor(model)
    workload = make_workload(options, model, processor)
    meta = make_meta(options, model, processor, workload, mock_statistics=any(each.mock for each in given.values()))
    check(meta)
    missing = [name for name in options.fitted_scores if name not in given]
    _require_images(workload, missing, takes_images=model.is_vlm)
    fitted_files = {name: statistics_path(path, name) for name in missing}
    checkpoint = model.folder.iterdir() if model.folder else ()
    outputs = {"-o": path} | {f"--scores {name}": file for name, file in fitted_files.items()}
    check_outputs(outputs, [*workload.files, *map(Path, options.statistics), *checkpoint])
    say(f"{model.name}: {meta.words}")
    fitted = _fit(options, model, workload, missing, count) if missing else {}
    for name, statistics in fitted.items():
        save_statistics(statistics, fitted_files[name])
        say(f"wrote {fitted_files[name]}")
    scores = [make_score(name, (given | fitted).get(name)) for name in options.scores or ()]
    with count("tracing", workload.num) as advance:
        return capture_batches(
            model,
            ahead(batches(workload.encoded(), options.batch_size)),
            path,
            meta,
            estimators=scores,
            chunk_size=options.chunk_size,
            eos_token_ids=processor.eos_token_ids,
            compression="zstd" if options.compress else None,
            advance=advance,
        )


def _given_statistics(options: CaptureOptions) -> dict[str, GaussianStatistics]:
    """Return the statistics of the files, by the score that they are for."""
    found: dict[str, GaussianStatistics] = {}
    for file in options.statistics:
        statistics = load_statistics(file)
        name = score_name(statistics.num_components)
        if name not in options.fitted_scores or name in found:
            raise InputError(
                f"--statistics {file}: is for the score {name}, which this run "
                f"{'has statistics for already' if name in found else 'does not record'}; leave it out"
            )
        found[name] = statistics
    return found


def _require_images(workload: Workload, to_fit: Sequence[str], *, takes_images: bool) -> None:
    if not to_fit or workload.num_images:
        return
    scores = ",".join(to_fit)
    if not takes_images:
        raise InputError(f"--scores {scores}: tells vision from text, and the model reads text only; leave it out")
    raise InputError(
        f"--scores {scores}: no request has an image to tell vision from text; give images, or --statistics of a run "
        "that had some"
    )


def _fit(
    options: CaptureOptions, model: MoeModel, workload: Workload, names: Sequence[str], count: CountRequests
) -> dict[str, GaussianStatistics]:
    """Return the statistics of the prompts for these scores, from one pass over all prefills."""
    fits = [make_fit(name, seed=options.model.seed) for name in names]
    bar = count("fitting " + ", ".join(names), workload.num)
    with memory_errors(model.device), ExitStack() as stack, bar as advance:
        for fit in fits:
            stack.callback(fit.detach)
            fit.attach(model)
        for batch in ahead(batches(workload.encoded(), options.batch_size)):
            on_device = batch.to(model.device)
            for chunk in run_batch(model, on_device, watchers=fits, chunk_size=options.chunk_size, decode=False):
                advance(0, chunk.num_tokens)
            advance(len(batch.request_ids_B), 0)
        mock = options.requests.mock
        return {name: replace(fit.statistics, mock=mock) for name, fit in zip(names, fits, strict=True)}
