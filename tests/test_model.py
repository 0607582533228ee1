"""Model cards: presets against published parameter counts, hand-worked bytes and FLOPs, and bad specs."""

from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from epsim.errors import ScenarioError
from epsim.model import GroupedQueryAttention, LatentAttention, ModelCard, Moe
from epsim.scenario.model import ModelSpec

DENSE = ("olmo-1b", "llama-3.2-3b", "llava-1.5-7b", "llava-next-34b")
PRESETS = ("olmoe", "deepseekmoe", "moonlight", "qwen3-moe", "mixtral", *DENSE)


def load_values(preset: str) -> dict[str, Any]:
    text = (files("epsim") / f"presets/models/{preset}.yaml").read_text(encoding="utf-8")
    values: dict[str, Any] = yaml.safe_load(text)
    return values


def load_card(preset: str) -> ModelCard:
    return ModelCard.from_mapping(ModelSpec.model_validate(load_values(preset)).model_dump())


@pytest.fixture(scope="module")
def cards() -> dict[str, ModelCard]:
    return {preset: load_card(preset) for preset in PRESETS}


# Total: elements of the safetensors on the Hugging Face hub.
# Active: Qwen3 model card "3.3B activated" (3,353,032,704 counted from its config); DeepSeekMoE report 2.8B
# (2,828,650,496 counted); OLMoE "1B active" (1.3B in its report); Mixtral announcement 12.9B.
# Dense VLMs: the language backbone alone.
PUBLISHED_PARAMS = {
    "olmoe": (6_919_161_856, 1.3e9),
    "deepseekmoe": (16_375_728_128, 2_828_650_496),
    "moonlight": (15_960_111_936, None),
    "qwen3-moe": (30_532_122_624, 3_353_032_704),
    "mixtral": (46_702_792_704, 12.9e9),
    "olmo-1b": (1_176_764_416, 1_176_764_416),
    "llama-3.2-3b": (3_212_749_824, 3_212_749_824),
    "llava-1.5-7b": (6_738_415_616, 6_738_415_616),
    "llava-next-34b": (34_388_917_248, 34_388_917_248),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_params_match_the_published_checkpoint(cards: dict[str, ModelCard], preset: str) -> None:
    card = cards[preset]
    total, active = PUBLISHED_PARAMS[preset]
    # What a card leaves out (norms, the correction bias) is at most 1e-4 of the model; OLMo-1B has neither.
    assert 0 <= total - card.num_params < 1e-4 * total
    if active is not None:
        assert card.num_active_params == pytest.approx(active, rel=0.03)


def test_olmoe_lacks_exactly_its_norms(cards: dict[str, ModelCard]) -> None:
    # 16 layers * (2 layer norms + q norm + k norm) * 2048 + final norm 2048 = 133,120.
    assert 6_919_161_856 - cards["olmoe"].num_params == 16 * 4 * 2048 + 2048


def test_dense_backbones_lack_exactly_their_norms(cards: dict[str, ModelCard]) -> None:
    # Two norms a layer and a last one, as wide as the hidden vector; OLMo-1B's have no weights.
    assert cards["olmo-1b"].num_params == 1_176_764_416
    assert 3_212_749_824 - cards["llama-3.2-3b"].num_params == (2 * 28 + 1) * 3072
    assert 6_738_415_616 - cards["llava-1.5-7b"].num_params == (2 * 32 + 1) * 4096
    assert 34_388_917_248 - cards["llava-next-34b"].num_params == (2 * 60 + 1) * 7168


# Backbone, encoder and projector together. LLaVA-1.5: elements of llava-hf/llava-1.5-7b-hf. LLaVA-NeXT: the eight
# files of PerRing/llava-v1.6-34b-hf, 9.98 + 9.75 + 9.94 + 9.91 + 9.75 + 9.75 + 9.51 + 0.918 GB, at 2 bytes each.
PUBLISHED_VLM_PARAMS = {"llava-1.5-7b": 7_063_427_072, "llava-next-34b": 34.754e9}


@pytest.mark.parametrize("preset", PUBLISHED_VLM_PARAMS)
def test_whole_vlm_matches_the_published_checkpoint(cards: dict[str, ModelCard], preset: str) -> None:
    vision = cards[preset].vision
    assert vision is not None
    whole = cards[preset].num_params + vision.num_params
    # Left out: norms and biases of the encoder, and the tokens that conversion added to the vocabulary.
    assert whole == pytest.approx(PUBLISHED_VLM_PARAMS[preset], rel=1e-3)
    docs = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    assert f"`{preset}` {whole / 1e9:.2f} ({PUBLISHED_VLM_PARAMS[preset] / 1e9:.2f} published)" in docs


def test_moonlight_matches_its_model_card_without_embeddings(cards: dict[str, ModelCard]) -> None:
    # Moonlight's README: 15.29B total, 2.24B activated, both without the embedding parameters.
    card = cards["moonlight"]
    embeddings = 2 * 163_840 * 2048
    assert card.num_params - embeddings == pytest.approx(15.29e9, rel=1e-3)
    assert card.num_active_params - embeddings == pytest.approx(2.24e9, rel=2e-3)


@pytest.mark.parametrize(
    ("preset", "kv_bytes"),
    [
        ("olmoe", 8192),  # MHA: key and value * 16 heads * 128 * 2 bytes
        ("llava-1.5-7b", 16_384),  # MHA: 2 * 32 * 128 * 2
        ("qwen3-moe", 2048),  # GQA: 2 * 4 * 128 * 2
        ("mixtral", 4096),  # GQA: 2 * 8 * 128 * 2
        ("moonlight", 1152),  # MLA: (512 latent + 64 rotary) * 2
    ],
)
def test_kv_bytes_per_token_and_layer(cards: dict[str, ModelCard], preset: str, kv_bytes: float) -> None:
    assert cards[preset].kv_bytes_per_token == kv_bytes


@pytest.mark.parametrize(
    ("preset", "layer_ids"),
    [
        ("olmoe", tuple(range(16))),
        ("deepseekmoe", tuple(range(1, 28))),  # first_k_dense_replace 1
        ("moonlight", tuple(range(1, 27))),
        ("llava-1.5-7b", ()),
    ],
)
def test_moe_layer_ids_are_the_real_ones(cards: dict[str, ModelCard], preset: str, layer_ids: tuple[int, ...]) -> None:
    assert cards[preset].moe_layer_ids == layer_ids
    assert cards[preset].num_dense_layers + len(layer_ids) == cards[preset].num_layers


def test_deepseekmoe_ffn_by_hand(cards: dict[str, ModelCard]) -> None:
    card = cards["deepseekmoe"]
    assert card.expert_bytes == 3 * 2048 * 1408 * 2 == 17_301_504
    assert card.expert_flops_per_token == 2 * 3 * 2048 * 1408
    # Two shared experts as wide as a routed one.
    assert card.shared_expert_bytes == 2 * 17_301_504
    assert card.shared_expert_flops_per_token == 2 * card.expert_flops_per_token
    assert card.dense_ffn_bytes == 3 * 2048 * 10_944 * 2
    assert card.router_bytes == 64 * 2048 * 2
    assert card.lm_head_bytes == card.embedding_bytes == 102_400 * 2048 * 2
    assert card.hidden_bytes_per_token == 4096


def test_attention_by_hand(cards: dict[str, ModelCard]) -> None:
    # Qwen3: q and output 2048 x 4096 each, k and v 2048 x 512 each.
    assert cards["qwen3-moe"].attention_bytes == (2 * 2048 * 4096 + 2 * 2048 * 512) * 2
    # 32 heads * (128 + 128) * 2 FLOPs.
    assert cards["qwen3-moe"].attention_flops_per_pair == 16_384
    # Moonlight: q 2048 x 16*192, kv down 2048 x 576, kv up 512 x 16*256, output 16*128 x 2048.
    weights = 2048 * 3072 + 2048 * 576 + 512 * 4096 + 2048 * 2048
    assert cards["moonlight"].attention_projection_flops_per_token == 2 * weights
    assert cards["moonlight"].attention_flops_per_pair == 2 * 16 * (192 + 128)
    assert cards["moonlight"].decode_attention_flops_per_pair == 2 * 16 * (576 + 512)


def test_query_rank_splits_the_projection() -> None:
    shapes = {
        "num_heads": 2,
        "kv_lora_rank": 4,
        "qk_nope_head_dim": 3,
        "qk_rope_head_dim": 1,
        "v_head_dim": 3,
    }
    direct, ranked = LatentAttention(**shapes), LatentAttention(**shapes, q_lora_rank=5)
    # Query 10 x 8 in one step; 10 x 5 and 5 x 8 in two.
    assert ranked.num_params(10) - direct.num_params(10) == (50 + 40) - 80


def test_dense_model_has_no_experts(cards: dict[str, ModelCard]) -> None:
    card = cards["llava-next-34b"]
    assert (card.num_experts, card.topk, card.expert_bytes, card.router_bytes) == (0, 0, 0, 0)
    assert card.dense_ffn_flops_per_token == 2 * 3 * 7168 * 20_480
    assert card.num_params == card.num_active_params


def num_weights_per_token(card: ModelCard) -> float:
    """Active parameters without an embedding table of its own, of which a token reads one row."""
    return card.num_active_params - card.embedding_bytes / card.weight_dtype_bytes


def test_olmo_is_olmoe_with_eight_experts_fused(cards: dict[str, ModelCard]) -> None:
    dense, moe = cards["olmo-1b"], cards["olmoe"]
    assert dense.attention == moe.attention
    assert dense.vision == moe.vision
    assert dense.dense_ffn_bytes == 8 * moe.expert_bytes
    # What a token passes in OLMoE and not in OLMo-1B: 16 routers of 64 x 2048.
    assert num_weights_per_token(moe) - num_weights_per_token(dense) == 16 * 64 * 2048
    # OLMo-1B-0724 has a second table of 50,304 x 2048.
    assert replace(dense, tie_embeddings=False).num_params == 1_279_787_008


def test_llama_is_chosen_over_qwen25_for_qwen3(cards: dict[str, ModelCard]) -> None:
    # Qwen/Qwen2.5-3B config.json; published 3,085,938,688 with 73 norms of 2048 and 36 biases of 2048 + 2 * 256.
    moe, llama = cards["qwen3-moe"], cards["llama-3.2-3b"]
    attention = GroupedQueryAttention(num_heads=16, num_kv_heads=2, head_dim=128)
    qwen25 = replace(moe, num_layers=36, attention=attention, moe=None, dense_ffn_size=11_008, tie_embeddings=True)
    assert 3_085_938_688 - qwen25.num_params == 73 * 2048 + 36 * (2048 + 2 * 256)
    # Active: 3.353 against 3.213 and 3.086; KV bytes per token: 98,304 against 114,688 and 36,864.
    assert qwen25.num_params < llama.num_params < moe.num_active_params
    assert qwen25.num_params / moe.num_active_params == pytest.approx(0.920, abs=5e-4)
    kv_bytes = [card.num_layers * card.kv_bytes_per_token for card in (moe, llama, qwen25)]
    assert kv_bytes == [98_304, 114_688, 36_864]


def test_clip_encoder_against_open_clip(cards: dict[str, ModelCard]) -> None:
    # open_clip's docs/model_profile.csv, ViT-L-14-336: image tower 304.29 M parameters, 381.92 GFLOPs.
    vision = cards["olmoe"].vision
    assert vision is not None
    assert vision.tokens_per_image == 576
    assert vision.encoder_num_params == pytest.approx(304.29e6, rel=0.005)  # biases and norms are left out
    assert vision.encoder_flops_per_image == pytest.approx(381.92e9, rel=1e-4)
    # Projector: 576 tokens through 1024 x 2048 and 2048 x 2048.
    assert vision.flops_per_image - vision.encoder_flops_per_image == 2 * 576 * (1024 + 2048) * 2048


def test_internvit_tile_is_256_tokens(cards: dict[str, ModelCard]) -> None:
    vision = cards["mixtral"].vision
    assert vision is not None
    assert vision.tokens_per_image == 256  # (448 / 14 / 2)^2
    # The shuffle makes tokens of 4 * 1024; projector 4096 x 4096 twice.
    assert vision.num_params - vision.encoder_num_params == 2 * 4096 * 4096
    assert vision.encoder_num_params == pytest.approx(304e6, rel=0.005)


@pytest.mark.parametrize("preset", PRESETS)
def test_dtypes_scale_bytes_and_nothing_else(cards: dict[str, ModelCard], preset: str) -> None:
    card = cards[preset]
    fp8 = ModelCard.from_mapping(
        ModelSpec.model_validate({**load_values(preset), "weight_dtype_bytes": 1}).model_dump()
    )
    for name in ("expert_bytes", "shared_expert_bytes", "attention_bytes", "router_bytes", "lm_head_bytes"):
        assert getattr(fp8, name) == getattr(card, name) / 2
    assert fp8.vision is not None
    assert card.vision is not None
    assert fp8.vision.weight_bytes == card.vision.weight_bytes / 2
    assert fp8.kv_bytes_per_token == card.kv_bytes_per_token
    assert fp8.num_params == card.num_params
    assert replace(card, kv_dtype_bytes=1.0).kv_bytes_per_token == card.kv_bytes_per_token / 2


def test_shards_by_hand() -> None:
    # Hidden 4: attention 2*4*2*(4+2) = 96, a quarter with its own copy of a key-value head 2*4*2*(1+1) = 32.
    attention = GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=2)
    moe = Moe(num_experts=4, topk=2, expert_ffn_size=8, num_dense_layers=1, num_shared_experts=2)
    card = ModelCard(
        name="x", hidden_size=4, num_layers=2, vocab_size=12, attention=attention, dense_ffn_size=16, moe=moe
    )
    quarter = card.shard(4)
    assert (card.attention_bytes, quarter.attention_bytes) == (192, 64)
    # Two of two key-value heads are 2*2*2 elements a token, one is 4.
    assert (card.kv_bytes_per_token, quarter.kv_bytes_per_token) == (16, 8)
    assert (card.expert_bytes, quarter.expert_bytes) == (3 * 4 * 8 * 2, 3 * 4 * 2 * 2)
    assert quarter.shared_expert_bytes == card.shared_expert_bytes / 4 == 2 * 3 * 4 * 2 * 2
    assert quarter.dense_ffn_bytes == card.dense_ffn_bytes / 4 == 3 * 4 * 4 * 2
    assert quarter.lm_head_bytes == card.lm_head_bytes / 4 == 3 * 4 * 2
    assert quarter.router_bytes == card.router_bytes
    assert card.shard(1) == card


def test_a_latent_and_its_projections_are_on_every_shard(cards: dict[str, ModelCard]) -> None:
    # Moonlight: 16 heads, latent 512 + 64; query 3072 -> 1536 of 8 heads, kv up 4096 -> 2048, output 2048 -> 1024.
    whole, half = cards["moonlight"], cards["moonlight"].shard(2)
    assert half.kv_bytes_per_token == whole.kv_bytes_per_token
    copied = whole.hidden_size * 576
    assert half.attention.num_params(2048) - copied == (whole.attention.num_params(2048) - copied) / 2


@pytest.mark.parametrize(
    ("preset", "size", "field"),
    [("olmoe", 3, "attention.num_heads 16"), ("qwen3-moe", 3, "vocab_size 151936"), ("qwen3-moe", 4, None)],
)
def test_what_does_not_divide_is_said(cards: dict[str, ModelCard], preset: str, size: int, field: str | None) -> None:
    card = cards[preset]
    assert card.uneven(size) == field
    if field:
        with pytest.raises(ValueError, match=f"{card.name}: 3 devices cannot share {field} evenly"):
            card.shard(size)


def test_key_value_heads_are_shared_or_copied_evenly() -> None:
    # 12 query heads divide by 6 and by 4; 4 key-value heads do not divide by 6, nor 6 by 4.
    attention = GroupedQueryAttention(num_heads=12, num_kv_heads=4, head_dim=2)
    card = ModelCard(name="x", hidden_size=4, num_layers=1, vocab_size=12, attention=attention, dense_ffn_size=12)
    assert card.uneven(6) == "attention.num_kv_heads 4"
    assert [n for n in range(1, 13) if not card.uneven(n)] == [1, 2, 4, 12]


def test_tied_embeddings_count_once(cards: dict[str, ModelCard]) -> None:
    card = cards["olmoe"]
    tied = replace(card, tie_embeddings=True)
    assert tied.embedding_bytes == 0
    assert tied.lm_head_bytes == card.lm_head_bytes
    assert card.num_params - tied.num_params == 50_304 * 2048


GQA = {"kind": "gqa", "num_heads": 32, "num_kv_heads": 4, "head_dim": 128}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": {**GQA, "num_kv_heads": 5}}, "num_heads 32 is not a multiple of num_kv_heads 5"),
        ({"attention": {**GQA, "kind": "mqa"}}, "kind"),
        ({"attention": {**GQA, "kv_lora_rank": 512}}, "attention.gqa.kv_lora_rank"),
        ({"moe": {"num_experts": 4, "topk": 5, "expert_ffn_size": 8}}, "topk 5 is more than num_experts 4"),
        (
            {"moe": {"num_experts": 4, "topk": 2, "expert_ffn_size": 8, "shared_expert_ffn_size": 8}},
            "shared_expert_ffn_size 8 without shared experts",
        ),
        (
            {"moe": {"num_experts": 4, "topk": 2, "expert_ffn_size": 8, "num_dense_layers": 48}},
            "num_dense_layers 48 leaves no MoE layer of 48",
        ),
        (
            {"moe": {"num_experts": 4, "topk": 2, "expert_ffn_size": 8, "num_dense_layers": 1}},
            "dense_ffn_size is missing, but 1 layers are dense",
        ),
        ({"moe": None}, "dense_ffn_size is missing, but 48 layers are dense"),
        ({"dense_ffn_size": 6144}, "dense_ffn_size 6144, but no layer is dense"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": "2048"}, "hidden_size"),
        ({"weight_dtype_bytes": 0}, "weight_dtype_bytes"),
        ({"num_hidden_layers": 48}, "num_hidden_layers"),
    ],
)
def test_bad_specs_say_what_is_wrong(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as error:
        ModelSpec.model_validate({**load_values("qwen3-moe"), **change})
    assert message in str(error.value)


def test_bad_vision_spec_says_what_is_wrong() -> None:
    values = load_values("mixtral")
    values["vision"]["image_size"] = 450
    with pytest.raises(ValidationError, match="image_size 450 is not a multiple of patch_size 14"):
        ModelSpec.model_validate(values)


def test_card_refuses_contradictions(cards: dict[str, ModelCard]) -> None:
    card = cards["deepseekmoe"]
    with pytest.raises(ScenarioError, match=r"model\.dense_ffn_size: None with 1 dense layers"):
        replace(card, dense_ffn_size=None)
    with pytest.raises(ScenarioError, match=r"model\.vision\.output_size: 2048 .* write 4096"):
        replace(card, hidden_size=4096)
    with pytest.raises(ScenarioError, match=r"model\.num_layers: 0 is not positive"):
        replace(card, num_layers=0)
    with pytest.raises(ScenarioError, match=r"num_dense_layers: 1 leaves no MoE layer of 1"):
        replace(card, num_layers=1)
    with pytest.raises(ScenarioError, match=r"model\.moe\.topk: 3 is more than num_experts 2"):
        Moe(num_experts=2, topk=3, expert_ffn_size=8)
    with pytest.raises(ScenarioError, match=r"num_kv_heads: 3 does not divide num_heads 4"):
        GroupedQueryAttention(num_heads=4, num_kv_heads=3, head_dim=8)


def test_mapping_with_unknown_attention(cards: dict[str, ModelCard]) -> None:
    with pytest.raises(ScenarioError, match=r'model\.attention\.kind: "mqa" .* write one of mha, gqa, mla'):
        ModelCard.from_mapping({**load_values("olmoe"), "attention": {**GQA, "kind": "mqa"}})


def test_mapping_needs_no_spec(cards: dict[str, ModelCard]) -> None:
    assert ModelCard.from_mapping(load_values("moonlight")) == cards["moonlight"]


def table_row(preset: str, card: ModelCard) -> str:
    vision = card.vision
    assert vision is not None
    cells = (
        f"`{preset}`",
        str(card.num_layers),
        str(len(card.moe_layer_ids)),
        f"{card.num_experts} / {card.topk}" if card.moe else "–",
        f"{card.num_params / 1e9:.2f} / {card.num_active_params / 1e9:.2f}",
        f"{card.expert_bytes / 1e6:.1f}" if card.moe else "–",
        f"{card.attention.kind.upper()}",
        f"{card.kv_bytes_per_token:.0f}",
        str(vision.tokens_per_image),
        f"{vision.flops_per_image / 1e9:.0f}",
    )
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("preset", PRESETS)
def test_docs_table_comes_from_the_code(cards: dict[str, ModelCard], preset: str) -> None:
    docs = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    assert table_row(preset, cards[preset]) in docs


# Dense card, the MoE card that it stands beside, and the size that the two share.
COUNTERPARTS = (
    ("llava-1.5-7b", "olmoe", "total"),
    ("olmo-1b", "olmoe", "active"),
    ("llava-next-34b", "qwen3-moe", "total"),
    ("llama-3.2-3b", "qwen3-moe", "active"),
)


@pytest.mark.parametrize(("dense_name", "moe_name", "size"), COUNTERPARTS)
def test_docs_table_of_dense_models(cards: dict[str, ModelCard], dense_name: str, moe_name: str, size: str) -> None:
    dense, moe = cards[dense_name], cards[moe_name]
    published, _ = PUBLISHED_PARAMS[dense_name]
    assert dense.num_params == pytest.approx(published, rel=0.01)
    matched = moe.num_params if size == "total" else moe.num_active_params
    kv_kb, moe_kv_kb = (card.num_layers * card.kv_bytes_per_token / 1e3 for card in (dense, moe))
    cells = (
        f"`{dense_name}`",
        f"{dense.num_params / 1e9:.3f}",
        f"{published / 1e9:.3f}",
        f"`{moe_name}`, {size}",
        f"{matched / 1e9:.3f}",
        f"{100 * (dense.num_params / matched - 1):+.1f} %",
        f"{num_weights_per_token(dense) / 1e9:.3f} / {num_weights_per_token(moe) / 1e9:.3f}",
        f"{kv_kb:.1f} / {moe_kv_kb:.1f}",
    )
    docs = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    assert f"| {' | '.join(cells)} |" in docs


def test_docs_example_card_is_valid() -> None:
    docs = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    example = docs.split("```yaml\n")[1].split("```")[0]
    card = ModelCard.from_mapping(ModelSpec.model_validate(yaml.safe_load(example)).model_dump())
    assert card.moe_layer_ids == (1, 2, 3)
