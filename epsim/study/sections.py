"""The tables of docs/specialise.md, each a function of a `Summary`; cells are means over seeds ± standard error."""

from collections.abc import Callable, Sequence

from epsim.metrics import TRANSFER_COLUMNS
from epsim.report.table import number
from epsim.study.claims import prompt_error, transfer_cells
from epsim.study.measure import PHASES
from epsim.study.methods import IN_TABLE_S10, METHODS, published_specialisation
from epsim.study.published import table_s10, time_changes
from epsim.study.summary import Run, Summary, msi, ratio, time, written
from epsim.study.times import BASELINE, BATCH_SIZES, SETTINGS
from epsim.trace.published import BENCHMARKS
from epsim.validate.markdown import table

_SHORT = dict(zip(TRANSFER_COLUMNS, ("P_V", "P_T", "P_V+T", "D_T"), strict=True))
_WAYS = {"without_dedup": "pairs", "with_dedup": "tokens"}
METRICS = {"ttft_s": "TTFT", "tpot_s": "TPOT"}


def specialisation_table(summary: Summary) -> str:
    """Return MSI and MRD distance, and the paper's MSI."""
    paper = published_specialisation()
    rows = [
        (
            f"`{method}`",
            METHODS[method],
            written(summary.over_seeds(method, msi), 3),
            number(paper[method].msi, 3),
            paper[method].tables,
            written(summary.over_seeds(method, _idle), 1, 100),
            written(summary.over_seeds(method, _mrd), 2),
        )
        for method in summary.methods
    ]
    return table(("file", "method", "MSI", "paper: MSI", "SMoES, OLMoE", "idle experts, %", "MRD distance, nats"), rows)


def _idle(run: Run) -> float | None:
    found: float | None = run["idle_experts_frac"]
    return found


def _mrd(run: Run) -> float | None:
    found: float | None = run["mrd_distance_smoothed_nats"]
    return found


def accuracy_table(summary: Summary) -> str:
    """Return accuracies, percent, and the paper's changes."""
    paper = published_specialisation()
    rows = []
    for method in summary.methods:
        row, cells = paper[method], []
        for kind in ("image", "text"):
            cells += [
                written(summary.over_seeds(method, accuracy_of(kind)), 1, 100),
                number(_percent(prompt_error(summary, method, kind)), 1),
            ]
        changes = (_signed(row.multimodal_percent), _signed(row.language_percent))
        rows.append((f"`{method}`", *cells, *changes, row.tables))
    heads = [head for kind in ("with an image", "text alone") for head in (f"{kind}, %", "of prompts")]
    return table(("file", *heads, "paper: multimodal", "language", "SMoES, OLMoE"), rows)


def accuracy_of(kind: str) -> Callable[[Run], float | None]:
    """Return what reads the accuracy, a fraction, of prompts with an "image" or of "text"."""

    def read(run: Run) -> float | None:
        found: float | None = run["accuracy"][kind]["accuracy"]
        return found

    return read


def transfer_table(summary: Summary) -> str:
    """Return the ratios of table S10, percent: soft routing contiguous, then every method with modality bins."""
    cases = [(summary.baseline, "contiguous")] if summary.baseline in summary.methods else []
    cases += [(method, "modality_bins") for method in summary.methods]
    rows = [
        (
            f"`{method}`",
            placement,
            *(written(summary.over_seeds(method, ratio(placement, *cell)), 1, 100) for cell in transfer_cells()),
        )
        for method, placement in cases
    ]
    return table(("file", "placement", *_cell_names()), rows)


def transfer_paper_table() -> str:
    """Return the paper's ratios, percent, lowest to highest of its benchmarks."""
    rows = []
    for method, name in IN_TABLE_S10.items():
        found = [table_s10(benchmark, name) for benchmark in BENCHMARKS]
        cells = [[100 * own[cell] for own in found] for cell in transfer_cells()]
        rows.append((f"`{method}`", f'"{name}"', *(f"{min(values):.1f} to {max(values):.1f}" for values in cells)))
    return table(("file", "table S10", *_cell_names()), rows)


def _cell_names() -> list[str]:
    return [f"{_SHORT[column]}, {_WAYS[way]}" for way, column in transfer_cells()]


def load_table(summary: Summary) -> str:
    """Return shares of the devices and evenness by phase, modality bins."""
    rows = []
    for method in summary.methods:
        cells = (cell for phase in PHASES for cell in _load_cells(summary, method, phase))
        rows.append((f"`{method}`", *cells))
    heads = [f"{phase}: {what}" for phase in PHASES for what in ("vision, %", "text, %", "even")]
    return table(("file", *heads), rows)


def _load_cells(summary: Summary, method: str, phase: str) -> list[str]:
    shares = (summary.over_seeds(method, _share(phase, home)) for home in ("prefill_devices", "decode_devices"))
    return [*(written(share, 1, 100) for share in shares), written(summary.over_seeds(method, _evenness(phase)), 2)]


def _share(phase: str, home: str) -> Callable[[Run], float | None]:
    """Return what reads the share of the devices on which a phase lives: prefill with the vision experts."""

    def read(run: Run) -> float | None:
        placed = run["placements"]["modality_bins"]
        share_R = placed["device_share"][phase]
        return None if share_R is None else float(sum(share_R[device] for device in placed[home]))

    return read


def _evenness(phase: str) -> Callable[[Run], float | None]:
    def read(run: Run) -> float | None:
        found: float | None = run["placements"]["modality_bins"]["device_balancedness"][phase]
        return found

    return read


def times_table(summary: Summary) -> str:
    """Return the baseline's seconds, and the changes against it, percent."""
    rows: list[Sequence[str]] = []
    if summary.baseline in summary.methods:
        base = [
            written(summary.over_seeds(summary.baseline, time(BASELINE, size, metric)), 3) + " s"
            for metric in METRICS
            for size in BATCH_SIZES
        ]
        rows.append((f"`{summary.baseline}`", BASELINE, *base))
    cases = [(method, setting) for method in summary.methods for setting in SETTINGS if setting != BASELINE]
    rows += [(f"`{method}`", setting, *_time_changes(summary, method, setting)) for method, setting in cases]
    return table(("file", "setting", *_time_names()), rows)


def _time_changes(summary: Summary, method: str, setting: str) -> list[str]:
    cells = [(size, metric) for metric in METRICS for size in BATCH_SIZES]
    changes = (summary.against_baseline(method, time(setting, *cell), time(BASELINE, *cell)) for cell in cells)
    return [written(change, 1, 100, "+") for change in changes]


def times_paper_table() -> str:
    """Return the changes of table S11, percent, in the same columns."""
    cells = [time_changes(size, metric) for metric in METRICS for size in BATCH_SIZES]
    rows = [(benchmark, *(f"{100 * own[benchmark]:+.1f}" for own in cells)) for benchmark in cells[0]]
    return table(("SMoES table S11", *_time_names()), rows)


def _time_names() -> list[str]:
    return [f"{name}, batch {size}" for name in METRICS.values() for size in BATCH_SIZES]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _signed(percent: float | None) -> str:
    return "-" if percent is None else f"{percent:+.1f} %"


COLUMNS = ("method", "MSI", "image, %", "text, %", "remote pairs, %: P_V", "P_T", "D_T", "TTFT, batch 32, %", "TPOT, %")


def table_rows(summary: Summary) -> list[Sequence[str]]:
    """Return the rows of `COLUMNS`, for the screen: modality bins; times async, changes against the baseline."""
    rows: list[Sequence[str]] = []
    largest = BATCH_SIZES[-1]
    for method in summary.methods:
        ratios = [ratio("modality_bins", "without_dedup", name) for name in TRANSFER_COLUMNS if name != "prefill_all"]
        changes = [
            summary.against_baseline(method, time("bins, async", largest, metric), time(BASELINE, largest, metric))
            for metric in METRICS
        ]
        rows.append(
            (
                method,
                written(summary.over_seeds(method, msi), 3),
                *(written(summary.over_seeds(method, accuracy_of(kind)), 1, 100) for kind in ("image", "text")),
                *(written(summary.over_seeds(method, read), 1, 100) for read in ratios),
                *(written(change, 1, 100, "+") for change in changes),
            )
        )
    return rows
