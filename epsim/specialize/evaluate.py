"""How many held-out prompts a model answers right: `accuracy`, with its standard error."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from epsim.capture.forward import Watcher
from epsim.capture.model import MoeModel
from epsim.specialize.examples import ExampleBatch
from epsim.specialize.forward import run_examples


@torch.no_grad()
def accuracy(model: MoeModel, batches: Iterable[ExampleBatch], watchers: Sequence[Watcher] = ()) -> dict[str, Any]:
    """Return the share of answers that greedy decoding gives exactly.

    accuracy: a share; standard_error: sqrt(p (1 - p) / n), of a share of n prompts; num_prompts. None without any.
    """
    right = [run_examples(model, batch.to(model.device), watchers).is_right_B().cpu() for batch in batches]
    num = sum(len(is_right_B) for is_right_B in right)
    if not num:
        return {"accuracy": None, "standard_error": None, "num_prompts": 0}
    share = float(torch.cat(right).double().mean())
    return {"accuracy": share, "standard_error": (share * (1 - share) / num) ** 0.5, "num_prompts": num}
