"""What `epsim calibrate` does: read and check everything that is named, then fit (`prepare`, `run`)."""

import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from epsim.calibrate.calibration import Calibration, Question, calibrate
from epsim.calibrate.fit import DEFAULT_EFFORT
from epsim.calibrate.holdout import Scheme, hold_out, k_folds
from epsim.calibrate.measured import Compare, MeasuredRow, parse_compare, read_measured
from epsim.calibrate.parameters import ParameterError, default_parameters, load_parameters
from epsim.calibrate.predict import Predictor
from epsim.calibrate.problem import Weights
from epsim.calibrate.profile import fitted_type
from epsim.calibrate.workers import MOST_PROCESSES, Workers, default_processes
from epsim.scenario import load_raw


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything that a calibration needs, checked; command: how it was asked for, with the names of files alone."""

    predictor: Predictor
    question: Question
    command: str


def prepare(
    measured: Path,
    scenario: Path,
    *,
    overrides: Sequence[str],
    parameters: Path | None,
    compare: str | None,
    folds: int | None,
    hold_outs: Sequence[str],
    pair_weight: float,
    seed: int,
    profiled: bool,
    wants_profile: bool,
) -> Prepared:
    """Read and check the measurements, scenario and parameters; InputError with one line where one is wrong."""
    rows = read_measured(measured)
    comparison = None if compare is None else parse_compare(compare, rows)
    chosen = None if parameters is None else load_parameters(parameters)
    predictor = Predictor(load_raw(scenario, overrides), rows)
    question = Question(
        parameters=chosen or default_parameters(predictor.device_types),
        compare=comparison,
        hold_outs=_schemes(rows, hold_outs, folds, seed, comparison),
        weights=Weights(pairs=pair_weight),
        effort=DEFAULT_EFFORT,
        seed=seed,
        profiled=profiled,
    )
    predictor.check([parameter.field for parameter in question.parameters])
    if wants_profile:
        fitted_type(question.parameters)
    options = [
        ("--scenario", scenario.name),
        *(("--set", text) for text in overrides),
        ("--parameters", None if parameters is None else parameters.name),
        ("--compare", compare),
        *(("--hold-out", text) for text in hold_outs),
        ("--folds", folds),
        ("--pair-weight", None if pair_weight == Weights().pairs else f"{pair_weight:g}"),
        ("--seed", seed or None),
    ]
    command = _command(measured.name, options, ["--refit-intervals"] if profiled else [])
    return Prepared(predictor=predictor, question=question, command=command)


def _schemes(
    rows: Sequence[MeasuredRow], hold_outs: Sequence[str], folds: int | None, seed: int, compare: Compare | None
) -> dict[str, Sequence[Scheme]]:
    schemes: dict[str, Sequence[Scheme]] = {f"held out {text}": [hold_out(rows, text)] for text in hold_outs}
    if folds is not None:
        schemes[f"{folds} folds"] = k_folds(rows, folds, seed, compare)
    return schemes


def _command(measured: str, options: Iterable[tuple[str, object]], flags: Sequence[str]) -> str:
    """Return the command as a shell takes it; options whose value is None are left out."""
    words = ["epsim", "calibrate", measured]
    for option, value in options:
        words += [] if value is None else [option, str(value)]
    return shlex.join([*words, *flags])


def run(prepared: Prepared, num_processes: int | None, advance: Callable[[], None]) -> Calibration:
    """Calibrate on so many processes (default: one for each core)."""
    if num_processes is not None and not 1 <= num_processes <= MOST_PROCESSES:
        raise ParameterError(
            f"--processes: {num_processes} is not from 1 to {MOST_PROCESSES}; leave it out for one a core"
        )
    with Workers(prepared.predictor, num_processes or default_processes(), advance) as workers:
        return calibrate(prepared.predictor, prepared.question, workers)
