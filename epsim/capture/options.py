"""Everything that decides on a capture, as numbers and words: `CaptureOptions`, with `RequestSource`. Imports no torch.

The options are kept in the trace (`to_mapping`), so that the run can be repeated from it (`from_mapping`).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from epsim.capture.models.source import ModelSource
from epsim.errors import InputError, TraceError

COMPONENTS = {"gaussian": 1, "gmm2": 2, "gmm4": 4}  # Gaussians per modality; fitted in a first pass, or from a file
NUM_REQUESTS = 8  # of a built-in or mock set that does not say
MAX_REQUESTS = 100_000  # of a built-in or mock set
MAX_THREADS = 1024
SCORE_NAMES = ("attention", *COMPONENTS)


@dataclass(frozen=True, kw_only=True)
class RequestSource:
    """Where requests come from: `path`, a JSONL file; `builtin`, a set that ships with epsim; or `mock` tokens.

    None of the three: the built-in set that fits the model.

    Attributes:
        num_requests: of a built-in or mock set, None for 8; of a file, the first so many, None for all.
        seed: of a built-in or mock set.
        text_tokens, images: of each mock request.
    """

    path: str | None = None
    builtin: str | None = None
    mock: bool = False
    num_requests: int | None = None
    seed: int = 0
    text_tokens: int = 128
    images: int = 1

    def __post_init__(self) -> None:
        if (self.path is not None) + (self.builtin is not None) + self.mock > 1:
            raise InputError("--requests, --builtin and --mock: write one of them, or none")
        _require_at_least(1, num_requests=self.num_requests, text_tokens=self.text_tokens)
        if self.path is None and (self.num_requests or 0) > MAX_REQUESTS:
            raise InputError(f"--num-requests {self.num_requests}: must be at most {MAX_REQUESTS}")
        _require_at_least(0, seed=self.seed, images=self.images)


@dataclass(frozen=True, kw_only=True)
class CaptureOptions:
    """A capture: the model, what it is asked, how it is run and what is recorded beside the router.

    Attributes:
        max_new_tokens: output tokens of a request that does not say.
        batch_size: requests that are run together.
        chunk_size: columns of a prefill that are run at once; None for all.
        scores: estimators of the soft modality score, of `SCORE_NAMES`; None for those that cost no pass of their own:
            "attention" for a model that takes images.
        statistics: files with the fitted statistics of estimators; what has none is fitted in a first pass.
        num_threads: of torch on the CPU; sums, and so the last bits, depend on it. None: torch's own choice.
        compress: the trace, with zstd.
        note: free text for the trace.
    """

    model: ModelSource
    requests: RequestSource
    max_new_tokens: int = 16
    batch_size: int = 8
    chunk_size: int | None = None
    scores: tuple[str, ...] | None = None
    statistics: tuple[str, ...] = ()
    num_threads: int | None = None
    compress: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        _require_at_least(1, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)
        _require_at_least(1, chunk_size=self.chunk_size, threads=self.num_threads)
        if self.num_threads is not None and self.num_threads > MAX_THREADS:
            raise InputError(f"--threads {self.num_threads}: must be at most {MAX_THREADS}")
        if not self.note.isprintable():
            raise InputError(f"--note {self.note!r}: must be one line of text without control characters")
        scores = self.scores or ()
        for name in scores:
            if name not in SCORE_NAMES:
                raise InputError(f'--scores: "{name}" is not one; write some of {",".join(SCORE_NAMES)}, or none')
        if len(set(scores)) < len(scores):
            raise InputError(f"--scores {','.join(scores)}: one is there twice; write each once")
        if self.statistics and not set(scores) & set(COMPONENTS):
            raise InputError(
                f"--statistics {self.statistics[0]}: no score of this run needs it; leave it out, or write the score "
                f"that it is for, one of {', '.join(COMPONENTS)}, to --scores"
            )

    def to_mapping(self) -> dict[str, Any]:
        """Return the options as JSON has them."""
        return asdict(self)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Return the options that `to_mapping` gave; raises TraceError if they are not such."""
        try:
            rest = {name: values[name] for name in (each.name for each in fields(cls))}
            rest["model"] = ModelSource(**values["model"])
            rest["requests"] = RequestSource(**values["requests"])
            rest["scores"] = None if values["scores"] is None else tuple(values["scores"])
            rest["statistics"] = tuple(values["statistics"])
            return cls(**rest)
        except (KeyError, TypeError) as error:
            raise TraceError(f"its metadata does not say how it was captured ({error})") from error

    @property
    def fitted_scores(self) -> tuple[str, ...]:
        """The estimators that need statistics."""
        return tuple(name for name in self.scores or () if name in COMPONENTS)

    def for_model(self, *, takes_images: bool) -> Self:
        """Return the options with what was left open settled."""
        requests, scores = self.requests, self.scores
        if requests.path is None and requests.builtin is None and not requests.mock:
            requests = replace(requests, builtin="mixed" if takes_images else "text")
        if scores is None:
            scores = ("attention",) if takes_images else ()
        return replace(self, requests=requests, scores=scores)


def statistics_path(trace_path: Path, score: str) -> Path:
    """Return where statistics that are fitted for a trace are saved: t.gaussian.safetensors beside t.arrow."""
    return trace_path.with_name(f"{trace_path.name.removesuffix('.arrow')}.{score}.safetensors")


def _require_at_least(least: int, **options: int | None) -> None:
    for name, value in options.items():
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be {least} or more")
