"""Routers that know the modality of a token: picks, masks, gradients, captures, and the file beside a checkpoint.

Shapes: L MoE layers, M modalities (0 text, 1 vision), E experts, N rows, D hidden size, K top-k.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference.small_models import BACKBONE_NAMES, small_batch, small_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from epsim.capture.capture import capture_batches
from epsim.capture.forward import run_batch
from epsim.capture.modality_gate import FILE_NAME, MASKED_LOGIT, ModalityGate
from epsim.capture.model import ForwardPass, MoeModel
from epsim.capture.models.device import quiet
from epsim.capture.models.load import load_model
from epsim.capture.models.source import ModelSource
from epsim.capture.prompts.batches import Batch
from epsim.errors import InputError
from epsim.trace import Modality, Phase, RoutingTrace, TraceMeta
from epsim.trace.file import TraceFile

NUM_EXPERTS = 16
TEXT, VISION = slice(0, 5), slice(5, 10)  # experts 10 to 15 are shared


def partition(model: MoeModel, shared: int = 6) -> torch.Tensor:
    own = (NUM_EXPERTS - shared) // 2
    return ModalityGate.partition(NUM_EXPERTS, own, own, shared, topk=model.shape.topk)


def gate_of(
    model: MoeModel, *, bias_std: float | None = None, allowed_ME: torch.Tensor | None = None, seed: int = 1
) -> ModalityGate:
    """Return a gate that is attached to `model`, with a drawn bias."""
    gate = ModalityGate(model.shape.num_layers, NUM_EXPERTS, bias=bias_std is not None, allowed_ME=allowed_ME)
    if gate.bias_LME is not None:
        drawn = torch.randn(gate.bias_LME.shape, generator=torch.Generator().manual_seed(seed)) * bias_std
        with torch.no_grad():
            gate.bias_LME.copy_(drawn)
    gate.attach(model)
    return gate


def pass_of(is_text_BS: torch.Tensor) -> ForwardPass:
    is_token_BS = torch.ones_like(is_text_BS)
    return ForwardPass(
        phase=Phase.PREFILL, step=0, is_text_BS=is_text_BS, is_token_BS=is_token_BS, is_key_BP=is_token_BS
    )


def routers(model: MoeModel) -> list[Any]:
    return [model.layers[layer_id].mlp.gate for layer_id in model.layer_ids]


def drawn_rows(model: MoeModel, num: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden vectors [1, N, D] and is_text [1, N]."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(1, num, model.hidden_size, generator=generator) * scale
    is_text = torch.rand(1, num, generator=generator) < 0.5
    return hidden.to(model.device, model.dtype), is_text.to(model.device)


def routed_by_hand(backbone: str, router: Any, hidden_ND: np.ndarray, bias_NE: np.ndarray, topk: int) -> list[Any]:
    """Return logits x W^T + b, picks and gate weights in float64.

    OLMoE, DeepSeekMoE: softmax; Qwen3-MoE, Mixtral: normalised in the top-k; Moonlight: sigmoid, picked with the
    correction added, weighted without, normalised, times 2.446.
    """
    logits = hidden_ND @ router.weight.detach().double().cpu().numpy().T + bias_NE
    if backbone == "moonlight":
        scores = 1 / (1 + np.exp(-logits))
        choice = scores + router.e_score_correction_bias.double().cpu().numpy()
    else:
        scores = np.exp(logits - logits.max(1, keepdims=True))
        scores /= scores.sum(1, keepdims=True)
        choice = scores
    picks = np.argsort(-choice, axis=1)[:, :topk]
    weights = np.take_along_axis(scores, picks, 1)
    if backbone in ("qwen3-moe", "mixtral", "moonlight"):
        weights /= weights.sum(1, keepdims=True)
    return [logits, picks, weights * (2.446 if backbone == "moonlight" else 1.0)]


def in_order(picks: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(picks, axis=1)
    return np.take_along_axis(picks, order, 1), np.take_along_axis(weights, order, 1)


# Routers


@pytest.mark.parametrize("backbone", BACKBONE_NAMES)
def test_a_bias_is_added_to_the_logits_of_its_modality(backbone: str) -> None:
    model = small_model(backbone, vlm=False, num_experts=NUM_EXPERTS)
    gate = gate_of(model, bias_std=1.0)
    hidden, is_text = drawn_rows(model, 400, 1.0)
    gate.start_pass(pass_of(is_text))
    assert gate.bias_LME is not None
    for index, router in enumerate(routers(model)):
        with torch.no_grad():
            logits, weights, picks = (each.double().cpu().numpy() for each in router(hidden))
        bias_NE = gate.bias_LME[index].detach().double().cpu().numpy()[(~is_text[0]).long().cpu().numpy()]
        rows = hidden[0].double().cpu().numpy()
        wanted = routed_by_hand(backbone, router, rows, bias_NE, model.shape.topk)
        np.testing.assert_allclose(logits, wanted[0], rtol=1e-4, atol=1e-4)
        found_picks, found_weights = in_order(picks.astype(int), weights)
        wanted_picks, wanted_weights = in_order(wanted[1], wanted[2])
        np.testing.assert_array_equal(found_picks, wanted_picks)
        np.testing.assert_allclose(found_weights, wanted_weights, rtol=1e-3, atol=1e-6)
        unbiased = routed_by_hand(backbone, router, rows, 0 * bias_NE, model.shape.topk)
        assert (np.sort(unbiased[1], 1) != wanted_picks).any()


@pytest.mark.parametrize("scale", [1.0, 100.0], ids=["usual", "softmax-underflows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("backbone", BACKBONE_NAMES)
def test_masked_experts_are_never_picked(backbone: str, dtype: torch.dtype, scale: float) -> None:
    """Experts for each modality are as few as top-k, so that every one of them must be picked."""
    model = small_model(backbone, vlm=False, num_experts=NUM_EXPERTS, dtype=dtype)
    topk = model.shape.topk
    allowed_ME = ModalityGate.partition(NUM_EXPERTS, topk, NUM_EXPERTS - topk, topk=topk)
    gate = gate_of(model, bias_std=5.0, allowed_ME=allowed_ME)
    hidden, is_text = drawn_rows(model, 10_000, scale)
    gate.start_pass(pass_of(is_text))
    allowed_NE = allowed_ME.to(model.device)[(~is_text[0]).long()]
    for router in routers(model):
        with torch.no_grad():
            logits, weights, picks = router(hidden)
        assert allowed_NE.gather(1, picks).all()
        assert weights.isfinite().all()
        scores = logits.float().sigmoid() if backbone == "moonlight" else logits.float().softmax(1)
        assert scores[~allowed_NE].eq(0).all()
        sorted_picks = picks.sort(1).values
        assert (sorted_picks[:, 1:] > sorted_picks[:, :-1]).all()
        assert sorted_picks[is_text[0]].eq(torch.arange(topk, device=model.device)).all()


def test_a_tie_at_zero_is_what_the_mask_must_survive() -> None:
    """Logits 0 and -200: in float32 exp(-200) is 0, as is the masked expert's; plain top-k would take expert 0 or 2."""
    model = small_model("olmoe", vlm=False, num_experts=NUM_EXPERTS)
    topk = model.shape.topk
    allowed_ME = torch.ones(2, NUM_EXPERTS, dtype=torch.bool)
    allowed_ME[0, : NUM_EXPERTS - topk] = False
    gate = gate_of(model, bias_std=0.0, allowed_ME=allowed_ME)
    assert gate.bias_LME is not None
    with torch.no_grad():
        gate.bias_LME[0, 0, -topk:-1] = -200.0
    hidden = torch.zeros(1, 1, model.hidden_size, device=model.device)
    gate.start_pass(pass_of(torch.ones(1, 1, dtype=torch.bool, device=model.device)))
    with torch.no_grad():
        logits, weights, picks = routers(model)[0](hidden)
    assert sorted(picks[0].tolist()) == list(range(NUM_EXPERTS - topk, NUM_EXPERTS))
    assert picks[0, 0] == NUM_EXPERTS - 1
    assert weights[0].tolist() == [1.0] + [0.0] * (topk - 1)
    assert logits[0, :2].tolist() == [MASKED_LOGIT] * 2


def test_experts_get_the_plain_hidden_vectors() -> None:
    model = small_model("moonlight", num_experts=NUM_EXPERTS)
    gate = gate_of(model, bias_std=1.0, allowed_ME=partition(model))
    widths = []
    for layer_id in model.layer_ids:
        hook = model.layers[layer_id].mlp.experts.register_forward_pre_hook
        hook(lambda module, args, kwargs: widths.append(args[0].shape[-1]), with_kwargs=True)
    list(run_batch(replace(model, modality_gate=gate), make_batch()))
    assert widths
    assert set(widths) == {model.hidden_size}


def test_a_pass_that_the_gate_was_not_told_of_does_not_run() -> None:
    model = small_model("olmoe", vlm=False, num_experts=NUM_EXPERTS)
    gate = gate_of(model, bias_std=1.0)
    hidden, is_text = drawn_rows(model, 6, 1.0)
    with pytest.raises(RuntimeError, match="told of nothing, and a pass of 6"):
        routers(model)[0](hidden)
    gate.start_pass(pass_of(is_text))
    with pytest.raises(RuntimeError, match="told of 6 rows, and a pass of 5"):
        routers(model)[0](hidden[:, 1:])


# Attaching


@pytest.mark.parametrize("backbone", BACKBONE_NAMES)
def test_detaching_restores_the_model_bit_for_bit(backbone: str) -> None:
    model = small_model(backbone, vlm=False, num_experts=NUM_EXPERTS)
    state = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    weights = [router.weight for router in routers(model)]
    hidden, is_text = drawn_rows(model, 50, 1.0)
    before = [router(hidden) for router in routers(model)]
    gate = gate_of(model, bias_std=1.0, allowed_ME=partition(model))
    assert all(router.weight is weight for router, weight in zip(routers(model), weights, strict=True))
    attached = model.module.state_dict()
    assert list(attached) == list(state)
    assert all(torch.equal(attached[name], tensor) for name, tensor in state.items())
    gate.start_pass(pass_of(is_text))
    assert not torch.equal(routers(model)[0](hidden)[0], before[0][0])
    gate.detach()
    gate.detach()
    for router, weight, wanted in zip(routers(model), weights, before, strict=True):
        assert router.weight is weight
        assert "forward" not in vars(router)
        assert all(torch.equal(a, b) for a, b in zip(router(hidden), wanted, strict=True))
    gate.attach(model)


def test_a_forward_that_another_library_replaced_comes_back() -> None:
    model = small_model("olmoe", vlm=False, num_experts=NUM_EXPERTS)
    of_others = [router.forward for router in routers(model)]
    for router, forward in zip(routers(model), of_others, strict=True):
        router.forward = forward
    gate_of(model, bias_std=1.0).detach()
    assert [vars(router)["forward"] for router in routers(model)] == of_others


def test_a_gate_that_does_not_fit_is_refused_in_one_line() -> None:
    model = small_model("olmoe", vlm=False, num_experts=NUM_EXPERTS)
    few_ME = torch.zeros(2, NUM_EXPERTS, dtype=torch.bool)
    few_ME[0], few_ME[1, :2] = True, True
    cases = [
        (ModalityGate(3, NUM_EXPERTS, bias=True), "is for 3 MoE layers of 16 experts, and small olmoe has 2 of 16"),
        (ModalityGate(2, 8, bias=True), "is for 2 MoE layers of 8 experts"),
        (
            ModalityGate(2, NUM_EXPERTS, allowed_ME=few_ME),
            "lets vision use 2 experts, and small olmoe sends a token to 3",
        ),
    ]
    for gate, words in cases:
        with pytest.raises(InputError, match=words):
            gate.attach(model)
    gate = gate_of(model, bias_std=0.0)
    with pytest.raises(InputError, match="is attached to small olmoe; detach it first"):
        gate.attach(model)
    with pytest.raises(InputError, match="have a gate already"):
        ModalityGate(2, NUM_EXPERTS, bias=True).attach(model)


def test_masks_within_groups_of_experts_are_refused() -> None:
    model = small_model("moonlight", vlm=False, num_experts=NUM_EXPERTS)
    for router in routers(model):
        router.num_group = 4
    with pytest.raises(InputError, match="picks within 4 groups"):
        gate_of(model, allowed_ME=partition(model))


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ((4, 4, 4), r"text_experts 4 \+ vision_experts 4 \+ shared_experts 4 = 12 must be the 16 experts"),
        ((2, 14, 0), "text_experts: 2 and 0 shared experts are fewer than the 3 .* write at least 3"),
        ((14, 1, 1), "vision_experts: 1 and 1 shared experts are fewer than the 3 .* write at least 2"),
        ((17, 0, -1), "shared_experts: -1 is not a number of experts"),
    ],
)
def test_partitions_that_cannot_be(counts: tuple[int, int, int], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ModalityGate.partition(16, *counts, topk=3)


def test_a_partition_says_who_may_use_what() -> None:
    # 2 text, 1 vision, 3 shared: text 110111, vision 001111
    assert ModalityGate.partition(6, 2, 1, 3, topk=2).long().tolist() == [[1, 1, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]]


# Training


def decoded(model: MoeModel, batch: dict[str, torch.Tensor], gate: ModalityGate) -> torch.Tensor:
    """Return a number that depends on all of the last hidden states, as a training step would compute it."""
    embeddings = model.embed(batch["token_ids_BS"], batch["pixel_values"])
    gate.start_pass(pass_of(batch["is_text_BS"]))
    last = model.decoder(inputs_embeds=embeddings).last_hidden_state
    along = torch.randn(last.shape, generator=torch.Generator().manual_seed(2)).to(last)
    return (last * along).sum()


def on_device(model: MoeModel) -> dict[str, torch.Tensor]:
    return {name: tensor.to(model.device) for name, tensor in small_batch(lengths=(24, 24)).items()}


@pytest.mark.parametrize("backbone", BACKBONE_NAMES)
def test_the_gradient_reaches_bias_router_and_embeddings(backbone: str) -> None:
    """The bias of the first layer, against a central difference; a step that changes no pick."""
    model = small_model(backbone, num_experts=NUM_EXPERTS)
    gate = gate_of(model, bias_std=0.5, allowed_ME=partition(model))
    batch = on_device(model)
    decoded(model, batch, gate).backward()
    bias_LME = gate.bias_LME
    assert bias_LME is not None
    assert bias_LME.grad is not None
    assert bias_LME.grad.isfinite().all()
    assert all(router.weight.grad.abs().sum() > 0 for router in routers(model))
    assert model.decoder.get_input_embeddings().weight.grad is not None
    for modality, masked in ((0, VISION), (1, TEXT)):
        assert bias_LME.grad[:, modality, masked].eq(0).all()
        expert = int(bias_LME.grad[0, modality].abs().argmax())
        ends = []
        with torch.no_grad():
            for step in (5e-4, -1e-3):
                bias_LME[0, modality, expert] += step
                ends.append(decoded(model, batch, gate).double())
            bias_LME[0, modality, expert] += 5e-4
        slope = (ends[0] - ends[1]) / 1e-3
        torch.testing.assert_close(bias_LME.grad[0, modality, expert].double(), slope, rtol=0.03, atol=0.02)


@pytest.mark.parametrize("backbone", BACKBONE_NAMES)
def test_the_gradient_of_the_logits_in_float64(backbone: str) -> None:
    """The sum of squared logits has the derivative 2 (x W^T + b), added up over the tokens of b's modality."""
    model = small_model(backbone, vlm=False, num_experts=NUM_EXPERTS, dtype=torch.float64)
    gate = gate_of(model, bias_std=0.5)
    hidden, is_text = drawn_rows(model, 30, 1.0)
    gate.start_pass(pass_of(is_text))
    (routers(model)[1](hidden)[0] ** 2).sum().backward()
    bias_LME = gate.bias_LME
    assert bias_LME is not None
    assert bias_LME.grad is not None
    assert bias_LME.grad[0].eq(0).all()
    logits_NE = hidden[0] @ routers(model)[1].weight.detach().T
    for modality, rows in ((0, is_text[0]), (1, ~is_text[0])):
        wanted = 2 * (logits_NE[rows] + bias_LME.detach()[1, modality]).sum(0)
        torch.testing.assert_close(bias_LME.grad[1, modality], wanted.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backbone", BACKBONE_NAMES)
def test_a_step_in_bfloat16(backbone: str) -> None:
    """Under autocast with float32 weights, as in training; masks hold, and gradients are numbers."""
    model = small_model(backbone, num_experts=NUM_EXPERTS)
    gate = gate_of(model, bias_std=0.5, allowed_ME=partition(model))
    seen: list[torch.Tensor] = []
    for router in routers(model):
        router.register_forward_hook(lambda module, args, output: seen.append(output[2]))
    batch = on_device(model)
    with torch.autocast(model.device.type, torch.bfloat16):
        decoded(model, batch, gate).backward()
    allowed_NE = partition(model).to(model.device)[(~batch["is_text_BS"]).flatten().long()]
    assert len(seen) == 2
    assert all(allowed_NE.gather(1, picks).all() for picks in seen)
    assert gate.bias_LME is not None
    assert gate.bias_LME.grad is not None
    assert gate.bias_LME.grad.isfinite().all()
    assert gate.bias_LME.grad.abs().sum() > 0


# Captures and files


def make_batch() -> Batch:
    lengths = (29, 22)
    tensors = small_batch(0, lengths)
    return Batch(
        request_ids_B=np.arange(2, dtype=np.int32),
        token_ids_BS=tensors["token_ids_BS"],
        is_token_BS=tensors["is_token_BS"],
        is_text_BS=tensors["is_text_BS"],
        pixel_values=tensors["pixel_values"],
        num_prompt_tokens_B=torch.tensor(lengths),
        max_new_tokens_B=torch.tensor((4, 6)),
    )


def captured(model: MoeModel, path: Path, chunk_size: int | None = None) -> RoutingTrace:
    meta = TraceMeta.of(model.shape, model=model.name, origin="captured", description="a test", mock=True)
    capture_batches(model, [make_batch()], path, meta, chunk_size=chunk_size)
    return next(iter(TraceFile.open(path).batches()))


@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("backbone", BACKBONE_NAMES)
def test_a_capture_keeps_modalities_on_their_experts(backbone: str, chunk_size: int | None, tmp_path: Path) -> None:
    model = small_model(backbone, num_experts=NUM_EXPERTS)
    gate = gate_of(model, allowed_ME=partition(model, shared=0))
    trace = captured(replace(model, modality_gate=gate), tmp_path / "t.arrow", chunk_size)
    picks_TLK, is_vision_T = trace.topk_expert_ids_TLK, trace.modality_T == Modality.VISION
    decode_T = trace.phase_T == Phase.DECODE
    # 2 images of 16 tokens; 29 + 22 - 32 tokens of text; 3 + 5 decode steps
    assert (is_vision_T.sum(), (~is_vision_T & ~decode_T).sum(), decode_T.sum()) == (32, 19, 8)
    assert picks_TLK[is_vision_T].min() >= NUM_EXPERTS // 2
    assert picks_TLK[~is_vision_T & ~decode_T].max() < NUM_EXPERTS // 2
    assert picks_TLK[decode_T].max() < NUM_EXPERTS // 2


def written(model: MoeModel, folder: Path) -> Path:
    with quiet():
        model.module.save_pretrained(folder)
    return folder


def source(folder: Path) -> ModelSource:
    return ModelSource(checkpoint=str(folder), device="cpu")


@pytest.mark.parametrize("backbone", BACKBONE_NAMES)
def test_a_gate_is_loaded_with_its_checkpoint(backbone: str, tmp_path: Path) -> None:
    model = small_model(backbone, num_experts=NUM_EXPERTS)
    gate = gate_of(model, bias_std=2.0, allowed_ME=partition(model))
    folder = written(model, tmp_path / "model")  # attached: the weights are written as those of the plain model
    plain = load_model(source(folder))
    assert plain.modality_gate is None
    gate.save(folder)
    loaded = load_model(source(folder))
    assert loaded.modality_gate is not None
    for name, tensor in gate.state_dict().items():
        assert torch.equal(loaded.modality_gate.state_dict()[name], tensor.cpu())
    assert not any(parameter.requires_grad for parameter in loaded.modality_gate.parameters())
    own = captured(replace(model, modality_gate=gate), tmp_path / "own.arrow")
    again = captured(loaded, tmp_path / "again.arrow")
    without = captured(plain, tmp_path / "plain.arrow")
    np.testing.assert_array_equal(again.topk_expert_ids_TLK, own.topk_expert_ids_TLK)
    np.testing.assert_array_equal(again.gate_weights_TLK, own.gate_weights_TLK)
    assert (np.sort(without.topk_expert_ids_TLK, 2) != np.sort(own.topk_expert_ids_TLK, 2)).any()


def test_the_source_of_a_model_tells_gates_apart(tmp_path: Path) -> None:
    model = small_model("olmoe", num_experts=NUM_EXPERTS)
    folder = written(model, tmp_path / "model")
    plain = load_model(source(folder)).source
    digests = []
    for seed in (1, 2, 1):
        gate = gate_of(model, bias_std=1.0, seed=seed)
        gate.save(folder)
        gate.detach()
        with_gate = load_model(source(folder)).source
        digests.append(with_gate["modality_gate_sha256"])
        assert {**with_gate, "modality_gate_sha256": None} == {**plain, "modality_gate_sha256": None}
    assert digests[0] == digests[2] != digests[1]


def without_metadata(path: Path) -> None:
    save_file(load_file(path), path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def edit(**tensors: torch.Tensor) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        save_file(tensors, path, metadata=metadata)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (cut, "cannot be read"),
        (without_metadata, "is not a modality gate, or damaged"),
        (edit(), "neither bias nor mask"),
        (edit(bias_LME=torch.full((2, 2, NUM_EXPERTS), torch.nan)), "not finite"),
        (edit(bias_LME=torch.zeros(1, 2, NUM_EXPERTS)), "size mismatch"),
        (edit(allowed_ME=torch.ones(2, 3, dtype=torch.bool)), r"\(2, 3\) and must be bool \(2, 16\)"),
        (edit(allowed_ME=torch.ones(2, NUM_EXPERTS)), "must be bool"),
        (edit(bias_LME=torch.zeros(2, 2, NUM_EXPERTS), other=torch.zeros(1)), "other"),
    ],
)
def test_damaged_files_are_one_line(change: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    model = small_model("olmoe", num_experts=NUM_EXPERTS)
    folder = written(model, tmp_path)
    gate_of(model, bias_std=1.0).save(folder)
    change(folder / FILE_NAME)
    with pytest.raises(InputError, match=words) as caught:
        load_model(source(folder))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(folder / FILE_NAME))


def test_a_gate_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = written(small_model("olmoe", num_experts=NUM_EXPERTS), tmp_path)
    ModalityGate(4, NUM_EXPERTS, bias=True).save(folder)
    with pytest.raises(InputError, match=f"{FILE_NAME}: is for 4 MoE layers of 16 experts, and .* has 2 of 16"):
        load_model(source(folder))
    with pytest.raises(InputError, match="there is no such file"):
        ModalityGate.load(tmp_path / "nowhere")
