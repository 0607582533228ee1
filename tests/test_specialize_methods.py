"""Methods on every backbone, through hooks alone: they see what ran, and add what the papers say."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from epsim.capture.recorder import RouterRecorder
from epsim.capture.scores.gaussian_statistics import GaussianStatistics, moments
from epsim.errors import InputError
from epsim.scenario.train import MethodSpec, PartitionSpec, SmarSpec, SmoesSpec, SoftSpec
from epsim.specialize.autocast import autocast_experts
from epsim.specialize.examples import ExampleBatch
from epsim.specialize.forward import IGNORED, Predicted, run_examples
from epsim.specialize.methods import Smoes, make_method, trained_parameters
from epsim.specialize.observer import GateObserver
from epsim.specialize.scores import OnlineGaussian, make_training_score
from tests.reference import specialize_reference as reference
from tests.reference.small_models import BACKBONE_NAMES, TOKENS_PER_IMAGE, small_batch, small_model

SPECS: Mapping[str, MethodSpec] = {
    "soft": SoftSpec(kind="soft"),
    "binning": SmoesSpec(kind="smoes", objective="none", num_bins=4),
    "attention": SmoesSpec(kind="smoes", num_bins=4),
    "gaussian": SmoesSpec(kind="smoes", score="gaussian", num_bins=4),
    "gmm4": SmoesSpec(kind="smoes", score="gmm4", num_bins=4),
    "hard-score": SmoesSpec(kind="smoes", score="hard", num_bins=4),
    "kl": SmoesSpec(kind="smoes", objective="kl", num_bins=4),
    "smar": SmarSpec(kind="smar"),
    "partition": PartitionSpec(kind="partition", text_experts=3, vision_experts=3, shared_experts=2),
}


def examples(seed: int = 0) -> ExampleBatch:
    """Return two prompts with an image each, padded, of which the last two tokens are the answer."""
    batch = small_batch(seed)
    is_answer_BS = torch.zeros_like(batch["is_token_BS"])
    is_answer_BS[:, -2:] = True
    return ExampleBatch(is_answer_BS=is_answer_BS, **batch)


@pytest.mark.parametrize("backbone", BACKBONE_NAMES)
def test_what_is_observed_is_what_the_experts_got(backbone: str) -> None:
    model = small_model(backbone)
    for layer_id in model.layer_ids:
        model.layers[layer_id].mlp.gate.weight.data *= 50  # as drawn, all scores are nearly alike
    observer, recorder = GateObserver(model), RouterRecorder(model)
    observer.attach()
    with torch.no_grad():
        run_examples(model, examples().to(model.device), (observer, recorder))
    routed = observer.routed()
    picks_LBSK, weights_LBSK = recorder.picks()
    assert torch.equal(routed.picks_LBSK, picks_LBSK.long())
    assert torch.allclose(routed.gate_LBSE.sum(-1), torch.ones(()), atol=1e-6)
    chosen = routed.gate_LBSE.gather(-1, routed.picks_LBSK)
    ours = chosen / chosen.sum(-1, keepdim=True)
    theirs = weights_LBSK.float() / weights_LBSK.float().sum(-1, keepdim=True)
    assert torch.allclose(ours, theirs, atol=2e-3), "weights are the gating scores of the picks, up to a factor"
    assert float(ours.std()) > 0.05


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("backbone", BACKBONE_NAMES)
def test_every_method_trains_the_routers_of_every_backbone(backbone: str, name: str) -> None:
    model = small_model(backbone)
    method = make_method(SPECS[name], model, 0)
    observer = GateObserver(model)
    observer.attach()
    method.attach(model)
    gates = [model.layers[layer_id].mlp.gate.weight.requires_grad_(True) for layer_id in model.layer_ids]
    trained = trained_parameters(method)
    run = run_examples(model, examples().to(model.device), (observer, *method.watchers))
    terms = method.terms(observer.routed())
    (run.loss() + sum(term.weight * term.value for term in terms.values())).backward()
    for parameter in (*gates, *trained):
        assert parameter.grad is not None
        assert bool(parameter.grad.isfinite().all())
        assert bool((parameter.grad != 0).any())
    assert bool(trained) == (name == "smar")


@pytest.mark.parametrize("backbone", ["olmoe", "moonlight"])
@pytest.mark.parametrize("score", ["attention", "gaussian", "hard"])
def test_the_terms_of_smoes_are_those_of_the_equations(backbone: str, score: str) -> None:
    model = small_model(backbone)
    method = make_method(SmoesSpec(kind="smoes", score=score, num_bins=4), model, 0)  # type: ignore[arg-type]
    assert isinstance(method, Smoes)
    assert method.score is not None
    seen: list[torch.Tensor] = []
    kept = method.score.scores_LBS
    method.score.scores_LBS = lambda: seen.append(kept()) or seen[-1]  # type: ignore[func-returns-value,method-assign]
    observer = GateObserver(model)
    observer.attach()
    method.attach(model)
    with torch.no_grad():
        run_examples(model, examples().to(model.device), (observer, *method.watchers))
        routed = observer.routed()
        terms = method.terms(routed)
    passed = reference.Routing(
        gate_LBSE=routed.gate_LBSE.double().cpu().numpy(),
        picks_LBSK=routed.picks_LBSK.cpu().numpy(),
        is_text_BS=routed.is_text_BS.cpu().numpy(),
        is_token_BS=routed.is_token_BS.cpu().numpy(),
    )
    bins = np.array(reference.bins_after([passed], num_bins=4, decay=0.99))
    expected = reference.information_loss(passed, bins, seen[0].double().cpu().numpy(), np.array([True, True]))
    assert float(terms["mutual_information"].value) == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert float(terms["balance"].value) == pytest.approx(reference.bin_balance_loss(passed, bins), rel=1e-5)


def test_the_gaussian_score_takes_a_batch_in_before_it_scores_it() -> None:
    """With all memory (beta 1) the statistics after two batches are those of their tokens together."""
    model = small_model("olmoe")
    score = make_training_score("gaussian", beta=1.0, tau_factor=0.5, seed=0)
    assert isinstance(score, OnlineGaussian)
    inputs: list[torch.Tensor] = []
    first = model.layers[model.layer_ids[0]].mlp.experts
    first.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    score.attach(model)
    is_text, is_token = [], []
    for seed in (0, 1):
        batch = examples(seed).to(model.device)
        with torch.no_grad():
            run_examples(model, batch, (score,))
        scores_LBS = score.scores_LBS()
        is_text.append(batch.is_text_BS.flatten())
        is_token.append(batch.is_token_BS.flatten())
    x_TD, text_T, token_T = torch.cat(inputs), torch.cat(is_text), torch.cat(is_token)
    for modality, member_T in enumerate((text_T & token_T, ~text_T & token_T)):
        mean_D = score.statistics.sum_LMCD[0, modality, 0] / score.statistics.count_LMC[0, modality, 0]
        assert torch.allclose(mean_D, x_TD[member_T].double().mean(0), atol=1e-6)
    expected_T = score.statistics.density().score(0, inputs[1])
    assert torch.equal(scores_LBS[0].flatten()[token_T[len(inputs[0]) :]], expected_T[token_T[len(inputs[0]) :]])
    assert isinstance(score.statistics, GaussianStatistics)
    assert moments(x_TD[:4], torch.ones(4, 2, 1)).count_MC.tolist() == [[4.0], [4.0]]


def test_hard_scores_are_the_labels() -> None:
    model, batch = small_model("olmoe"), examples()
    score = make_training_score("hard", beta=0.99, tau_factor=0.5, seed=0)
    score.attach(model)
    with torch.no_grad():
        run_examples(model, batch.to(model.device), (score,))
    assert torch.equal(score.scores_LBS().cpu(), torch.stack([batch.is_text_BS.float()] * 2))  # 2 MoE layers
    assert int((score.scores_LBS() == 0).sum()) == 2 * 2 * TOKENS_PER_IMAGE


def test_the_loss_is_the_mean_over_samples_of_the_mean_over_answer_tokens() -> None:
    """Two words. Sample 1 has one answer token, probability 1/2: ln 2. Sample 2 has two, 1 and 1/2: ln 2 / 2."""
    sure, even = [50.0, 0.0], [0.0, 0.0]
    predicted = Predicted(
        logits_BSV=torch.tensor([[even, even], [sure, even]]), labels_BS=torch.tensor([[IGNORED, 1], [0, 1]])
    )
    assert float(predicted.loss()) == pytest.approx(0.75 * np.log(2))
    assert predicted.is_right_B().tolist() == [False, False]  # of equal logits the first is taken


def test_detached_methods_leave_the_model_as_it_was() -> None:
    for name in SPECS:
        model = small_model("olmoe")
        method = make_method(SPECS[name], model, 0)
        plain = run_examples(model, examples().to(model.device)).logits_BSV.detach()
        method.attach(model)
        method.detach()
        assert torch.equal(run_examples(model, examples().to(model.device)).logits_BSV, plain), name


def test_a_method_that_does_not_fit_the_experts_is_refused() -> None:
    model = small_model("olmoe")
    with pytest.raises(InputError, match="8 experts"):
        make_method(PartitionSpec(kind="partition", text_experts=3, vision_experts=3), model, 0)
    with pytest.raises(InputError, match="num_bins"):
        make_method(SmoesSpec(kind="smoes", num_bins=5), model, 0)


@pytest.mark.parametrize("backbone", BACKBONE_NAMES)
def test_experts_follow_autocast_and_keep_float32_gradients(backbone: str) -> None:
    """bfloat16 has 8 bits: results within 2 % of the largest; gradients are those of the float32 weights."""
    model = small_model(backbone)
    device_type = model.device.type
    experts = model.layers[model.layer_ids[0]].mlp.experts.requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(10, model.hidden_size, generator=generator).to(model.device)
    weights_NK = torch.rand(10, 2, generator=generator).to(model.device)
    picks_NK = torch.tensor([[i % 8, (i + 3) % 8] for i in range(10)]).to(model.device)
    exact_ND = experts(hidden_ND, picks_NK, weights_NK).detach()
    with autocast_experts(model):
        assert torch.equal(experts(hidden_ND, picks_NK, weights_NK), exact_ND), "no autocast, no change"
        with torch.autocast(device_type, dtype=torch.bfloat16):
            rounded_ND = experts(hidden_ND, picks_NK, weights_NK)
    assert rounded_ND.dtype == torch.bfloat16
    assert float((rounded_ND.detach() - exact_ND).abs().max()) < 0.02 * float(exact_ND.abs().max())
    rounded_ND.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.any() for p in experts.parameters())
    assert torch.equal(experts(hidden_ND, picks_NK, weights_NK), exact_ND)
