"""Routers that know the modality of a token: `ModalityGate`, a bias for each modality and experts that it must not use.

The bias is SMAR's (eq. 1-3): logits = x W^T + b_m for a token of modality m. The mask makes hard routing, and with
experts that both modalities share the hybrid of MoIIE. Every router runs as it is, on two more input channels: the
one-hot modality, whose weights are the bias, and `MASKED_LOGIT` where an expert is masked.

Shapes: L MoE layers, M = 2 modalities (0 text, 1 vision), E experts, N = B S rows of a pass (B requests of S columns),
D hidden size, K top-k.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.func import functional_call

from epsim.atomic import whole_file, write_errors
from epsim.capture.model import ForwardPass, MoeModel
from epsim.errors import InputError

FILE_NAME = "modality_gate.safetensors"
METADATA_KEY = "epsim_modality_gate"
FORMAT_VERSION = 1
MODALITIES = ("text", "vision")
MASKED_LOGIT = -3e4  # a float16 holds it, and its exponential beside any real logit's is 0
CORRECTION_BIAS = "e_score_correction_bias"

Routed = tuple[Tensor, Tensor, Tensor]  # logits [N, E], gate weights [N, K], picks [N, K]


class ModalityGate(nn.Module):
    """A bias on the router logits for each modality, experts that each may use, or both; a `Watcher` of passes.

    The weights, the keys of `state_dict` and the hooks of an attached model stay as they were; only the forward of its
    routers is replaced, so that what hooks see of their logits and picks is after bias and mask. Experts get the plain
    hidden vectors. The bias is rounded to the type of the router's weights. Padding is routed as text.

    Attributes:
        bias_LME: float32 parameter, zeros at first; None without bias. It has no effect on a masked expert.
        allowed_ME: bool, the experts that a modality may use, the same in every layer; None without mask. A masked
            expert is never picked, and its gating score (softmax or sigmoid of the logits) is exactly 0.
    """

    bias_LME: nn.Parameter | None
    allowed_ME: Tensor | None

    def __init__(
        self, num_layers: int, num_experts: int, *, bias: bool = False, allowed_ME: Tensor | None = None
    ) -> None:
        """Make a gate that is attached to no model; raises ValueError for a mask that is not bool [M, num_experts]."""
        super().__init__()
        size_ME = (len(MODALITIES), num_experts)
        if allowed_ME is not None and (tuple(allowed_ME.shape) != size_ME or allowed_ME.dtype != torch.bool):
            raise ValueError(f"allowed_ME is {allowed_ME.dtype} {tuple(allowed_ME.shape)} and must be bool {size_ME}")
        self.num_layers = num_layers
        self.num_experts = num_experts
        self.bias_LME = nn.Parameter(torch.zeros(num_layers, *size_ME)) if bias else None
        self.register_buffer("allowed_ME", allowed_ME)
        self._where = "modality gate"
        self._model: MoeModel | None = None
        self.start_batch()

    @staticmethod
    def partition(
        num_experts: int, text_experts: int, vision_experts: int, shared_experts: int = 0, *, topk: int
    ) -> Tensor:
        """Return allowed_ME: the first experts are text's, the next vision's, the rest of both.

        Raises InputError if the three do not add up to `num_experts`, or leave a modality fewer than `topk`.
        """
        counts = {"text_experts": text_experts, "vision_experts": vision_experts, "shared_experts": shared_experts}
        words = " + ".join(f"{name} {count}" for name, count in counts.items())
        if negative := [name for name, count in counts.items() if count < 0]:
            raise InputError(f"{negative[0]}: {counts[negative[0]]} is not a number of experts; write 0 or more")
        if (total := sum(counts.values())) != num_experts:
            raise InputError(f"{words} = {total} must be the {num_experts} experts of the model; change one of them")
        for name in ("text_experts", "vision_experts"):
            if counts[name] + shared_experts < topk:
                raise InputError(
                    f"{name}: {counts[name]} and {shared_experts} shared experts are fewer than the {topk} that a "
                    f"token is sent to; write at least {topk - shared_experts}"
                )
        expert_E = torch.arange(num_experts)
        is_shared_E = expert_E >= text_experts + vision_experts
        return torch.stack([(expert_E < text_experts) | is_shared_E, expert_E >= text_experts])

    def attach(self, model: MoeModel) -> None:
        """Move to the model's device and route in all of its MoE layers.

        Raises InputError if the layers, experts or top-k of `model` do not fit, or if it or this has been attached.
        """
        self._check(model)
        self.to(model.device)
        for index, router in enumerate(_routers(model)):
            before = vars(router).get("forward")
            router.forward = _GatedForward(self, index, router, _wider(router, model), before)
        self._model = model
        self.start_batch()

    def detach(self) -> None:
        """Give the model its own routers back; without an attached model nothing happens."""
        if self._model is not None:
            for router in _routers(self._model):
                before = router.forward.before
                del router.forward
                if before is not None:
                    router.forward = before
        self._model = None
        self.start_batch()

    def start_batch(self) -> None:
        """Forget the tokens of the last pass."""
        self._modality_NM: Tensor | None = None
        self._allowed_NE: Tensor | None = None

    def start_pass(self, forward_pass: ForwardPass) -> None:
        """Get to know the modalities of the pass that runs next."""
        is_vision_N = ~forward_pass.is_text_BS.flatten()
        self._modality_NM = torch.stack([~is_vision_N, is_vision_N], 1)
        self._allowed_NE = None if self.allowed_ME is None else self.allowed_ME[is_vision_N.long()]

    def save(self, folder: Path) -> None:
        """Write `FILE_NAME` into the folder of a checkpoint, whole or not at all; OutputError if that cannot be."""
        about = {"format_version": FORMAT_VERSION, "num_layers": self.num_layers, "num_experts": self.num_experts}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        path = folder / FILE_NAME
        with whole_file(path) as part, write_errors(path):
            part.write_bytes(save(tensors, metadata={METADATA_KEY: json.dumps(about)}))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Return the gate that `save` wrote into `folder`, on the CPU; raises InputError if it is none or damaged."""
        path = folder / FILE_NAME
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (OSError, SafetensorError) as error:
            reason = "there is no such file" if isinstance(error, FileNotFoundError) else str(error).splitlines()[0]
            raise InputError(f"{path}: cannot be read: {reason}; write the gate again") from error
        try:
            about = json.loads(metadata[METADATA_KEY])
            if about["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format version {about['format_version']!r} is not {FORMAT_VERSION}")
            gate = cls._of_tensors(about, tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{path}: is not a modality gate, or damaged ({reason}); write it again") from error
        gate._where = str(path)
        return gate

    @classmethod
    def _of_tensors(cls, about: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        if not tensors:
            raise ValueError("neither bias nor mask")
        bias_LME = tensors.get("bias_LME")
        gate = cls(
            int(about["num_layers"]),
            int(about["num_experts"]),
            bias=bias_LME is not None,
            allowed_ME=tensors.get("allowed_ME"),
        )
        if bias_LME is not None and not bias_LME.isfinite().all():
            raise ValueError("bias_LME holds values that are not finite")
        gate.load_state_dict(tensors)
        return gate

    def _check(self, model: MoeModel) -> None:
        if self._model is not None:
            raise InputError(f"{self._where}: is attached to {self._model.name}; detach it first")
        if any(isinstance(vars(router).get("forward"), _GatedForward) for router in _routers(model)):
            raise InputError(f"{self._where}: the routers of {model.name} have a gate already; detach that first")
        shape = model.shape
        if (self.num_layers, self.num_experts) != (shape.num_layers, shape.num_experts):
            raise InputError(
                f"{self._where}: is for {self.num_layers} MoE layers of {self.num_experts} experts, and {model.name} "
                f"has {shape.num_layers} of {shape.num_experts}; name a gate of this model"
            )
        if self.allowed_ME is None:
            return
        for name, count in zip(MODALITIES, self.allowed_ME.sum(1).tolist(), strict=True):
            if count < shape.topk:
                raise InputError(
                    f"{self._where}: lets {name} use {count} experts, and {model.name} sends a token to {shape.topk}; "
                    f"allow at least {shape.topk}"
                )
        if (num_groups := getattr(_routers(model)[0], "num_group", None) or 1) > 1:
            raise InputError(f"{self._where}: masks experts, and {model.name} picks within {num_groups} groups of them")

    def _route(self, index: int, router: nn.Module, wider: nn.Module, hidden_ND: Tensor) -> Routed:
        modality_NM = self._modality_NM
        if modality_NM is None or len(modality_NM) != len(hidden_ND):
            told = "nothing" if modality_NM is None else f"{len(modality_NM)} rows"
            raise RuntimeError(f"modality gate: start_pass told of {told}, and a pass of {len(hidden_ND)} runs")
        wide_NH = torch.cat([hidden_ND, modality_NM.to(hidden_ND.dtype)], 1)
        logits_NE, weights_NK, picks_NK = functional_call(wider, self._tensors(index, router), (wide_NH,), strict=True)
        if self._allowed_NE is not None and not hasattr(router, CORRECTION_BIAS):
            picks_NK = _without_masked(picks_NK, logits_NE.detach(), self._allowed_NE)
        return logits_NE, weights_NK, picks_NK

    def _tensors(self, index: int, router: nn.Module) -> dict[str, Tensor]:
        """Return the router's weights with two more columns and, for a masked sigmoid, its correction per token.

        A sigmoid's scores of masked experts are 0 and not below those of others, to which the correction is added.
        """
        tensors = dict(router.named_parameters()) | dict(router.named_buffers())
        weight_ED = tensors["weight"]
        bias_ME = weight_ED.new_zeros(len(MODALITIES), self.num_experts)
        if self.bias_LME is not None:
            bias_ME = self.bias_LME[index].to(weight_ED.dtype)
        if self.allowed_ME is not None:
            bias_ME = bias_ME.masked_fill(~self.allowed_ME, MASKED_LOGIT)
        tensors["weight"] = torch.cat([weight_ED, bias_ME.T], 1)
        if CORRECTION_BIAS in tensors and self._allowed_NE is not None:
            tensors[CORRECTION_BIAS] = torch.where(self._allowed_NE, tensors[CORRECTION_BIAS], -torch.inf)
        return tensors


@dataclass(frozen=True, eq=False)
class _GatedForward:
    """What stands in for the forward of a router while a gate is attached.

    Attributes:
        index: of the router among the MoE layers.
        wider: a router of the same class for two more input channels, without weights of its own.
        before: the forward that the instance had of its own, as libraries that place weights give it one; or None.
    """

    gate: ModalityGate
    index: int
    router: nn.Module
    wider: nn.Module
    before: Callable[..., Any] | None

    def __call__(self, hidden_states: Tensor) -> Routed:
        hidden_ND = hidden_states.reshape(-1, hidden_states.shape[-1])
        return self.gate._route(self.index, self.router, self.wider, hidden_ND)


def _routers(model: MoeModel) -> list[Any]:
    return [model.layers[layer_id].mlp.gate for layer_id in model.layer_ids]


def _wider(router: nn.Module, model: MoeModel) -> nn.Module:
    """Return the router's like for two more input channels; its weights are given with each call."""
    with torch.device("meta"):
        wider: Any = type(router)(model.decoder.config)
    wider.hidden_dim += len(MODALITIES)
    module: nn.Module = wider
    return module


def _without_masked(picks_NK: Tensor, logits_NE: Tensor, allowed_NE: Tensor) -> Tensor:
    """Return the picks with allowed experts, of the largest logits that are left, in place of masked ones.

    A softmax gives experts more than 104 below the largest logit exactly 0, as it does masked ones; top-k cannot tell
    them apart. The gate weights of both are 0, so that these stay as they are.
    """
    is_masked_NK = ~allowed_NE.gather(1, picks_NK)
    left_NE = logits_NE.masked_fill(~allowed_NE, -torch.inf).scatter(1, picks_NK, -torch.inf)
    spare_NK = left_NE.topk(picks_NK.shape[1], dim=1).indices
    place_NK = (is_masked_NK.cumsum(1) - 1).clamp(min=0)
    return torch.where(is_masked_NK, spare_NK.gather(1, place_NK), picks_NK)
