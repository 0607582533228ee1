"""The decoder of real runs beside a naive one in float64; experts on several ranks; the cache; what it refuses."""

import os
from dataclasses import replace

import numpy as np
import pytest
from reference.decoder_reference import Reference, Request

torch = pytest.importorskip("torch")

from epsim.errors import InputError  # noqa: E402
from epsim.measure.decoder import AttentionBatch, Decoder, KvCache  # noqa: E402
from epsim.measure.feed_forward import RoutedExperts  # noqa: E402
from epsim.measure.weights import Weights  # noqa: E402
from epsim.model import GroupedQueryAttention, LatentAttention, ModelCard, Moe, VisionEncoder  # noqa: E402

DEVICE = torch.device(os.environ.get("EPSIM_TEST_DEVICE", "cpu"))
CPU = torch.device("cpu")
ATTENTIONS = {
    "mha": GroupedQueryAttention(num_heads=4, num_kv_heads=4, head_dim=8),
    "gqa": GroupedQueryAttention(num_heads=6, num_kv_heads=2, head_dim=8),
    "mla": LatentAttention(num_heads=3, kv_lora_rank=10, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6),
    "mla in two steps": LatentAttention(
        num_heads=3, kv_lora_rank=10, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, q_lora_rank=12
    ),
}
VISION = VisionEncoder(
    name="tiny", image_size=12, patch_size=3, hidden_size=128, ffn_size=24, num_layers=2, output_size=32,
    pixel_shuffle_factor=2,
)  # fmt: skip


def make_card(attention: str = "gqa", **fields: object) -> ModelCard:
    moe = Moe(num_experts=8, topk=3, expert_ffn_size=16)
    card = ModelCard(name="tiny", hidden_size=32, num_layers=2, vocab_size=50, attention=ATTENTIONS[attention], moe=moe)
    return replace(card, **fields)


DENSE_AND_SHARED = {
    "num_layers": 4,
    "dense_ffn_size": 20,
    "moe": Moe(num_experts=8, topk=3, expert_ffn_size=16, num_dense_layers=2, num_shared_experts=2),
}


def make_decoder(card: ModelCard, experts_LX: np.ndarray | None = None, seed: int = 7) -> Decoder:
    if experts_LX is None:
        experts_LX = np.tile(np.arange(card.num_experts, dtype=np.int32), (len(card.moe_layer_ids), 1))
    return Decoder(card, experts_LX=experts_LX, seed=seed, device=CPU, dtype=torch.float32)


def step(decoder: Decoder, cache: KvCache, hidden_TH: torch.Tensor, batch: AttentionBatch, experts_TLK: np.ndarray):  # type: ignore[no-untyped-def]
    """Run a step of one process that has all experts; slot = logical expert."""
    topk = experts_TLK.shape[2]
    for layer in range(decoder.num_layers):
        hidden_TH = decoder.attend(layer, hidden_TH, batch, cache)
        ids_TK = torch.from_numpy(experts_TLK[:, layer])
        normed_TH, weights_TK = decoder.route(layer, hidden_TH, ids_TK)
        vector_N = torch.arange(len(hidden_TH)).repeat_interleave(topk)
        shuffled = torch.randperm(len(vector_N), generator=torch.Generator().manual_seed(layer))
        routed = (part[shuffled] for part in (vector_N, ids_TK.reshape(-1), weights_TK.reshape(-1)))
        hidden_TH = hidden_TH + decoder.experts(layer, normed_TH, *routed)
        shared_TH = decoder.shared(layer, normed_TH)
        hidden_TH = hidden_TH if shared_TH is None else hidden_TH + shared_TH
    return hidden_TH


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("more", [{}, DENSE_AND_SHARED, {"vision": VISION}, {"tie_embeddings": True}], ids=str)
@torch.inference_mode()
def test_prefill_and_decode_equal_the_naive_forward_pass(attention: str, more: dict[str, object]) -> None:
    """Three requests in rows 1, 2 and 4 of the cache, of 6, 9 and 5 tokens, the last two of each decoded."""
    card = make_card(attention, **more)
    decoder, reference = make_decoder(card), Reference(card, seed=7)
    rng = np.random.default_rng(0)
    lengths, rows = (6, 9, 5), (1, 2, 4)
    tokens = [rng.integers(0, 200, length) for length in lengths]
    shape = (len(card.moe_layer_ids), card.topk)
    experts = [np.argsort(rng.random((n, shape[0], 8)), axis=2)[..., : shape[1]] for n in lengths]
    vision = [np.zeros((0, 32))] * 3
    if card.vision is not None:
        given = decoder.vision(2).double().numpy().reshape(2, 4, 32)
        for image in range(2):
            np.testing.assert_allclose(given[image], reference.vision(image, num_heads=2), atol=1e-5)
        vision[1] = given[1]
    cache = KvCache(card, num_requests=5, max_tokens=9, device=CPU, dtype=torch.float32)
    want = [
        reference.forward(Request(token_ids=tokens[q].tolist(), experts_SLK=experts[q], vision=vision[q]))
        for q in range(3)
    ]

    def run(spans: list[slice], decode: bool) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = [np.arange(20)[span] for span in spans]
        batch = AttentionBatch(
            request_T=torch.tensor(np.repeat(rows, [len(part) for part in numbers])),
            position_T=torch.tensor(np.concatenate(numbers)),
            decode=decode,
        )
        hidden = [decoder.embed(torch.from_numpy(tokens[q][span])) for q, span in enumerate(spans)]
        if not decode:
            hidden[1][: len(vision[1])] = torch.from_numpy(vision[1]).float()
        chosen = np.concatenate([experts[q][span] for q, span in enumerate(spans)])
        out = step(decoder, cache, torch.cat(hidden), batch, chosen)
        wanted = np.concatenate([want[q][0][span] for q, span in enumerate(spans)])
        np.testing.assert_allclose(out.numpy(), wanted, atol=1e-5, rtol=1e-5)
        tokens_out = [token for q, span in enumerate(spans) for token in want[q][1][span]]
        assert decoder.head(out).tolist() == tokens_out

    run([slice(0, length - 2) for length in lengths], decode=False)
    for back in (2, 1):
        run([slice(length - back, length - back + 1) for length in lengths], decode=True)


@torch.inference_mode()
def test_activations_neither_vanish_nor_explode() -> None:
    card = make_card(num_layers=24)
    cache = KvCache(card, num_requests=1, max_tokens=64, device=CPU, dtype=torch.float32)
    positions = torch.arange(64)
    batch = AttentionBatch(request_T=torch.zeros(64, dtype=torch.int64), position_T=positions, decode=False)
    decoder = make_decoder(card)
    hidden = step(decoder, cache, decoder.embed(positions), batch, np.tile(np.arange(3), (64, 24, 1)))
    assert 0.5 < float(hidden.std()) < 10  # 24 layers that each add about 1 to the variance: about 5


def pairs_of(num_vectors: int, topk: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    expert_TK = np.argsort(rng.random((num_vectors, 8)), axis=1)[:, :topk]
    weight_N = torch.from_numpy(rng.random(num_vectors * topk).astype(np.float32))
    return torch.arange(num_vectors).repeat_interleave(topk), torch.from_numpy(expert_TK.reshape(-1)), weight_N


@torch.inference_mode()
def test_two_ranks_with_half_of_the_slots_each_add_up_to_the_whole() -> None:
    """Rank 0 has the even experts (one of its slots empty, one expert in reverse order), rank 1 the odd ones."""
    card = make_card()
    held = [np.array([[6, 4, -1, 2, 0]] * 2, dtype=np.int32), np.array([[1, 3, 5, 7]] * 2, dtype=np.int32)]
    vectors_VH = torch.randn(10, 32, generator=torch.Generator().manual_seed(1))
    vector_N, expert_N, weight_N = pairs_of(10, 3)
    for layer in range(2):
        whole = make_decoder(card).experts(layer, vectors_VH, vector_N, expert_N, weight_N)
        parts = []
        for experts_LX in held:
            slot_of = {int(e): slot for slot, e in enumerate(experts_LX[layer]) if e >= 0}
            mine = torch.tensor([int(e) in slot_of for e in expert_N])
            slot_N = torch.tensor([slot_of[int(e)] for e in expert_N[mine]])
            rank = make_decoder(card, experts_LX)
            parts.append(rank.experts(layer, vectors_VH, vector_N[mine], slot_N, weight_N[mine]))
        torch.testing.assert_close(parts[0] + parts[1], whole, atol=1e-5, rtol=1e-5)
        assert all(float(part.abs().max()) > 0.1 for part in parts)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@torch.inference_mode()
def test_grouped_products_equal_the_loop_over_slots(dtype: torch.dtype, tolerance: float) -> None:
    weights = Weights(seed=3, device=DEVICE, dtype=dtype)
    experts = RoutedExperts(weights, 0, np.arange(8), 32, 16)
    vectors_VH = torch.randn(10, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    vector_N, slot_N, weight_N = (part.to(DEVICE) for part in pairs_of(10, 3))
    order_N = slot_N.argsort(stable=True)
    given = vectors_VH, vector_N[order_N], weight_N[order_N, None].to(dtype), torch.bincount(slot_N, minlength=8)
    torch.testing.assert_close(experts.all_at_once(*given), experts.one_by_one(*given), atol=tolerance, rtol=tolerance)


@torch.inference_mode()
def test_nothing_to_do_works() -> None:
    card = make_card(vision=VISION)
    decoder, none = make_decoder(card), torch.zeros(0, dtype=torch.int64)
    cache = KvCache(card, num_requests=1, max_tokens=4, device=CPU, dtype=torch.float32)
    for decode in (True, False):
        batch = AttentionBatch(request_T=none, position_T=none, decode=decode)
        hidden = decoder.attend(0, decoder.embed(none), batch, cache)
        assert hidden.shape == (0, 32)
    normed, weights = decoder.route(0, hidden, none.reshape(0, 3))
    assert decoder.experts(0, normed, none, none, weights.reshape(-1)).shape == (0, 32)
    assert decoder.experts(0, torch.ones(2, 32), none, none, torch.zeros(0)).tolist() == torch.zeros(2, 32).tolist()
    assert decoder.head(hidden).shape == (0,)
    assert decoder.vision(0).shape == (0, 32)


@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_cached_rows_arrive_on_another_rank(attention: str) -> None:
    """Rows of two requests, of 3 and 2 tokens; layer 0 stands for the two dense layers as well."""
    card = make_card(attention, **DENSE_AND_SHARED)
    per_token = int(card.kv_bytes_per_token / card.kv_dtype_bytes)
    ours, theirs = (KvCache(card, num_requests=3, max_tokens=4, device=CPU, dtype=torch.float32) for _ in range(2))
    batch = AttentionBatch(
        request_T=torch.tensor([0, 0, 0, 2, 2]), position_T=torch.tensor([0, 1, 2, 0, 1]), decode=False
    )
    for decoder_layer in range(4):
        numbers = torch.arange(5 * per_token).reshape(5, per_token) + 1000.0 * decoder_layer
        ours.append(decoder_layer, batch, numbers)
    for layer, layers in ((0, 3), (1, 1)):
        flat = ours.rows(layer, [0, 2], [3, 2])
        assert flat.shape == (layers * 5 * per_token,)
        theirs.load(layer, [0, 2], [3, 2], flat)
        torch.testing.assert_close(theirs.rows(layer, [0, 2], [3, 2]), flat)
    assert ours.rows(1, [2], [2])[0] == 3000.0 + 3 * per_token
    for decoder_layer in range(4):
        torch.testing.assert_close(theirs.read(decoder_layer, batch), ours.read(decoder_layer, batch))
    theirs.reset()
    assert not theirs.rows(0, [0, 2], [3, 2]).any()
    assert ours.rows(0, [], []).shape == (0,)
    with pytest.raises(ValueError, match="elements"):
        theirs.load(0, [0], [3], torch.zeros(5))


def test_weights_follow_from_the_seed() -> None:
    card = make_card()
    ids = torch.arange(4)
    one, same, other = (make_decoder(card, seed=seed).embed(ids) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("request_T", "position_T", "decode", "says"),
    [
        ([0, 1, 0], [0, 0, 1], False, "do not ascend"),
        ([1, 0], [3, 4], True, "do not ascend"),
        ([0, 0], [3, 4], True, "one token of each"),
        ([0, 0], [1, 3], False, "without gaps"),
        ([0, 0], [1], False, "same length"),
    ],
)
def test_a_batch_must_make_sense(request_T: list[int], position_T: list[int], decode: bool, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        AttentionBatch(request_T=torch.tensor(request_T), position_T=torch.tensor(position_T), decode=decode)


def test_models_without_the_part_are_refused() -> None:
    with pytest.raises(InputError, match="no vision encoder"):
        make_decoder(make_card()).vision(1)
    dense = make_card(moe=None, dense_ffn_size=16)
    with pytest.raises(InputError, match="no experts to spread"):
        make_decoder(dense)
    with pytest.raises(ValueError, match="MoE layers"):
        make_decoder(make_card(), np.zeros((3, 1), dtype=np.int32))
    with pytest.raises(ValueError, match=r"outside -1\.\.7"):
        make_decoder(make_card(), np.full((2, 1), 8, dtype=np.int32))
