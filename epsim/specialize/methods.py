"""What specialises experts in training: `Method`, made by `make_method`; what a step adds to its loss, `Term`.

A new method is a class here with a `kind` of `epsim.scenario.train`, and a line in `METHODS`.

Shapes: L MoE layers, B samples, S columns, E experts, N bins, C experts of a bin, M modality (text, vision).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from epsim.capture.forward import Watcher
from epsim.capture.modality_gate import ModalityGate
from epsim.capture.model import MoeModel
from epsim.scenario.train import MethodSpec, PartitionSpec, SmarSpec, SmoesSpec, SoftSpec
from epsim.specialize.balance import bin_load_balance, load_balance
from epsim.specialize.bins import ExpertBins, is_of_modality
from epsim.specialize.information import inter_bin_divergence, inter_bin_information
from epsim.specialize.routed import RoutedPass
from epsim.specialize.scores import TrainingScore, make_training_score
from epsim.specialize.smar import modality_routing_distance, smar_loss

State = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Term:
    """A loss, unweighted, and its weight in the objective (SMoES eq. 17, SMAR eq. 14)."""

    weight: float
    value: Tensor


class Method(Protocol):
    """Attached to a model while a stage specialises it; `terms` after each forward pass."""

    gate: ModalityGate | None
    """Makes routers know modalities; stays with the trained model."""

    @property
    def watchers(self) -> tuple[Watcher, ...]:
        """What wants to know of a pass before it runs."""

    def attach(self, model: MoeModel) -> None:
        """Put hooks on the model."""

    def detach(self) -> None:
        """Take them away."""

    def terms(self, routed: RoutedPass) -> Mapping[str, Term]:
        """Return what is added to the loss for the pass that just ran, by name; takes the pass into its state."""

    def state_dict(self) -> State:
        """Return what must be kept for training to go on as if it had not stopped."""

    def load_state_dict(self, state: State) -> None:
        """Take up such a state; after `attach`."""


class _Hooked:
    """A method that has one thing with hooks on the model, or none: a gate, or a score."""

    gate: ModalityGate | None = None

    def __init__(self, hooks: ModalityGate | TrainingScore | None) -> None:
        self._hooks = hooks

    @property
    def watchers(self) -> tuple[Watcher, ...]:
        return () if self._hooks is None else (self._hooks,)

    def attach(self, model: MoeModel) -> None:
        if self._hooks is not None:
            self._hooks.attach(model)

    def detach(self) -> None:
        if self._hooks is not None:
            self._hooks.detach()

    def state_dict(self) -> State:
        return {} if self._hooks is None else self._hooks.state_dict()

    def load_state_dict(self, state: State) -> None:
        if self._hooks is not None:
            self._hooks.load_state_dict(state)


class Soft(_Hooked):
    """Soft routing with load balance over all experts (SMoES eq. 1), the papers' baseline."""

    def __init__(
        self, spec: SoftSpec | PartitionSpec | SmarSpec, model: MoeModel, seed: int, gate: ModalityGate | None = None
    ) -> None:
        super().__init__(gate)
        self.gate, self._balance_weight = gate, spec.balance_weight

    def terms(self, routed: RoutedPass) -> Mapping[str, Term]:
        return {"balance": Term(weight=self._balance_weight, value=load_balance(routed))}


class Partition(Soft):
    """Hard routing, and MoIIE's hybrid: experts of one modality, and some of both; load balance as for soft routing."""

    def __init__(self, spec: PartitionSpec, model: MoeModel, seed: int) -> None:
        shape, counts = model.shape, (spec.text_experts, spec.vision_experts, spec.shared_experts)
        allowed_ME = ModalityGate.partition(shape.num_experts, *counts, topk=shape.topk)
        super().__init__(spec, model, seed, ModalityGate(shape.num_layers, shape.num_experts, allowed_ME=allowed_ME))


class Smar(Soft):
    """SMAR: a trainable bias of each modality (eq. 1-3), and its routing distance held in a band (eq. 4-14)."""

    def __init__(self, spec: SmarSpec, model: MoeModel, seed: int) -> None:
        shape, self._smar = model.shape, spec
        gate = ModalityGate(shape.num_layers, shape.num_experts, bias=True) if spec.modality_bias else None
        super().__init__(spec, model, seed, gate)

    def terms(self, routed: RoutedPass) -> Mapping[str, Term]:
        distance_L = modality_routing_distance(routed)
        value = smar_loss(distance_L, self._smar.min_distance, self._smar.max_distance)
        return {**super().terms(routed), "smar": Term(weight=self._smar.weight, value=value)}


class Smoes(_Hooked):
    """SMoES: bins of experts, load balance within them, and mutual information, or KL, between bin and modality.

    A sample without an image, or without text, says nothing of the information between both: it is left out of that
    loss, and counts in bins and balance.
    """

    def __init__(self, spec: SmoesSpec, model: MoeModel, seed: int) -> None:
        shape = model.shape
        self._spec = spec
        self.bins = ExpertBins(
            shape.num_layers,
            shape.num_experts,
            spec.num_bins,
            decay=spec.decay,
            adaptive=spec.binning == "adaptive",
            device=model.device,
        )
        self.score: TrainingScore | None = None
        if spec.objective != "none":
            self.score = make_training_score(spec.score, beta=spec.decay, tau_factor=spec.temperature, seed=seed)
        super().__init__(self.score)

    def terms(self, routed: RoutedPass) -> Mapping[str, Term]:
        self.bins.update(routed)
        experts_LNC = self.bins.experts_LNC
        terms = {"balance": Term(weight=self._spec.balance_weight, value=bin_load_balance(routed, experts_LNC))}
        if self.score is not None:
            name = self._spec.objective
            between = OBJECTIVES[name](routed, experts_LNC, self.score.scores_LBS(), has_both(routed))
            terms[name] = Term(weight=self._spec.weight, value=between)
        return terms

    def state_dict(self) -> State:
        return {"bins": self.bins.state_dict(), "score": super().state_dict()}

    def load_state_dict(self, state: State) -> None:
        self.bins.load_state_dict(state["bins"])
        super().load_state_dict(state["score"])


OBJECTIVES: dict[str, Callable[[RoutedPass, Tensor, Tensor, Tensor], Tensor]] = {
    "mutual_information": inter_bin_information,
    "kl": inter_bin_divergence,
}
METHODS: dict[str, Callable[..., Method]] = {"soft": Soft, "smoes": Smoes, "smar": Smar, "partition": Partition}


def make_method(spec: MethodSpec, model: MoeModel, seed: int) -> Method:
    """Return the method of a training run; raises InputError if it does not fit the model's experts."""
    return METHODS[spec.kind](spec, model, seed)


def has_both(routed: RoutedPass) -> Tensor:
    """Return which samples have tokens of both modalities, bool [B]."""
    return is_of_modality(routed).any(dim=2).all(dim=0)


def trained_parameters(method: Method) -> list[nn.Parameter]:
    """Return the method's own parameters that training moves: SMAR's biases."""
    return [] if method.gate is None else list(method.gate.parameters())
