"""What `epsim calibrate` does: read and check everything that is named, then fit (`prepare`, `run`)."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from epsim.calibrate.calibration import Calibration, Question, calibrate
from epsim.calibrate.fit import DEFAULT_EFFORT
from epsim.calibrate.holdout import Scheme, hold_out, k_folds
from epsim.calibrate.measured import parse_compare, read_measured
from epsim.calibrate.parameters import ParameterError, default_parameters, load_parameters
from epsim.calibrate.predict import Predictor
from epsim.calibrate.problem import Weights
from epsim.calibrate.profile import fitted_type
from epsim.calibrate.workers import Workers
from epsim.scenario import load_raw

_MOST_PROCESSES = 16


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
    schemes: dict[str, Sequence[Scheme]] = {f"held out {text}": [hold_out(rows, text)] for text in hold_outs}
    if folds is not None:
        schemes[f"{folds} folds"] = k_folds(rows, folds, seed, comparison)
    chosen = None if parameters is None else load_parameters(parameters)
    predictor = Predictor(load_raw(scenario, overrides), rows)
    question = Question(
        parameters=chosen or default_parameters(predictor.device_types),
        compare=comparison,
        hold_outs=schemes,
        weights=Weights(pairs=pair_weight),
        effort=DEFAULT_EFFORT,
        seed=seed,
        profiled=profiled,
    )
    predictor.check([parameter.field for parameter in question.parameters])
    if wants_profile:
        fitted_type(question.parameters)
    words = ["epsim calibrate", measured.name, "--scenario", scenario.name]
    words += [f"--set '{text}'" for text in overrides]
    words += [f"--parameters {parameters.name}"] if parameters else []
    words += [f"--compare {compare}"] if compare else []
    words += [f"--hold-out {text}" for text in hold_outs]
    words += [f"--folds {folds}"] if folds is not None else []
    words += [f"--pair-weight {pair_weight:g}"] if pair_weight != Weights().pairs else []
    words += [f"--seed {seed}"] if seed else []
    words += ["--profile"] if profiled else []
    return Prepared(predictor=predictor, question=question, command=" ".join(words))


def run(prepared: Prepared, num_processes: int | None, advance: Callable[[], None]) -> Calibration:
    """Calibrate on so many processes (default: one for each core)."""
    if num_processes is not None and not 1 <= num_processes <= _MOST_PROCESSES:
        raise ParameterError(
            f"--processes: {num_processes} is not from 1 to {_MOST_PROCESSES}; leave it out for one a core"
        )
    count = num_processes or min(os.cpu_count() or 1, _MOST_PROCESSES)
    with Workers(prepared.predictor, count, advance) as workers:
        return calibrate(prepared.predictor, prepared.question, workers)
