"""One stage of training: `StageRun`, a step at a time, with a state that it can go on from to the bit."""

from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from epsim.capture.model import MoeModel
from epsim.capture.models.device import memory_errors
from epsim.errors import EpsimError
from epsim.scenario.train import StageSpec, TrainSpec
from epsim.specialize.autocast import autocast_experts
from epsim.specialize.log import Window
from epsim.specialize.methods import Method, trained_parameters
from epsim.specialize.observer import GateObserver
from epsim.specialize.source import ExampleSource
from epsim.specialize.tasks import AnswerTask, CellTask, Task

BETAS = (0.9, 0.999)  # SMoES, supplement 1.3


class DivergedError(EpsimError):
    """A loss or gradient that is no number: the run cannot go on from here."""


class StageRun:
    """AdamW on the parts that the stage trains, a cosine schedule with warm-up, gradients clipped (SMoES table S1).

    A context manager: hooks are on the model inside it. A plain loop: it needs nothing of a trainer but the step, and
    the adapters of accelerate or lightning to a loss that hooks on the model put together were longer.
    """

    def __init__(
        self, spec: TrainSpec, index: int, model: MoeModel, source: ExampleSource, method: Method | None
    ) -> None:
        """index: of the stage in `spec.stages`."""
        self.stage: StageSpec = spec.stages[index]
        self.model, self.method = model, method
        self.step = 0
        self.seconds = 0.0
        self.window = Window()
        self._observer = GateObserver(model)
        self.task: Task
        if self.stage.task == "cells":
            self.task = CellTask(model, index, source, spec.seed)
        else:
            self.task = AnswerTask(self.stage, index, model, source, self._observer, method)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.callback(self._leave)
            self._observer.attach()
            if self.method is not None:
                self.method.attach(self.model)
            stack.enter_context(autocast_experts(self.model))
            self._prepare()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _prepare(self) -> None:
        self._trained = self._set_trained()
        stage = self.stage
        self._optimizer = torch.optim.AdamW(
            self._trained,
            lr=stage.learning_rate,
            betas=BETAS,
            weight_decay=stage.weight_decay,
            fused=self.model.device.type == "cuda",
        )
        warmup = round(stage.warmup_frac * stage.steps)
        self._schedule = get_cosine_schedule_with_warmup(self._optimizer, warmup, stage.steps)
        self.model.module.train()

    def _leave(self) -> None:
        self.model.module.eval().requires_grad_(False)
        self._observer.detach()
        if self.method is not None:
            self.method.detach()

    def advance(self) -> None:
        """Make a step.

        Raises DivergedError if its loss is not a number, CapacityError if memory runs out; weights and the method's
        state are then as they were before it.
        """
        before = self._method_state()
        try:
            with memory_errors(self.model.device, f"stages[{self.stage.name}].batch_size"):
                outcome = self.task.run(self.step)
                torch.autograd.backward(outcome.objective)
                norm = nn.utils.clip_grad_norm_(self._trained, self.stage.gradient_clip)
                self._require_finite(outcome.objective.detach(), norm)
                self._optimizer.step()
        except EpsimError:
            if self.method is not None:
                self.method.load_state_dict(before)
            raise
        self._schedule.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.window.add(outcome, norm)
        self.step += 1

    @property
    def learning_rate(self) -> float:
        """Of the step to come."""
        return float(self._optimizer.param_groups[0]["lr"])

    def _method_state(self) -> dict[str, Any]:
        return self.method.state_dict() if self.method else {}

    def state_dict(self) -> dict[str, Any]:
        """Return all that decides on the steps to come, but for the model's own weights."""
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "head": self.task.head.state_dict(),
            "method": self._method_state(),
            "window": self.window.state_dict(),
            "random": torch.get_rng_state(),
        }
        if self.model.device.type == "cuda":
            state["random_cuda"] = torch.cuda.get_rng_state(self.model.device)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from such a state, which may be of another device: then not to the bit."""
        self.step, self.seconds = state["step"], state["seconds"]
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self.task.head.load_state_dict(state["head"])
        if self.method is not None:
            self.method.load_state_dict(state["method"])
        self.window.load_state_dict(state["window"], self.model.device)
        torch.set_rng_state(state["random"].cpu())
        if self.model.device.type == "cuda" and "random_cuda" in state:
            torch.cuda.set_rng_state(state["random_cuda"].cpu(), self.model.device)

    def _set_trained(self) -> list[nn.Parameter]:
        """Turn gradients on for what the stage trains, and return it."""
        inner = self.model.module.model
        parts: dict[str, list[nn.Module]] = {
            "vision": [inner.vision_tower],
            "projector": [inner.multi_modal_projector],
            "language": [inner.language_model, self.model.module.lm_head],
        }
        self.model.module.requires_grad_(False)
        modules = [module for part in self.stage.trains for module in parts[part]]
        trained = [*(p for module in modules for p in module.parameters()), *self.task.head.parameters()]
        trained += trained_parameters(self.method) if self.method else []
        unique = list(dict.fromkeys(trained))
        for parameter in unique:
            parameter.requires_grad_(True)
        return unique

    def _require_finite(self, objective: Tensor, norm: Tensor) -> None:
        if bool(torch.isfinite(objective) & torch.isfinite(norm)):
            return
        what = f"loss is {float(objective)}, norm of the gradients {float(norm)}"
        raise DivergedError(
            f"stage {self.stage.name}, step {self.step + 1}: {what}; write a smaller "
            f"stages[{self.stage.name}].learning_rate or smaller weights in method"
        )
