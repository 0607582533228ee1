"""Soft modality scores: hand-worked examples, then every estimator on every backbone against explicit float64."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file, save_file

from epsim.capture.model import ForwardPass, MoeModel
from epsim.capture.scores.attention import AttentionScore, attention_of_scores, attention_with_scores, combine
from epsim.capture.scores.estimators import SCORE_NAMES, ScoreEstimator, make_fit, make_score
from epsim.capture.scores.gaussian import GaussianFit, GaussianScore
from epsim.capture.scores.gaussian_statistics import (
    Density,
    FittedModel,
    GaussianStatistics,
    hard_weights,
    moments,
    stacked,
)
from epsim.capture.scores.mixture import responsibilities, seed_components
from epsim.capture.scores.statistics_file import METADATA_KEY, load_statistics, save_statistics
from epsim.errors import InputError, OutputError
from epsim.trace.meta import Phase
from tests.reference.score_reference import (
    attention_scores,
    ema_statistics,
    explicit_attention,
    gaussian_scores,
    record,
    run_passes,
)
from tests.reference.small_models import BACKBONE_NAMES, small_batch, small_model

torch.set_num_threads(1)
CUTS = (9, 20)  # the first chunk of request 1 is padding to column 7
FITTED = FittedModel(name="hand", layer_ids=(1,), hidden_size=1, checksum=0)


@pytest.fixture(scope="module", params=BACKBONE_NAMES)
def model(request: pytest.FixtureRequest) -> MoeModel:
    return small_model(request.param)


@pytest.fixture(scope="module")
def olmoe() -> MoeModel:
    return small_model("olmoe")


def fitted(model: MoeModel, name: str = "gaussian", seeds: tuple[int, ...] = (1, 2, 3)) -> GaussianStatistics:
    """Return statistics of three batches of two prompts."""
    fit = make_fit(name, seed=5)
    fit.attach(model)
    for seed in seeds:
        run_passes(model, small_batch(seed), estimators=[fit])
    fit.detach()
    return fit.statistics


def scored(model: MoeModel, estimator: ScoreEstimator, **passes: object) -> np.ndarray:
    """Return the estimator's scores of all columns, float64 [B, S, L]."""
    estimator.attach(model)
    run = run_passes(model, small_batch(), estimators=[estimator], **passes)  # type: ignore[arg-type]
    estimator.detach()
    scores = run.scores[estimator.name]
    assert scores.dtype == torch.float32
    assert torch.isfinite(scores).all()
    assert ((scores >= 0) & (scores <= 1)).all()
    return scores.double().numpy()


def worst(found: np.ndarray, expected: np.ndarray, is_token_BS: torch.Tensor) -> float:
    return float(np.abs(found - expected)[is_token_BS.numpy()].max())


def num_hooks(model: MoeModel) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.module.modules())


def take_in(statistics: GaussianStatistics, x_LTD: torch.Tensor, is_text_T: torch.Tensor) -> None:
    """Update statistics of one Gaussian per modality by one batch of tokens."""
    weight_TMC = hard_weights(is_text_T, torch.ones_like(is_text_T)).unsqueeze(-1)
    statistics.absorb(stacked([moments(x_TD, weight_TMC) for x_TD in x_LTD]))


# --- by hand -------------------------------------------------------------------------------------------------------


def test_eq_3_and_4_of_two_tokens_by_hand() -> None:
    """A vision token, then a text token whose query is 0: it attends to both alike, so M~ is 1/2.

    With ||x|| = 3 and ||x_attn|| = 1 it keeps (1 * 1/2 + 3 * 1) / 4 = 7/8; the vision token sees itself: 0.
    """
    key = torch.tensor([[[[2.0, -1.0], [0.5, 4.0]]]])
    query, labels_BP = torch.zeros(1, 1, 2, 2), torch.tensor([[0.0, 1.0]])
    output, heads_BSH = attention_with_scores(torch.nn.Identity(), query, key, key, labels_BP, None)
    assert torch.allclose(heads_BSH, torch.tensor([[[0.0], [0.5]]]))
    assert torch.allclose(output[0, :, 0], torch.tensor([[2.0, -1.0], [1.25, 1.5]]))
    after = combine(labels_BP, heads_BSH.mean(-1), torch.tensor([[3.0, 3.0]]), torch.tensor([[1.0, 1.0]]))
    assert torch.allclose(after, torch.tensor([[0.0, 0.875]]))


def test_eq_4_without_norms_keeps_the_score() -> None:
    zero = torch.zeros(1)
    assert combine(torch.tensor([0.25]), torch.tensor([1.0]), zero, zero).tolist() == [0.25]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("value_size", [16, 12])
def test_both_ways_to_attend_agree_with_explicit_attention(kv_heads: int, value_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    module = torch.nn.Identity()
    module.num_key_value_groups = 4 // kv_heads  # type: ignore[assignment]
    query = torch.randn(2, 4, 6, 16, generator=generator)
    key = torch.randn(2, kv_heads, 6, 16, generator=generator)
    value = torch.randn(2, kv_heads, 6, value_size, generator=generator)
    scores_BP = torch.rand(2, 6, generator=generator)
    rows = explicit_attention(query, key, 0.3, np.ones((2, 6), bool))
    expected = np.einsum("bsp,bp->bs", rows, scores_BP.double().numpy())
    together = attention_with_scores(module, query, key, value, scores_BP, None, scaling=0.3)[1]
    apart = attention_of_scores(module, query, key, value, scores_BP, None, scaling=0.3)
    for found_BSH in (together, apart):
        assert np.abs(found_BSH.mean(-1).numpy() - expected).max() < 1e-6


def test_eq_5_to_7_of_two_batches_by_hand() -> None:
    """beta 1/2, one dimension, text tokens 1 and 3, then one of 6.

    First: N = 2, S_mu = 4, S_sigma^2 = 2 (mean 2, variance 1). Then N = 1 + 1 = 2, S_mu = 2 + 6 = 8,
    S_sigma^2 = 1 + 0 + (6 - 2)^2 * (1 * 1)/(1 + 1) = 9: mean 4, variance 9/2. The vision token 10, then none: N = 1/2,
    S_mu = 5: mean 10.
    """
    statistics = GaussianStatistics.empty(FITTED, beta=0.5)
    take_in(statistics, torch.tensor([[[1.0], [3.0], [10.0]]]), torch.tensor([True, True, False]))
    assert statistics.count_LMC.flatten().tolist() == [2, 1]
    assert statistics.sum_LMCD.flatten().tolist() == [4, 10]
    assert statistics.square_LMCD.flatten().tolist() == [2, 0]
    take_in(statistics, torch.tensor([[[6.0]]]), torch.tensor([True]))
    assert statistics.count_LMC.flatten().tolist() == [2, 0.5]
    assert statistics.sum_LMCD.flatten().tolist() == [8, 5]
    assert statistics.square_LMCD.flatten().tolist() == [9, 0]


def test_eq_8_and_9_by_hand() -> None:
    """Text N(0, 1), vision N(2, 4) in one dimension, tau 1/2.

    x = 0: LL = 0 and -(log 4 + 1)/2 = -1.193147; score = 1/(1 + exp(-1.193147/0.5)) = 0.915776.
    x = 2: LL = -2 and -log(4)/2 = -0.693147: 1/(1 + exp(1.306853/0.5)) = 0.068262.
    """
    mean, variance = torch.tensor([[[[0.0]], [[2.0]]]]), torch.tensor([[[[1.0]], [[4.0]]]])
    density = Density.of(mean.double(), variance.double(), torch.ones(1, 2, 1).double(), tau=0.5)
    found = density.score(0, torch.tensor([[0.0], [2.0]]))
    assert found.tolist() == pytest.approx([0.915776, 0.068262], abs=1e-6)


def test_a_mixture_by_hand() -> None:
    """Text: half at -1, half at 1, variance 1; vision at 0, variance 1; tau 1. At x = 0 each text part has LL -1/2 and
    so has their mean: score 1/(1 + exp(1/2)) = 0.377541. At x = 1, LL_text = log((1 + e^-2)/2) = -0.566219 and
    LL_vision = -1/2: 1/(1 + exp(0.066219)) = 0.483451."""
    mean = torch.tensor([[[[-1.0], [1.0]], [[0.0], [7.0]]]]).double()
    weight = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]]).double()
    density = Density.of(mean, torch.ones_like(mean), weight, tau=1.0)
    assert density.score(0, torch.tensor([[0.0], [1.0]])).tolist() == pytest.approx([0.377541, 0.483451], abs=1e-6)


# --- the attention score on every backbone ---------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [(), CUTS, (28,)])
def test_attention_score_is_that_of_explicit_attention(model: MoeModel, cuts: tuple[int, ...]) -> None:
    found = scored(model, AttentionScore(), cuts=cuts, num_decode=3, ended_at=2)
    expected = record(model, small_batch(), cuts=cuts, num_decode=3, ended_at=2)
    assert expected.run is not None
    layers = attention_scores(expected, model.layer_ids)
    assert worst(found, layers, expected.run.is_token_BS) < 1e-5
    assert 0.02 < layers[:, 5:18].min() < 0.5  # the image is mixed with text: nothing here is a hard label


@pytest.mark.parametrize("name", BACKBONE_NAMES)
def test_attention_score_in_bfloat16_is_that_of_the_models_own_queries_keys_and_norms(name: str) -> None:
    """The reference takes what the bfloat16 model computed, so that this measures the score and not the model."""
    model = small_model(name, dtype=torch.bfloat16, num_moe_layers=4)
    found = scored(model, AttentionScore(), cuts=CUTS, num_decode=2)
    expected = record(model, small_batch(), cuts=CUTS, num_decode=2)
    assert expected.run is not None
    assert worst(found, attention_scores(expected, model.layer_ids), expected.run.is_token_BS) < 5e-3


def test_cached_decode_and_chunks_give_the_scores_of_the_whole_sequence(model: MoeModel) -> None:
    cached = scored(model, AttentionScore(), cuts=CUTS, num_decode=4)
    whole = scored(model, AttentionScore(), cuts=(), num_decode=4)
    assert np.abs(cached - whole).max() < 1e-5
    one_by_one = scored(model, AttentionScore(), cuts=range(24, 29))
    assert np.abs(one_by_one - whole[:, :29]).max() < 1e-5


def test_hooks_leave_the_models_outputs_and_routing_as_they_are(model: MoeModel) -> None:
    statistics = fitted(model)
    plain = run_passes(model, small_batch(), cuts=CUTS, num_decode=2)
    hooks = num_hooks(model)
    estimators: list[ScoreEstimator] = [AttentionScore(), GaussianScore(statistics)]
    for estimator in estimators:
        estimator.attach(model)
    hooked = run_passes(model, small_batch(), cuts=CUTS, num_decode=2, estimators=estimators)
    for estimator in estimators:
        estimator.detach()
    after = run_passes(model, small_batch(), cuts=CUTS, num_decode=2)
    for other in (hooked, after):
        assert torch.equal(plain.hidden, other.hidden)
        assert all(torch.equal(a, b) for a, b in zip(plain.experts, other.experts, strict=True))
    assert model.decoder.config._attn_implementation == "sdpa"
    assert num_hooks(model) == hooks


def test_padding_and_ended_requests_change_no_score_of_others(olmoe: MoeModel) -> None:
    """Request 1 alone, without padding, has the scores that it has beside a longer one."""
    both = scored(olmoe, AttentionScore(), num_decode=2, ended_at=1)
    batch = small_batch()
    alone = {name: batch[name][1:, 7:] for name in ("token_ids_BS", "is_token_BS", "is_text_BS")}
    score = AttentionScore()
    score.attach(olmoe)
    images = {"pixel_values": batch["pixel_values"][1:]}
    run = run_passes(olmoe, alone | images, cuts=(4, 15), num_decode=2, estimators=[score])
    score.detach()
    # the made-up tokens of the decode steps differ: compare the prompt
    assert np.abs(run.scores["attention"].numpy()[0, :22] - both[1, 7:29]).max() < 1e-5


def test_text_alone_stays_text_and_text_models_work() -> None:
    model = small_model("qwen3-moe", vlm=False)
    score = AttentionScore()
    score.attach(model)
    run = run_passes(model, small_batch(vlm=False), estimators=[score])
    score.detach()
    assert torch.allclose(run.scores["attention"], torch.ones(()))
    assert model.module.config._attn_implementation == "sdpa"


def test_a_new_batch_forgets_the_last_one(olmoe: MoeModel) -> None:
    score = AttentionScore()
    score.attach(olmoe)
    run_passes(olmoe, small_batch(3), num_decode=2, estimators=[score])
    second = run_passes(olmoe, small_batch(), estimators=[score]).scores["attention"]
    with pytest.raises(RuntimeError, match=r"29 columns seen, 0 in the KV cache"):
        run_passes(olmoe, small_batch(), estimators=[score], begin=False)
    score.detach()
    assert np.array_equal(second.double().numpy(), scored(olmoe, AttentionScore()))


def test_attention_score_refuses_what_it_cannot_follow(olmoe: MoeModel) -> None:
    score = AttentionScore()
    with pytest.raises(RuntimeError, match="no pass has run"):
        score.scores_BSL()
    score.attach(olmoe)
    with pytest.raises(InputError, match=r'through the attention implementation "sdpa", not "epsim_attention_score"'):
        AttentionScore().attach(olmoe)
    with pytest.raises(InputError, match="it is attached to small olmoe; detach it first"):
        score.attach(olmoe)
    for _ in range(2):  # before any start_pass, and after a pass that was complete
        with pytest.raises(RuntimeError, match="start_pass must come before the decoder runs"):
            olmoe.decoder(inputs_embeds=torch.zeros(1, 3, 64))
        run_passes(olmoe, small_batch(), estimators=[score])
    score.detach()
    score.detach()


# --- the Gaussian scores ---------------------------------------------------------------------------------------------


def explicit_fit(model: MoeModel, beta: float = 0.99) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return mean and variance [2, D] of each MoE layer after the three batches of `fitted`, by eq. 5-7."""
    batches = []
    for seed in (1, 2, 3):
        found = record(model, small_batch(seed))
        assert found.run is not None
        is_token_BS = found.run.is_token_BS.numpy()
        batches.append(([x[is_token_BS] for x in found.x_LBSD], found.run.is_text_BS.numpy()[is_token_BS]))
    return [ema_statistics([(x[layer], text) for x, text in batches], beta) for layer in range(len(model.layer_ids))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BACKBONE_NAMES)
def test_gaussian_score_is_that_of_explicit_statistics(name: str, dtype: torch.dtype) -> None:
    """Statistics and scores from hidden vectors that were read off beside; in bfloat16 those of the bfloat16 model."""
    model = small_model(name, dtype=dtype)
    found = scored(model, GaussianScore(fitted(model)), cuts=CUTS, num_decode=2)
    expected = record(model, small_batch(), cuts=CUTS, num_decode=2)
    assert expected.run is not None
    for layer, (mean_MD, variance_MD) in enumerate(explicit_fit(model)):
        x_TD = expected.x_LBSD[layer].reshape(-1, 64)
        scores = gaussian_scores(x_TD, mean_MD[:, None], variance_MD[:, None], np.ones((2, 1)), tau=32.0)
        shape = found.shape[:2]
        assert worst(found[..., layer], scores.reshape(shape), expected.run.is_token_BS) < 1e-5
        assert scores.max() - scores.min() > 0.1


def test_a_mean_far_from_zero_costs_no_precision() -> None:
    """x around 10000 with deviation 0.01, where squares lose all in float32 unless the mean is taken off first."""
    rng = np.random.default_rng(0)
    x_TD = (10000 + 0.01 * rng.standard_normal((500, 64))).astype(np.float32)
    is_text_T = rng.random(500) < 0.3
    x_TD[is_text_T] += np.float32(0.005)
    statistics = GaussianStatistics.empty(replace(FITTED, hidden_size=64))
    take_in(statistics, torch.from_numpy(x_TD)[None], torch.from_numpy(is_text_T))
    mean_MD, variance_MD = ema_statistics([(x_TD.astype(np.float64), is_text_T)], 0.99)
    density = statistics.density()
    assert (
        np.abs(statistics.square_LMCD[0, :, 0].numpy() / statistics.count_LMC[0].numpy() / variance_MD - 1).max() < 1e-4
    )
    expected = gaussian_scores(
        x_TD.astype(np.float64), mean_MD[:, None], variance_MD[:, None], np.ones((2, 1)), tau=32.0
    )
    assert np.abs(density.score(0, torch.from_numpy(x_TD)).numpy() - expected).max() < 1e-5


@pytest.mark.parametrize("name", ["gaussian", "gmm2", "gmm4"])
def test_the_size_of_chunks_does_not_change_a_fit(olmoe: MoeModel, name: str) -> None:
    whole, chunked = make_fit(name, seed=3), make_fit(name, seed=3)
    for fit, cuts in ((whole, ()), (chunked, CUTS)):
        fit.attach(olmoe)
        for seed in (1, 2):
            run_passes(olmoe, small_batch(seed), cuts=cuts, num_decode=2, estimators=[fit])
        fit.detach()
    for tensor in ("count_LMC", "sum_LMCD", "square_LMCD"):
        first, second = getattr(whole.statistics, tensor), getattr(chunked.statistics, tensor)
        assert torch.allclose(first, second, rtol=1e-4, atol=1e-4)
    text = 0.99 * (29 + 22 - 32) + 29 + 22 - 32  # decode steps are not counted
    assert whole.statistics.count_LMC.sum(-1)[0].tolist() == pytest.approx([text, 0.99 * 32 + 32])


def test_a_mixture_of_one_is_the_gaussian(olmoe: MoeModel) -> None:
    """Also by the way that mixtures take: their start and their responsibilities."""
    plain, forced = fitted(olmoe), GaussianFit(1)
    forced.attach(olmoe)
    forced._is_started = [False, False]
    for seed in (1, 2, 3):
        run_passes(olmoe, small_batch(seed), estimators=[forced])
        forced.start_batch()
        forced._density = forced.statistics.density()  # as a mixture has it
    forced.detach()
    assert torch.allclose(plain.count_LMC, forced.statistics.count_LMC, rtol=1e-6)
    assert torch.allclose(plain.sum_LMCD, forced.statistics.sum_LMCD, rtol=1e-5, atol=1e-5)
    assert torch.allclose(plain.square_LMCD, forced.statistics.square_LMCD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gmm2", "gmm4"])
def test_mixture_score_is_that_of_the_explicit_mixture(model: MoeModel, name: str) -> None:
    statistics = fitted(model, name)
    found = scored(model, make_score(name, statistics), cuts=CUTS, num_decode=2)
    expected = record(model, small_batch(), cuts=CUTS, num_decode=2)
    assert expected.run is not None
    for layer in range(len(model.layer_ids)):
        count_MC = statistics.count_LMC[layer].numpy()
        mean_MCD = statistics.sum_LMCD[layer].numpy() / count_MC[..., None]
        variance_MCD = statistics.square_LMCD[layer].numpy() / count_MC[..., None]
        weight_MC = count_MC / count_MC.sum(axis=1, keepdims=True)
        floor = 1e-6 * (weight_MC[..., None] * variance_MCD).sum(axis=1).mean()
        variance_MCD = np.maximum(variance_MCD, floor)
        x_TD = expected.x_LBSD[layer].reshape(-1, 64)
        scores = gaussian_scores(x_TD, mean_MCD, variance_MCD, weight_MC, tau=32.0)
        assert worst(found[..., layer], scores.reshape(found.shape[:2]), expected.run.is_token_BS) < 1e-5


def test_a_mixture_finds_two_clusters() -> None:
    """300 text tokens at -5 and 100 at 5: weights 3/4 and 1/4, means -5 and 5, variance 1, after any seed."""
    rng = np.random.default_rng(1)
    x_TD = torch.from_numpy(np.concatenate((rng.normal(-5, 1, (300, 8)), rng.normal(5, 1, (100, 8))))).float()
    for seed in range(5):
        member_TC = seed_components(x_TD, torch.ones(400), np.random.default_rng(seed).random(2))
        assert sorted(member_TC.sum(0).tolist()) == [100, 300]
        assert member_TC[:300].unique(dim=0).shape[0] == 1


def test_responsibilities_weight_the_update() -> None:
    """Components of weight 3/4 and 1/4 at 0 and 2, variance 1: at x = 1 they are as likely, so shares are 3/4 and 1/4.
    A modality without statistics gets none."""
    mean = torch.tensor([[[[0.0], [2.0]], [[0.0], [0.0]]]]).double()
    weight = torch.tensor([[[0.75, 0.25], [0.0, 0.0]]]).double()
    density = Density.of(mean, torch.ones_like(mean), weight, tau=1.0)
    weight_TM = hard_weights(torch.tensor([True, False]), torch.tensor([True, True]))
    shares = responsibilities(density, 0, torch.tensor([[1.0], [1.0]]), weight_TM)
    assert shares.flatten(1).tolist() == [pytest.approx([0.75, 0.25, 0, 0]), [0, 0, 0, 0]]
    found = moments(torch.tensor([[1.0], [3.0]]), torch.tensor([[[0.75]], [[0.25]]]))
    assert (found.count_MC.item(), found.mean_MCD.item(), found.deviation_MCD.item()) == (1.0, 1.5, 0.75)


def test_a_later_batch_of_a_mixture_is_one_step_of_online_em(olmoe: MoeModel) -> None:
    """Responsibilities under what was before the batch weight eq. 5-7; here they are written out in float64."""
    generator = torch.Generator().manual_seed(2)
    is_text_BS = torch.arange(60)[None] < 40
    fit, batches = make_fit("gmm2"), [torch.randn(60, 64, generator=generator) for _ in range(2)]
    fit.attach(olmoe)
    everything = torch.ones_like(is_text_BS)
    forward_pass = ForwardPass(
        phase=Phase.PREFILL, step=0, is_text_BS=is_text_BS, is_token_BS=everything, is_key_BP=everything
    )
    for batch_TD in batches:
        before = [getattr(fit.statistics, name).numpy()[0, 0] for name in ("count_LMC", "sum_LMCD", "square_LMCD")]
        fit.start_pass(forward_pass)
        for layer in range(2):
            fit._take(layer, batch_TD)
    fit.detach()
    count_C, sum_CD, square_CD = before
    mean_CD, variance_CD = sum_CD / count_C[:, None], square_CD / count_C[:, None]
    x_TD = batches[1].double().numpy()[:40]  # text
    apart_TC = ((x_TD[:, None] - mean_CD) ** 2 / variance_CD + np.log(variance_CD)).sum(axis=-1)
    share_TC = count_C * np.exp(-(apart_TC - apart_TC.min(axis=1, keepdims=True)) / 2)
    share_TC /= share_TC.sum(axis=1, keepdims=True)
    for c in range(2):
        mass = share_TC[:, c].sum()
        batch_mean = share_TC[:, c] @ x_TD / mass
        within = share_TC[:, c] @ (x_TD - batch_mean) ** 2
        between = (batch_mean - mean_CD[c]) ** 2 * 0.99 * count_C[c] * mass / (0.99 * count_C[c] + mass)
        assert fit.statistics.count_LMC[0, 0, c].item() == pytest.approx(0.99 * count_C[c] + mass, rel=1e-5)
        found = fit.statistics.square_LMCD[0, 0, c].numpy()
        assert found == pytest.approx(0.99 * square_CD[c] + within + between, rel=1e-4)
        assert fit.statistics.sum_LMCD[0, 0, c].numpy() == pytest.approx(0.99 * sum_CD[c] + mass * batch_mean, abs=1e-3)


def test_a_modality_that_comes_late_is_started_late(olmoe: MoeModel) -> None:
    fit = make_fit("gmm2")
    fit.attach(olmoe)
    text_only = small_batch(1) | {"is_text_BS": torch.ones(2, 29, dtype=torch.bool)}
    run_passes(olmoe, text_only, estimators=[fit])
    assert fit.statistics.missing_modalities() == ["vision"]
    run_passes(olmoe, small_batch(2), estimators=[fit])
    fit.detach()
    assert fit.statistics.missing_modalities() == []
    assert (fit.statistics.count_LMC.sum(-1)[0] - torch.tensor([51 * 0.99 + 19, 32.0])).abs().max() < 1e-4
    assert torch.isfinite(fit.statistics.square_LMCD).all()


def test_scores_without_one_modality_are_refused(olmoe: MoeModel) -> None:
    fit = make_fit("gaussian")
    fit.attach(olmoe)
    run_passes(olmoe, small_batch(1) | {"is_text_BS": torch.ones(2, 29, dtype=torch.bool)}, estimators=[fit])
    fit.detach()
    with pytest.raises(InputError, match="hold no vision tokens; fit them on prompts that have both images and text"):
        GaussianScore(fit.statistics).attach(olmoe)


def test_padding_may_hold_anything(olmoe: MoeModel) -> None:
    """NaN in the vectors of padding reaches neither statistics nor scores."""
    is_token_BS = torch.tensor([[False, True, True]])
    forward_pass = ForwardPass(
        phase=Phase.PREFILL, step=0, is_text_BS=torch.tensor([[True, True, False]]), is_token_BS=is_token_BS,
        is_key_BP=is_token_BS,
    )  # fmt: skip
    x_TD = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    x_TD[0] = float("nan")
    fit = make_fit("gmm2")
    fit.attach(olmoe)
    fit.start_pass(forward_pass)
    for layer in range(2):
        fit._take(layer, x_TD)
    fit.detach()
    assert torch.isfinite(fit.statistics.square_LMCD).all()
    score = GaussianScore(fitted(olmoe))
    score.attach(olmoe)
    score.start_pass(forward_pass)
    for layer in range(2):
        score._take(layer, x_TD)
    scores = score.scores_BSL()
    score.detach()
    assert torch.isfinite(scores).all()
    assert scores[0, 0].tolist() == [1, 1]


# --- names and files -------------------------------------------------------------------------------------------------


def test_statistics_come_back_from_their_file(olmoe: MoeModel, tmp_path: Path) -> None:
    statistics = fitted(olmoe, "gmm2")
    save_statistics(statistics, tmp_path / "fit.safetensors")
    back = load_statistics(tmp_path / "fit.safetensors")
    assert (back.model, back.beta, back.tau_factor, back.num_components) == (statistics.model, 0.99, 0.5, 2)
    for name in ("count_LMC", "sum_LMCD", "square_LMCD"):
        assert torch.equal(getattr(back, name), getattr(statistics, name))
    score = GaussianScore(back)
    score.attach(olmoe)
    score.detach()
    with pytest.raises(OutputError):
        save_statistics(statistics, tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "other weights"),
        ({"num_moe_layers": 3}, r"layer_ids \(0, 1\) instead of \(0, 1, 2\)"),
    ],
)
def test_statistics_of_another_model_are_refused(olmoe: MoeModel, change: dict[str, int], words: str) -> None:
    with pytest.raises(InputError, match=rf"of another model than small olmoe: {words}; fit them on this model"):
        GaussianScore(fitted(olmoe)).attach(small_model("olmoe", **change))
    with pytest.raises(InputError, match="name 'small olmoe' instead of 'small mixtral'"):
        GaussianScore(fitted(olmoe)).attach(small_model("mixtral"))


def test_the_same_model_in_bfloat16_keeps_its_statistics(olmoe: MoeModel) -> None:
    score = GaussianScore(fitted(olmoe))
    score.attach(small_model("olmoe", dtype=torch.bfloat16))
    score.detach()


def test_bad_statistics_files_are_one_clear_line(olmoe: MoeModel, tmp_path: Path) -> None:
    path = tmp_path / "fit.safetensors"
    with pytest.raises(InputError, match=r"fit\.safetensors: .* cannot be read: there is no such file"):
        load_statistics(path)
    save_statistics(fitted(olmoe), path)
    whole, tensors = path.read_bytes(), load_file(path)
    about = {"format_version": 1, "beta": 0.99, "tau_factor": 0.5, "mock": False}
    about["model"] = {"name": "m", "layer_ids": [0, 1], "hidden_size": 64, "checksum": 1}  # type: ignore[assignment]
    cases: list[tuple[dict[str, torch.Tensor], dict[str, object] | None, str]] = [
        (tensors, None, "these are not Gaussian statistics"),
        (tensors, about | {"format_version": 9}, "format version 9 is not 1"),
        (tensors, about | {"beta": "x"}, "are damaged"),
        (tensors, about | {"beta": 2.0}, "beta or tau_factor"),
        (tensors, about | {"tau_factor": float("inf")}, "beta or tau_factor"),
        ({name: tensor[:, :, :0].contiguous() for name, tensor in tensors.items()}, about, "count_LMC holds values"),
        ({"count_LMC": tensors["count_LMC"]}, about, "are damaged"),
        (tensors | {"sum_LMCD": tensors["sum_LMCD"][..., 1:].contiguous()}, about, r"sum_LMCD is .* and must be"),
        (tensors | {"count_LMC": -tensors["count_LMC"]}, about, "count_LMC holds values that cannot be"),
        (tensors | {"square_LMCD": tensors["square_LMCD"] * float("nan")}, about, "square_LMCD holds values"),
    ]
    for content, metadata, words in cases:
        save_file(content, path, metadata={METADATA_KEY: json.dumps(metadata)} if metadata else None)
        with pytest.raises(InputError, match=words) as error:
            load_statistics(path)
        assert "\n" not in str(error.value)
    for damaged in (whole[: len(whole) // 2], b"", b"hello"):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="cannot be read"):
            load_statistics(path)


def test_scores_by_name(olmoe: MoeModel) -> None:
    assert SCORE_NAMES == ("attention", "gaussian", "gmm2", "gmm4")
    statistics = GaussianStatistics.empty(FITTED, num_components=2)
    assert make_score("attention").name == "attention"
    assert make_score("gmm2", statistics).name == "gmm2"
    assert make_fit("gmm4").name == "gmm4"
    for make, words in (
        (lambda: make_score("hard"), '"hard" is not a modality score; write one of attention, gaussian, gmm2, gmm4'),
        (lambda: make_score("gmm2"), 'the score "gmm2" needs statistics of both modalities'),
        (lambda: make_score("gaussian", statistics), "needs statistics with 1 Gaussians per modality, these have 2"),
        (lambda: make_score("attention", statistics), "takes no statistics"),
        (lambda: make_fit("attention"), '"attention" is not a score that is fitted'),
        (lambda: make_fit("gaussian", beta=1.5), "beta: 1.5 must be above 0 and at most 1"),
        (lambda: make_fit("gaussian", tau_factor=0.0), "tau_factor: 0.0 must be above 0"),
    ):
        with pytest.raises(InputError, match=words):
            make()
