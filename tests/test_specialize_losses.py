"""Losses that specialise experts, and their bins: hand-worked numbers, loops in float64, gradients, invariants."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor

from epsim.errors import InputError
from epsim.specialize.balance import bin_load_balance, load_balance
from epsim.specialize.bins import ExpertBins, is_of_modality
from epsim.specialize.distribution import normalised, safe_log, symmetric_kl
from epsim.specialize.information import inter_bin_divergence, inter_bin_information
from epsim.specialize.routed import RoutedPass
from epsim.specialize.smar import modality_routing_distance, smar_loss
from epsim.trace import specialization
from tests.reference import specialize_reference as reference

torch.set_num_threads(1)
LAYERS, SAMPLES, COLUMNS, EXPERTS, TOPK, BINS = 3, 4, 9, 12, 3, 4
BAND = (5.0, 6.0)
Loss = Callable[[RoutedPass, Tensor, Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "information": inter_bin_information,
    "divergence": inter_bin_divergence,
    "balance": lambda routed, *_: load_balance(routed),
    "bin_balance": lambda routed, experts_LNC, *_: bin_load_balance(routed, experts_LNC),
    "smar_below": lambda routed, *_: smar_loss(modality_routing_distance(routed), *BAND),
    "smar_above": lambda routed, *_: smar_loss(modality_routing_distance(routed), 0.0, 0.01),
}


def routed_by_hand(gates: list[list[float]], picks: list[list[int]], is_text: list[bool]) -> RoutedPass:
    """Return a pass of one layer and one sample, float64; the last column is padding that would change any result."""
    num_experts, topk = len(gates[0]), len(picks[0])
    gates = [*gates, [0.0] * (num_experts - 1) + [1.0]]
    return RoutedPass(
        gate_LBSE=torch.tensor([[gates]], dtype=torch.float64),
        picks_LBSK=torch.tensor([[[*picks, list(range(num_experts - topk, num_experts))]]]),
        is_text_BS=torch.tensor([[*is_text, True]]),
        is_token_BS=torch.tensor([[True] * len(is_text) + [False]]),
    )


def random_logits(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Logits whose bins lean to a modality, [L, B, S, E]."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((LAYERS, SAMPLES, COLUMNS, EXPERTS), generator=generator, dtype=torch.float64)
    logits[:, :, ::2, : EXPERTS // 2] += 1.0
    return logits.to(dtype)


def routed_from(logits: Tensor, seed: int) -> RoutedPass:
    """Even columns are vision, sample 1 is text alone, and what is padding is drawn (columns 4 and 5 are not)."""
    generator = torch.Generator().manual_seed(seed + 1)
    num_samples, num_columns = logits.shape[1:3]
    is_text_BS = (torch.arange(num_columns) % 2 == 1).repeat(num_samples, 1)
    is_text_BS[1] = True
    is_token_BS = torch.rand((num_samples, num_columns), generator=generator) < 0.8
    is_token_BS[:, 4:6] = True
    gate_LBSE = logits.softmax(dim=-1)
    return RoutedPass(
        gate_LBSE=gate_LBSE,
        picks_LBSK=logits.topk(TOPK, dim=-1).indices,
        is_text_BS=is_text_BS,
        is_token_BS=is_token_BS,
    )


def others_of(routed: RoutedPass, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return bins, drawn for each layer, soft scores, and the samples with both modalities."""
    generator = torch.Generator().manual_seed(seed + 2)
    num_layers, num_samples, num_columns, num_experts = routed.gate_LBSE.shape
    order = torch.stack([torch.randperm(num_experts, generator=generator) for _ in range(num_layers)])
    drawn = torch.rand((num_layers, num_samples, num_columns), generator=generator)
    score_LBS = 0.6 * routed.is_text_BS + 0.4 * drawn
    score_LBS[:, 1] = 1.0
    return order.view(num_layers, BINS, -1), score_LBS, is_of_modality(routed).any(dim=2).all(dim=0)


def case(seed: int, dtype: torch.dtype = torch.float64) -> tuple[RoutedPass, Tensor, Tensor, Tensor]:
    routed = routed_from(random_logits(seed, dtype), seed)
    return routed, *others_of(routed, seed)


def in_numpy(routed: RoutedPass) -> reference.Routing:
    return reference.Routing(
        routed.gate_LBSE.detach().double().numpy(),
        routed.picks_LBSK.numpy(),
        routed.is_text_BS.numpy(),
        routed.is_token_BS.numpy(),
    )


# Hand-worked: one number per equation.

TWO_BINS = torch.tensor([[[0, 1], [2, 3]]])
TEXT_AND_IMAGE = routed_by_hand([[0.5, 0.3, 0.1, 0.1], [0.1, 0.1, 0.2, 0.6]], [[0, 1], [3, 2]], [True, False])
ONE_SAMPLE = torch.tensor([True])


def test_information_by_hand() -> None:
    """Eq. 12: text (.8/2, .2/2) = (.4, .1), vision (.1, .4). Eq. 13: they add up to 1; all marginals are 1/2.

    Eq. 14: 2 (.4 log(.4/.25) + .1 log(.1/.25)) = .8 log 1.6 + .2 log .4 = .376003 - .183258 = .192745.
    """
    score = TEXT_AND_IMAGE.is_text_BS.float()[None]
    assert inter_bin_information(TEXT_AND_IMAGE, TWO_BINS, score, ONE_SAMPLE).item() == pytest.approx(
        -0.192745, abs=1e-6
    )


def test_information_of_soft_scores_by_hand() -> None:
    """Scores .75 and .25. Eq. 12: text (.75 .8 + .25 .2)/2 = .325 and .175, vision the other way round.

    Eq. 14: 2 (.325 log 1.3 + .175 log .7) = .65 * .262364 - .35 * .356675 = .045701.
    """
    score = torch.tensor([[[0.75, 0.25, 1.0]]])
    assert inter_bin_information(TEXT_AND_IMAGE, TWO_BINS, score, ONE_SAMPLE).item() == pytest.approx(
        -0.045701, abs=1e-6
    )


def test_divergence_by_hand() -> None:
    """P(B | text) = (.8, .2), P(B | vision) = (.2, .8): half of twice .6 log 4 = .831777, but for smoothing."""
    score = TEXT_AND_IMAGE.is_text_BS.float()[None]
    found = inter_bin_divergence(TEXT_AND_IMAGE, TWO_BINS, score, ONE_SAMPLE).item()
    assert found == pytest.approx(-0.831777, rel=1e-5)


def test_load_balance_by_hand() -> None:
    """Eq. 1: both tokens go to expert 0: f = (1, 0); P_0 = (.7 + .6)/2 = .65; 2 * .65 = 1.3."""
    routed = routed_by_hand([[0.7, 0.3], [0.6, 0.4]], [[0], [0]], [True, False])
    assert load_balance(routed).item() == pytest.approx(1.3, abs=1e-12)


def test_bin_load_balance_by_hand() -> None:
    """Eq. 16. Bin 0: tokens 0 and 1, f = (1, .5), P = (.45, .2): 2 (.45 + .1) = 1.1.

    Bin 1: tokens 1 and 2, f = (1, .5), P = (.35, .25): 2 (.35 + .125) = .95. Together 2.05.
    """
    gates = [[0.4, 0.3, 0.2, 0.1], [0.5, 0.1, 0.3, 0.1], [0.1, 0.1, 0.4, 0.4]]
    routed = routed_by_hand(gates, [[0, 1], [0, 2], [2, 3]], [True, False, True])
    assert bin_load_balance(routed, TWO_BINS).item() == pytest.approx(2.05, abs=1e-12)


def test_a_bin_without_tokens_gives_nothing() -> None:
    """As above with the first token alone, f = (1, 1), P = (.4, .3): 2 * .7 = 1.4, and bin 1 nothing."""
    routed = routed_by_hand([[0.4, 0.3, 0.2, 0.1]], [[0, 1]], [True])
    assert bin_load_balance(routed, TWO_BINS).item() == pytest.approx(1.4, abs=1e-12)


SMAR_BY_HAND = routed_by_hand(
    [[0.6, 0.2, 0.2], [0.2, 0.2, 0.6], [0.1, 0.45, 0.45], [0.4, 0.4, 0.2]],
    [[0, 1], [2, 0], [1, 2], [0, 1]],
    [True, True, False, False],
)


def test_routing_distance_by_hand() -> None:
    """Eq. 5: weights (.75, .25, 0), (.25, 0, .75) of text and (0, .5, .5), (.5, .5, 0) of vision.

    Eq. 6 and 7: F_t = (2, 1, 1)/4, R_t = (1, .25, .75)/2, F_v = (1, 2, 1)/4, R_v = (.5, 1, .5)/2.
    Eq. 8: Q_t ~ (2, .25, .75), so (2/3, 1/12, 1/4); Q_v ~ (.5, 2, .5), so (1/6, 2/3, 1/6).
    Eq. 10 to 12: (1/2 log 4 + 7/12 log 8 + 1/12 log 1.5)/2 = (.693147 + 1.213008 + .033789)/2 = .969972.
    """
    assert modality_routing_distance(SMAR_BY_HAND).tolist() == pytest.approx([0.969972], rel=1e-5)


def test_band_by_hand() -> None:
    """Eq. 13: .5 under the band, in it, .3 above: .8. The slopes are -1, 0 and 1."""
    distance_L = torch.tensor([1.0, 1.7, 2.3], dtype=torch.float64, requires_grad=True)
    loss = smar_loss(distance_L, 1.5, 2.0)
    assert loss.item() == pytest.approx(0.8, abs=1e-12)
    assert torch.autograd.grad(loss, distance_L)[0].tolist() == [-1, 0, 1]


def bins_by_hand(adaptive: bool) -> ExpertBins:
    """Two steps: text to 0, text to 0, vision to 1; then text to 1, vision to 0, vision to 3. Expert 2 gets nothing."""
    bins = ExpertBins(1, 4, 2, decay=0.5, adaptive=adaptive, device="cpu")
    gates = [[0.25] * 4] * 3
    bins.update(routed_by_hand(gates, [[0], [0], [1]], [True, True, False]))
    bins.update(routed_by_hand(gates, [[1], [0], [3]], [True, False, False]))
    return bins


def test_bins_by_hand() -> None:
    """Eq. 10, decay 1/2: text (.5, .5, 0, 0), vision (.5, .25, 0, .5). Eq. 11: (.5, 2/3, none: .5, 0)."""
    bins = bins_by_hand(adaptive=True)
    assert bins.state_dict()["mean_picks_LME"].tolist() == [[[0.5, 0.5, 0, 0], [0.5, 0.25, 0, 0.5]]]
    assert bins.text_bias_LE.tolist() == [[0.5, pytest.approx(2 / 3, abs=1e-15), 0.5, 0.0]]
    assert bins.experts_LNC.tolist() == [[[3, 0], [2, 1]]]
    assert bins.experts_LNC.dtype == torch.int64


def test_fixed_bins_keep_the_order_of_experts() -> None:
    assert bins_by_hand(adaptive=False).experts_LNC.tolist() == [[[0, 1], [2, 3]]]


def test_count_picks_by_hand() -> None:
    """Text: 0 and 1, 2 and 0. Vision: 1 and 2, 0 and 1. Padding does not count."""
    assert SMAR_BY_HAND.num_picks_LME.tolist() == [[[2, 1, 1], [1, 2, 1]]]


# Against loops in float64.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", [0, 10, 20])
def test_losses_equal_the_loops(seed: int, dtype: torch.dtype) -> None:
    routed, experts_LNC, score_LBS, counts_B = case(seed, dtype)
    slow, bins = in_numpy(routed), experts_LNC.numpy()
    scored = slow, bins, score_LBS.double().numpy(), counts_B.numpy()
    distances = [reference.routing_distance(slow, layer) for layer in range(LAYERS)]
    wanted = {
        "information": reference.information_loss(*scored),
        "divergence": reference.divergence_loss(*scored),
        "balance": reference.balance_loss(slow),
        "bin_balance": reference.bin_balance_loss(slow, bins),
        "smar_below": reference.band_loss(distances, *BAND),
        "smar_above": reference.band_loss(distances, 0.0, 0.01),
    }
    found = {name: loss(routed, experts_LNC, score_LBS, counts_B) for name, loss in LOSSES.items()}
    assert 0 < counts_B.sum() < SAMPLES  # a sample of text alone is among them
    assert not routed.is_token_BS.all()
    assert {loss.dtype for loss in found.values()} == {dtype}
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert {name: loss.item() for name, loss in found.items()} == pytest.approx(wanted, rel=tolerance)
    assert modality_routing_distance(routed).tolist() == pytest.approx(distances, rel=tolerance)


def test_bins_equal_the_loops() -> None:
    passes = [case(seed)[0] for seed in (0, 10, 20, 30)]
    bins = ExpertBins(LAYERS, EXPERTS, BINS, decay=0.9, adaptive=True, device="cpu")
    for routed in passes:
        bins.update(routed)
    assert bins.experts_LNC.tolist() == reference.bins_after([in_numpy(routed) for routed in passes], BINS, 0.9)


def test_count_picks_equals_the_loops() -> None:
    routed = case(0)[0]
    slow = in_numpy(routed)
    wanted = [
        [[reference.picks(slow, layer, modality, expert) for expert in range(EXPERTS)] for modality in (0, 1)]
        for layer in range(LAYERS)
    ]
    assert routed.num_picks_LME.tolist() == wanted
    assert routed.num_picks_LME.dtype == torch.int64


@pytest.mark.parametrize("seed", [0, 10])
def test_distance_is_that_of_a_trace(seed: int) -> None:
    """The functions that `epsim trace stats` runs, on the same counts and weights."""
    routed = case(seed)[0]
    slow = in_numpy(routed)
    load_MLE = routed.num_picks_LME.transpose(0, 1).numpy()
    mass_MLE = np.zeros(load_MLE.shape)
    for modality, layer, expert in np.ndindex(mass_MLE.shape):
        mass_MLE[modality, layer, expert] = sum(
            reference.weight(slow, layer, token, expert) for token in slow.tokens(modality)
        )
    text_LE, vision_LE = specialization.modality_routing_distribution(load_MLE, mass_MLE)
    wanted = specialization.symmetric_kl(specialization.smoothed(text_LE), specialization.smoothed(vision_LE))
    assert modality_routing_distance(routed).tolist() == pytest.approx(wanted.tolist(), rel=1e-12)


# Gradients.


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name: str) -> None:
    """Finite differences in float64, through a softmax; the picks stay as they are."""
    logits = random_logits(3)[:2, :3, 2:7].clone().requires_grad_()
    routed = routed_from(logits.detach(), 3)
    others = others_of(routed, 3)

    def loss(logits: Tensor) -> Tensor:
        return LOSSES[name](replace(routed, gate_LBSE=logits.softmax(dim=-1)), *others)

    assert loss(logits).abs() > 0.01
    assert torch.autograd.gradcheck(loss, (logits,), atol=1e-7)


def masked(logits: Tensor) -> Tensor:
    """Mask expert 1 for all, the first half for text, and the second for vision."""
    logits = logits.clone()
    logits[..., 1] = -math.inf
    logits[:, :, 1::2, : EXPERTS // 2] = -math.inf
    logits[:, :, ::2, EXPERTS // 2 :] = -1e9
    return logits


def text_alone(routed: RoutedPass) -> RoutedPass:
    return replace(routed, is_text_BS=torch.ones_like(routed.is_text_BS))


def vision_alone(routed: RoutedPass) -> RoutedPass:
    return replace(routed, is_text_BS=torch.zeros_like(routed.is_text_BS))


def padding_alone(routed: RoutedPass) -> RoutedPass:
    return replace(routed, is_token_BS=torch.zeros_like(routed.is_token_BS))


def unchanged(routed: RoutedPass) -> RoutedPass:
    return routed


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("change", [unchanged, text_alone, vision_alone, padding_alone])
def test_no_nan_where_something_is_missing(name: str, change: Callable[[RoutedPass], RoutedPass]) -> None:
    logits = random_logits(0, torch.float32).requires_grad_()
    routed = change(routed_from(masked(logits), 0))
    experts_LNC, _, counts_B = others_of(routed, 0)
    score_LBS = routed.is_text_BS.float().repeat(LAYERS, 1, 1)
    loss = LOSSES[name](routed, experts_LNC, score_LBS, counts_B)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    if change is not unchanged and "balance" not in name:
        assert loss.item() == 0
        assert not gradient.any()
    elif change is unchanged:
        assert loss.item() != 0


@pytest.mark.parametrize("change", [text_alone, vision_alone, padding_alone])
def test_distance_without_a_modality_is_nan(change: Callable[[RoutedPass], RoutedPass]) -> None:
    assert modality_routing_distance(change(case(0)[0])).isnan().all()


def test_a_layer_without_distance_leaves_the_others_their_loss() -> None:
    distance_L = torch.tensor([math.nan, 1.0], requires_grad=True)
    loss = smar_loss(distance_L, 1.5, 2.0)
    assert loss.item() == 0.5
    assert torch.autograd.grad(loss, distance_L)[0].tolist() == [0, -1]


def test_logarithm_of_nothing() -> None:
    value = torch.tensor([0.0, 1e-45, 1.0, math.e], requires_grad=True)
    log = safe_log(value)
    assert log.tolist() == pytest.approx([0, 0, 0, 1])
    assert torch.autograd.grad(log.sum(), value)[0].tolist() == pytest.approx([0, 0, 1, 1 / math.e])


# Invariants.


@pytest.mark.parametrize("seed", range(5))
def test_information_is_between_0_and_log_2(seed: int) -> None:
    routed, experts_LNC, score_LBS, counts_B = case(seed)
    assert -LAYERS * math.log(2) < inter_bin_information(routed, experts_LNC, score_LBS, counts_B) < 0


def test_information_of_separate_modalities_is_log_2() -> None:
    routed = routed_by_hand([[0.7, 0.3, 0, 0], [0, 0, 0.5, 0.5]], [[0, 1], [2, 3]], [True, False])
    score = routed.is_text_BS.float()[None]
    assert inter_bin_information(routed, TWO_BINS, score, ONE_SAMPLE).item() == pytest.approx(-math.log(2), rel=1e-12)


@pytest.mark.parametrize("name", ["information", "divergence"])
def test_nothing_is_known_where_gates_ignore_the_modality(name: str) -> None:
    routed, *others = case(0)
    routed = replace(routed, gate_LBSE=routed.gate_LBSE[:, :, :1].expand_as(routed.gate_LBSE))
    assert LOSSES[name](routed, *others).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ["information", "divergence", "bin_balance"])
def test_the_order_of_bins_and_in_them_changes_nothing(name: str) -> None:
    routed, experts_LNC, *others = case(0)
    wanted = LOSSES[name](routed, experts_LNC, *others).item()
    assert LOSSES[name](routed, experts_LNC.flip(1, 2), *others).item() == pytest.approx(wanted, rel=1e-12)
    moved = experts_LNC.flatten(1).roll(1, dims=1).view_as(experts_LNC)
    assert LOSSES[name](routed, moved, *others).item() != pytest.approx(wanted, rel=1e-3)


def test_balance_of_equal_gates_is_topk() -> None:
    routed = routed_from(torch.zeros((LAYERS, SAMPLES, COLUMNS, EXPERTS), dtype=torch.float64), 0)
    assert load_balance(routed).item() == pytest.approx(LAYERS * TOPK, rel=1e-12)


def test_one_bin_balances_as_without_bins() -> None:
    routed, experts_LNC, *_ = case(0)
    found = bin_load_balance(routed, experts_LNC.reshape(LAYERS, 1, EXPERTS))
    assert found.item() == pytest.approx(load_balance(routed).item(), rel=1e-12)


def test_no_loss_in_the_band() -> None:
    distance_L = modality_routing_distance(case(0)[0])
    loss = smar_loss(distance_L, distance_L.min().item(), distance_L.max().item())
    assert loss.item() == 0


@pytest.mark.parametrize("name", LOSSES)
def test_padding_is_not_seen(name: str) -> None:
    routed, experts_LNC, score_LBS, counts_B = case(0, torch.float32)
    padding_BS = ~routed.is_token_BS
    other = replace(
        routed,
        gate_LBSE=torch.where(padding_BS[..., None], 1 / EXPERTS, routed.gate_LBSE),
        picks_LBSK=torch.where(padding_BS[..., None], torch.arange(TOPK), routed.picks_LBSK),
        is_text_BS=routed.is_text_BS ^ padding_BS,
    )
    other_score_LBS = torch.where(padding_BS, 0.5, score_LBS)
    wanted = LOSSES[name](routed, experts_LNC, score_LBS, counts_B)
    assert torch.equal(LOSSES[name](other, experts_LNC, other_score_LBS, counts_B), wanted)


def test_samples_that_do_not_count_are_left_out() -> None:
    routed, experts_LNC, score_LBS, counts_B = case(0)
    kept = RoutedPass(
        gate_LBSE=routed.gate_LBSE[:, counts_B],
        picks_LBSK=routed.picks_LBSK[:, counts_B],
        is_text_BS=routed.is_text_BS[counts_B],
        is_token_BS=routed.is_token_BS[counts_B],
    )
    for loss in (inter_bin_information, inter_bin_divergence):
        alone = loss(kept, experts_LNC, score_LBS[:, counts_B], torch.ones(len(kept.is_text_BS), dtype=torch.bool))
        assert loss(routed, experts_LNC, score_LBS, counts_B).item() == pytest.approx(alone.item(), rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_changes_nothing(name: str) -> None:
    arguments = case(0, torch.float32)
    wanted = LOSSES[name](*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(LOSSES[name](*arguments), wanted)


def test_no_step_waits_for_the_device() -> None:
    """Meta tensors have shapes and no values: an `.item()` or an index by a mask would raise."""
    routed, *others = (
        RoutedPass(**{name: value.to("meta") for name, value in vars(part).items()})
        if isinstance(part, RoutedPass)
        else part.to("meta")
        for part in case(0, torch.float32)
    )
    bins = ExpertBins(LAYERS, EXPERTS, BINS, decay=0.9, adaptive=True, device="meta")
    bins.update(routed)
    assert bins.experts_LNC.shape == others[0].shape
    assert all(loss(routed, *others).shape == () for loss in LOSSES.values())


def test_distribution_helpers() -> None:
    """Zeros stay; (1, 0) and (0, 1) are log((1 + 1e-6)/1e-6) / 1.000002 = 13.8155 apart, not infinitely far."""
    assert normalised(torch.tensor([[1.0, 3.0], [0.0, 0.0]])).tolist() == [[0.25, 0.75], [0, 0]]
    far = symmetric_kl(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    assert far.item() == pytest.approx(13.8155, abs=1e-4)


# The state of the bins.


def test_bins_start_in_the_order_of_experts() -> None:
    bins = ExpertBins(2, 6, 3, decay=0.99, adaptive=True, device="cpu")
    assert bins.experts_LNC.tolist() == [[[0, 1], [2, 3], [4, 5]]] * 2


def test_bins_go_on_to_the_bit() -> None:
    passes = [case(seed)[0] for seed in (0, 10, 20)]
    first, second = (ExpertBins(LAYERS, EXPERTS, BINS, decay=0.97, adaptive=True, device="cpu") for _ in range(2))
    for routed in passes[:2]:
        first.update(routed)
    saved = first.state_dict()
    first.update(passes[2])
    second.load_state_dict(saved)
    second.update(passes[2])
    assert torch.equal(first.text_bias_LE, second.text_bias_LE)
    assert torch.equal(first.experts_LNC, second.experts_LNC)


@pytest.mark.parametrize(("num_bins", "mend"), [(5, "write e.g. 4"), (0, "write e.g. 1"), (99, "write e.g. 12")])
def test_bins_must_divide_the_experts(num_bins: int, mend: str) -> None:
    with pytest.raises(InputError, match=rf"^method\.num_bins: {num_bins} must divide .* 12 experts.*{mend}$"):
        ExpertBins(1, 12, num_bins, decay=0.99, adaptive=True, device="cpu")


def test_state_of_another_model_is_refused() -> None:
    bins = ExpertBins(1, 4, 2, decay=0.99, adaptive=True, device="cpu")
    other = ExpertBins(1, 8, 2, decay=0.99, adaptive=True, device="cpu")
    with pytest.raises(InputError, match=r"shape \[1, 2, 8\], this model needs \[1, 2, 4\]; resume with the model"):
        bins.load_state_dict(other.state_dict())
    with pytest.raises(InputError, match="mean_picks_LME is missing; resume from"):
        bins.load_state_dict({})
