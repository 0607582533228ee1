"""What a training run writes down as it goes: `TrainingLog`, to `log.csv` and `experts.npz`; a `Window` of steps.

Shapes: L MoE layers, M modality (text, vision), E experts, W rows of the log.
"""

import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from epsim.atomic import whole_file, write_errors
from epsim.specialize.tasks import StepOutcome
from epsim.trace.specialization import specialization_index, specialization_score

COLUMNS = (
    "stage", "step", "loss", "objective", "accuracy", "msi", "balance", "mutual_information", "kl", "smar",
    "gradient_norm", "learning_rate", "seconds",
)  # fmt: skip
LOG_FILE, EXPERTS_FILE = "log.csv", "experts.npz"

Row = dict[str, Any]


class Window:
    """Sums over the steps since the last row of the log; stays on the device until the row is written."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._sums: dict[str, Any] = defaultdict(float)
        self._picks_LME: Tensor | None = None

    def add(self, outcome: StepOutcome, gradient_norm: Tensor) -> None:
        """Take in a step."""
        self._num_steps += 1
        values = {"loss": outcome.loss, "objective": outcome.objective, "gradient_norm": gradient_norm}
        values |= {name: term.value for name, term in outcome.terms.items()}
        values["accuracy"] = outcome.is_right_B.float().mean()
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value.detach()
        if outcome.picks_LME is not None:
            self._picks_LME = outcome.picks_LME if self._picks_LME is None else self._picks_LME + outcome.picks_LME

    @property
    def load_MLE(self) -> npt.NDArray[np.int64] | None:
        """How often each modality picked each expert, int64; None where no experts ran."""
        if self._picks_LME is None:
            return None
        return self._picks_LME.permute(1, 0, 2).cpu().numpy().astype(np.int64)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums."""
        return {"num_steps": self._num_steps, "sums": dict(self._sums), "picks": self._picks_LME}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Take up such sums, for steps on `device`."""
        picks_LME = state["picks"]
        self._num_steps, self._picks_LME = state["num_steps"], None if picks_LME is None else picks_LME.to(device)
        self._sums = defaultdict(float, {name: value.to(device) for name, value in state["sums"].items()})

    def means(self) -> Row:
        """Return the mean of each value."""
        return {name: float(value) / self._num_steps for name, value in self._sums.items()}


class TrainingLog:
    """Rows of the run, and the specialisation score of every expert at each of them where both modalities ran."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rows: list[Row] = []
        self._scores: list[tuple[str, int, npt.NDArray[np.float32]]] = []

    def add(self, stage: str, step: int, window: Window, **more: float) -> Row:
        """Write the row of a window, with the MSI over all of its steps (SMoES eq. 19), and return it."""
        row = {"stage": stage, "step": step, **window.means(), **more}
        self._rows.append(row)
        load_MLE = window.load_MLE
        if load_MLE is not None and load_MLE.any(axis=(1, 2)).all():
            row["msi"] = float(specialization_index(load_MLE).mean())
            self._scores.append((stage, step, specialization_score(load_MLE).astype(np.float32)))
        self._write_rows([row], "a")
        return row

    def save_experts(self) -> None:
        """Write `experts.npz`: stage [W], step [W], score [W, L, E], -1 vision to 1 text, NaN if never picked."""
        if not self._scores:
            return
        stages, steps, scores = zip(*self._scores, strict=True)
        path = self._folder / EXPERTS_FILE
        with whole_file(path) as part, write_errors(path), part.open("wb") as file:
            np.savez_compressed(file, stage=np.array(stages), step=np.array(steps), score_WLE=np.stack(scores))

    def state_dict(self) -> dict[str, Any]:
        """Return all rows."""
        scores = [(stage, step, torch.from_numpy(score_LE)) for stage, step, score_LE in self._scores]
        return {"rows": self._rows, "scores": scores}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up such rows, and write the file anew with these alone."""
        self._rows = list(state["rows"])
        self._scores = [(stage, step, score_LE.numpy()) for stage, step, score_LE in state["scores"]]
        self.begin()

    def begin(self) -> None:
        """Write the header and the rows that there are."""
        self._write_rows([dict(zip(COLUMNS, COLUMNS, strict=True)), *self._rows], "w")

    def _write_rows(self, rows: list[Row], mode: str) -> None:
        path = self._folder / LOG_FILE
        with write_errors(path), path.open(mode, newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="")
            writer.writerows({name: _short(value) for name, value in row.items()} for row in rows)


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
