"""Models to trace: checkpoints and random weights, what is said when they cannot be had, and prompts for them."""

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, errors
from PIL import Image
from reference.small_models import BACKBONE_NAMES, IMAGE_TOKEN_ID, TOKENS_PER_IMAGE, small_batch, small_model
from safetensors.torch import load_file, save_file
from transformers import LlavaProcessor

from epsim.capture.extra import require_trace_extra
from epsim.capture.model import MoeModel
from epsim.capture.models import checkpoint as checkpoint_module
from epsim.capture.models import deepseek, hub, load
from epsim.capture.models.backbones import BACKBONES, backbone_card
from epsim.capture.models.byte_tokenizer import byte_tokenizer
from epsim.capture.models.checkpoint import weight_files
from epsim.capture.models.device import (
    check_memory,
    free_host_bytes,
    quiet,
    resolve_device,
    resolve_dtype,
    weight_bytes,
)
from epsim.capture.models.load import known_name, load_model
from epsim.capture.models.processor import Processor, load_processor
from epsim.capture.models.random_init import draw_weights, random_config
from epsim.capture.models.source import ModelSource
from epsim.errors import CapacityError, InputError

META = torch.device("meta")
TEMPLATE = (
    "{% for m in messages %}USER: {{ m['content'] }}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
# llava-hf/llava-1.5-7b-hf, chat_template.json, without the roles that are not used here
LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def saved(model: MoeModel, folder: Path, *, shard_size: str = "1GB") -> Path:
    """Write a model as transformers does, and return the folder."""
    with quiet():
        model.module.save_pretrained(folder, max_shard_size=shard_size)
    return folder


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(small_model("olmoe", vlm=False, num_experts=12), tmp_path_factory.mktemp("olmoe") / "my-olmoe")


@pytest.fixture
def copy(olmoe: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(olmoe, tmp_path / "model"))


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def refused(source: ModelSource | Path) -> str:
    """Return the one line that a source is refused with."""
    if isinstance(source, Path):
        source = ModelSource(checkpoint=str(source), device="cpu")
    with pytest.raises(InputError) as caught:
        load_model(source)
    message = str(caught.value)
    assert "\n" not in message
    return message


def logits(model: MoeModel) -> torch.Tensor:
    batch = small_batch(vlm=model.is_vlm)
    pixels = {"pixel_values": batch["pixel_values"].to(model.dtype)} if model.is_vlm else {}
    with torch.inference_mode():
        out: torch.Tensor = model.module(
            input_ids=batch["token_ids_BS"], attention_mask=batch["is_token_BS"].long(), **pixels
        ).logits
    return out


# Checkpoints


@pytest.mark.parametrize("vlm", [False, True], ids=["text", "vlm"])
@pytest.mark.parametrize("backbone", BACKBONE_NAMES)
def test_a_saved_model_loads_as_the_same_model(backbone: str, vlm: bool, tmp_path: Path) -> None:
    # 12 experts: sorted as text, expert 10 would come before expert 2.
    model = small_model(backbone, vlm=vlm, num_experts=12)
    loaded = load_model(ModelSource(checkpoint=str(saved(model, tmp_path / "my-model")), device="cpu"))
    assert torch.equal(logits(loaded), logits(model))
    assert (loaded.name, loaded.random_weights, loaded.is_vlm) == ("my-model", False, vlm)
    assert loaded.shape == model.shape
    assert not loaded.module.training
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())
    assert json.loads(json.dumps(loaded.source))["checkpoint"] == "my-model"


def test_a_sharded_model_in_bfloat16_loads_as_the_same_model(tmp_path: Path) -> None:
    model = small_model("moonlight", dtype=torch.bfloat16)
    saved(model, tmp_path, shard_size="200KB")
    assert len(weight_files(tmp_path)) > 3
    loaded = load_model(ModelSource(checkpoint=str(tmp_path), dtype="bfloat16", device="cpu"))
    assert loaded.dtype == torch.bfloat16
    wanted = dict(model.module.named_parameters()) | dict(model.module.named_buffers())
    for name, found in [*loaded.module.named_parameters(), *loaded.module.named_buffers()]:
        assert found.dtype == wanted[name].dtype, name
        assert torch.equal(found, wanted.pop(name)), name
    assert not wanted


def test_the_layout_of_the_hub_loads(tmp_path: Path) -> None:
    """The config.json and the tensor names of deepseek-ai/deepseek-moe-16b-base, written by hand."""
    width, heads, experts, ffn, shared, dense, vocab = 16, 2, 12, 8, 2, 20, 40
    config = {
        "architectures": ["DeepseekForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_deepseek.DeepseekConfig",
            "AutoModel": "modeling_deepseek.DeepseekModel",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
        },
        "aux_loss_alpha": 0.001,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": dense,
        "max_position_embeddings": 4096,
        "model_type": "deepseek",
        "moe_intermediate_size": ffn,
        "moe_layer_freq": 1,
        "n_routed_experts": experts,
        "n_shared_experts": shared,
        "norm_topk_prob": False,
        "num_attention_heads": heads,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 2,
        "num_key_value_heads": heads,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000,
        "scoring_func": "softmax",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0",
        "use_cache": True,
        "vocab_size": vocab,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "modeling_deepseek.py").write_text("raise SystemExit('remote code was run')")
    generator = torch.Generator().manual_seed(3)
    weights: dict[str, torch.Tensor] = {}

    def add(name: str, *shape: int) -> None:
        weights[f"{name}.weight"] = torch.randn(*shape, generator=generator)

    def add_ffn(name: str, size: int) -> None:
        add(f"{name}.gate_proj", size, width)
        add(f"{name}.up_proj", size, width)
        add(f"{name}.down_proj", width, size)

    add("model.embed_tokens", vocab, width)
    add("model.norm", width)
    add("lm_head", vocab, width)
    for layer in ("model.layers.0", "model.layers.1"):
        add(f"{layer}.input_layernorm", width)
        add(f"{layer}.post_attention_layernorm", width)
        for projection in "qkvo":
            add(f"{layer}.self_attn.{projection}_proj", width, width)
    add_ffn("model.layers.0.mlp", dense)
    add("model.layers.1.mlp.gate", experts, width)
    add_ffn("model.layers.1.mlp.shared_experts", ffn * shared)
    for expert in range(experts):
        add_ffn(f"model.layers.1.mlp.experts.{expert}", ffn)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})

    model = load_model(ModelSource(checkpoint=str(tmp_path), device="cpu"))
    assert model.layer_ids == (1,)
    assert torch.equal(model.module.lm_head.weight, weights["lm_head.weight"])
    mlp, seen = model.layers[1].mlp, {}
    mlp.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0][0], y=output[0]))
    with torch.inference_mode():
        model.module(input_ids=torch.arange(8)[None])

    def ffn_of(name: str, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (weights[f"{name}.{part}_proj.weight"].double() for part in ("gate", "up", "down"))
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    # modeling_deepseek.py: softmax over all experts, the 6 largest as they are, plus the shared experts
    for x, y in zip(seen["x"].double(), seen["y"], strict=True):
        probabilities = (weights["model.layers.1.mlp.gate.weight"].double() @ x).softmax(0)
        wanted = ffn_of("model.layers.1.mlp.shared_experts", x)
        for expert in sorted(range(experts), key=lambda e: -float(probabilities[e]))[:6]:
            wanted = wanted + probabilities[expert] * ffn_of(f"model.layers.1.mlp.experts.{expert}", x)
        torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("norm_topk_prob", True, "only False can be run"),
        ("moe_layer_freq", 2, "only 1 can be run"),
        ("scoring_func", "sigmoid", "only 'softmax' can be run"),
        ("topk_method", "group_limited_greedy", "only 'greedy' can be run"),
        ("n_shared_experts", None, "write 1 or more"),
        ("num_experts_per_tok", 0, "write 1 or more"),
    ],
)
def test_what_deepseekmoe_cannot_express_is_refused(field: str, value: Any, said: str, tmp_path: Path) -> None:
    saved(small_model("deepseekmoe", vlm=False), tmp_path)
    edit_config(tmp_path, **{field: value})
    message = refused(tmp_path)
    assert f"config.json: {field}: {value!r}" in message
    assert said in message


def test_moonlight_loads_natively_although_it_brings_code(tmp_path: Path) -> None:
    saved(small_model("moonlight", vlm=False), tmp_path)
    (tmp_path / "modeling_deepseek.py").write_text("raise SystemExit('remote code was run')")
    auto_map = {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
    }
    edit_config(
        tmp_path, auto_map=auto_map, moe_layer_freq=1, ep_size=1, scoring_func="sigmoid", topk_method="noaux_tc"
    )
    model = load_model(ModelSource(checkpoint=str(tmp_path), device="cpu"))
    assert type(model.module).__name__ == "DeepseekV3ForCausalLM"
    assert type(model.module).__module__.startswith("transformers.")


def test_a_checkpoint_in_the_shapes_of_a_card_has_its_name() -> None:
    deepseek.register()
    for backbone in BACKBONES:
        for config in (random_config(backbone), random_config(backbone, text_only=True)):
            assert known_name(config) == backbone_card(backbone).name
        assert known_name(random_config(backbone, reduced=True)) is None
    config = random_config("olmoe", text_only=True)
    config.num_experts = 32
    assert known_name(config) is None


def test_the_source_of_a_checkpoint_tells_when_it_changed(olmoe: Path, copy: Path) -> None:
    def source_of(folder: Path) -> dict[str, Any]:
        source = dict(load_model(ModelSource(checkpoint=str(folder), device="cpu")).source)
        assert source.pop("checkpoint") == folder.name
        return source

    first = source_of(olmoe)
    assert source_of(copy) == first
    edit_config(copy, rms_norm_eps=1e-4)
    changed = source_of(copy)
    assert [key for key in first if first[key] != changed[key]] == ["config_sha256"]
    edit_weights(copy, lambda weights: weights["lm_head.weight"].neg_())  # another model, files of the same size
    assert source_of(copy)["weights_sha256"] != first["weights_sha256"]


# What a checkpoint can lack


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    assert "there is no such folder" in refused(tmp_path / "nowhere")
    assert "like owner/model" in refused(ModelSource(checkpoint="olmoe-1b"))
    assert "has no config.json" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "is not JSON" in refused(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "is not a JSON object" in refused(tmp_path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "llama"}, 'model_type "llama" has no experts to route to; write a checkpoint of one of olmoe'),
        ({"model_type": "jamba", "num_experts": 16}, 'model_type "jamba" is not an architecture that epsim runs'),
        ({}, "no model_type"),
        ({"model_type": "llava"}, "no text_config.model_type"),
        ({"model_type": "llava", "text_config": {"model_type": "llama"}}, '"llama" has no experts'),
        ({"model_type": "llava", "vision_config": {"model_type": "pixtral"}}, '"pixtral" is not an encoder'),
        ({"model_type": "olmoe", "quantization_config": {"quant_method": "fp8"}}, "is quantised"),
        ({"model_type": "olmoe", "hidden_size": "wide"}, "'hidden_size' expected int"),
    ],
)
def test_configs_that_cannot_be_run(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert said in refused(tmp_path)


def test_a_config_without_any_moe_layer_is_refused(copy: Path, tmp_path: Path) -> None:
    folder = saved(small_model("qwen3-moe", vlm=False), tmp_path / "qwen")
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, mlp_only_layers=list(range(config["num_hidden_layers"])))
    assert "no experts to route to" in refused(folder)


EXPERT = "model.layers.1.mlp.experts.7.up_proj.weight"
GATE = "model.layers.0.mlp.gate.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("lm_head.weight"), "1 missing, e.g. lm_head.weight"),
        (lambda w: w.pop(GATE), f"1 missing, e.g. {GATE}"),
        (lambda w: w.update({"more.weight": torch.zeros(2)}), "1 too many, e.g. more.weight"),
        (lambda w: w.update({GATE: w[GATE][:-1].clone()}), f"{GATE} is [11, 64] and should be [12, 64]"),
        (lambda w: w.pop(EXPERT), f"tensor {EXPERT} is missing"),
        (lambda w: w.update({EXPERT: w[EXPERT][:-1].clone()}), f"{EXPERT} is [31, 64] and those of other experts are"),
        (lambda w: [w.pop(k) for k in list(w) if ".experts.11." in k], "down_proj is [11, 64, 32] and should be [12"),
    ],
    ids=["head", "gate", "unexpected", "gate-shape", "expert", "expert-shape", "last-expert"],
)
def test_weights_that_do_not_match_are_refused(change: Callable[[Any], Any], said: str, copy: Path) -> None:
    edit_weights(copy, change)
    assert said in refused(copy)


def test_weights_of_another_size_are_refused(copy: Path) -> None:
    edit_config(copy, num_hidden_layers=3)
    assert "11 missing, e.g. model.layers.2" in refused(copy)
    edit_config(copy, num_hidden_layers=1)
    assert "11 too many, e.g. model.layers.1" in refused(copy)


def test_files_of_weights_that_are_missing_or_damaged(tmp_path: Path) -> None:
    folder = saved(small_model("olmoe", vlm=False), tmp_path / "sharded", shard_size="200KB")
    first, *others = weight_files(folder)
    whole = first.read_bytes()
    first.write_bytes(whole[:-1])
    assert f"{first}: is damaged or cut off" in refused(folder)
    first.write_bytes(b"")
    assert f"{first}: is damaged or cut off" in refused(folder)
    first.unlink()
    assert f"lacks 1 of {len(others) + 1} files of weights, e.g. {first.name}" in refused(folder)
    (folder / "model.safetensors.index.json").unlink()
    assert "has no model.safetensors or model.safetensors.index.json" in refused(folder)


# The hub, of which nothing is asked here


def hub_error(kind: type[Exception]) -> Exception:
    """Make an error of huggingface_hub without the response that it came from."""
    error = kind.__new__(kind)
    Exception.__init__(error, "it said\n\nso")
    return error


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (errors.RepositoryNotFoundError, "knows no such model"),
        (errors.GatedRepoError, "its licence must be accepted"),
        (errors.RevisionNotFoundError, '--revision "v9": owner/model has no such branch'),
        (errors.HFValidationError, "is neither a folder nor a name"),
        (errors.OfflineModeIsEnabled, "cannot be fetched from huggingface.co"),
        (ConnectionError, "cannot be fetched from huggingface.co"),
    ],
)
def test_what_the_hub_refuses(
    kind: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise hub_error(kind)

    monkeypatch.setattr(HfApi, "model_info", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert said in refused(ModelSource(checkpoint="owner/model", revision="v9", device="cpu"))


def test_of_the_hub_only_what_is_needed_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The files of mistralai/Mixtral-8x7B-v0.1, shortened, which has its weights three times."""
    names = ["README.md", "config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "original/x.json"]
    weights = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    others = ["consolidated.00.pt", "consolidated.safetensors", "pytorch_model.bin", "fp16/model.safetensors"]
    siblings = [SimpleNamespace(rfilename=name) for name in names + weights + others]
    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        if len(asked) > 2:
            raise OSError("No space left\non device")
        return str(tmp_path)

    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: SimpleNamespace(sha="1f", siblings=siblings))
    monkeypatch.setattr(hub, "snapshot_download", download)
    assert hub.fetch("a/b", "v1", hub.DESCRIPTIONS) == hub.fetch("a/b", "1f", hub.WEIGHTS) == tmp_path
    assert asked == [("a/b", {"revision": "1f", "allow_patterns": files}) for files in (names[1:5], weights)]
    with pytest.raises(
        InputError, match=r"a/b: the download broke off; run it again to go on \(No space left on device\)"
    ):
        hub.fetch("a/b", "v1", hub.WEIGHTS)


def test_a_model_of_the_hub_is_described_by_its_commit(olmoe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, tuple[str, ...]]] = []
    commit = olmoe.parent / ("0" * 39 + "1")
    commit.symlink_to(olmoe)

    def fetch(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
        asked.append((name, revision, patterns))
        return commit

    monkeypatch.setattr(hub, "fetch", fetch)
    model = load_model(ModelSource(checkpoint="owner/model", revision="v1", device="cpu"))
    # The description first; then the weights of the same commit.
    assert asked == [("owner/model", "v1", hub.DESCRIPTIONS), ("owner/model", commit.name, hub.WEIGHTS)]
    assert model.name == "model"
    assert (model.source["checkpoint"], model.source["commit"]) == ("owner/model", commit.name)


def test_without_network_a_name_fails_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("it waits to try again"))
    message = refused(ModelSource(checkpoint="owner/model", device="cpu"))
    assert message.startswith("owner/model: cannot be fetched from huggingface.co, and is not in its cache")
    assert capfd.readouterr() == ("", "")


# Random weights


@pytest.mark.parametrize("backbone", BACKBONE_NAMES)
def test_full_size_weighs_what_the_card_says(backbone: str) -> None:
    """Nothing is allocated; what the card leaves out (norms, biases, encoder and projector) is below 1 GB."""
    deepseek.register()
    card = backbone_card(backbone)
    text = weight_bytes(draw_weights(random_config(backbone, text_only=True), torch.bfloat16, META, 0))
    vlm = weight_bytes(draw_weights(random_config(backbone), torch.bfloat16, META, 0))
    assert text == pytest.approx(2 * card.num_params, rel=1e-3)
    # CLIP ViT-L/14-336: 24 layers of 12 D^2, 1024 wide, and patches; projector: 1024 -> D -> D; one more token.
    encoder = 24 * 12 * 1024**2 + 3 * 14 * 14 * 1024 + 577 * 1024
    projector = 1024 * card.hidden_size + card.hidden_size**2
    assert vlm - text == pytest.approx(2 * (encoder + projector + 2 * card.hidden_size), rel=2e-3)


@pytest.mark.parametrize("backbone", BACKBONE_NAMES)
def test_a_reduced_model_has_the_routing_of_the_card(backbone: str) -> None:
    model = load_model(ModelSource(random_init=backbone, reduced=True, text_only=True, device="cpu"))
    card = backbone_card(backbone)
    assert model.layer_ids == card.moe_layer_ids
    assert (model.shape.num_experts, model.shape.topk) == (card.num_experts, card.topk)
    assert (model.name, model.random_weights) == (f"{card.name} reduced", True)
    assert model.source["random_init"] == backbone
    gate = model.layers[-1].mlp.gate.weight
    # logits of a unit-variance input spread as at full width: std 0.02 * sqrt(2048) = 0.905
    assert float(gate.std() * gate.shape[1] ** 0.5) == pytest.approx(0.905, rel=0.05)


def test_the_same_seed_draws_the_same_weights_and_leaves_the_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first, same, other = (
        load_model(ModelSource(random_init="moonlight", reduced=True, seed=seed, device="cpu", dtype="bfloat16"))
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, weight in first.module.state_dict().items():
        assert torch.equal(weight, same.module.state_dict()[name]), name
    assert not torch.equal(first.layers[3].mlp.gate.weight, other.layers[3].mlp.gate.weight)
    assert first.dtype == torch.bfloat16
    assert first.layers[3].mlp.gate.e_score_correction_bias.dtype == torch.float32
    assert not any(p.requires_grad for p in first.module.parameters())


def test_the_image_token_is_one_more_and_is_suppressed() -> None:
    config = random_config("olmoe")
    assert config.image_token_id == 50304
    assert config.text_config.vocab_size == 50305
    model = load_model(ModelSource(random_init="olmoe", reduced=True, device="cpu"))
    assert model.image_token_id == 512
    assert model.suppressed_token_ids == (512,)
    assert model.module.lm_head.weight.shape == model.decoder.get_input_embeddings().weight.shape == (513, 64)
    text = load_model(ModelSource(random_init="olmoe", reduced=True, text_only=True, device="cpu"))
    assert text.suppressed_token_ids == ()
    assert text.module.lm_head.weight.shape == (512, 64)


def test_the_experts_implementation_is_set_in_the_language_model_and_told() -> None:
    source = {"random_init": "deepseekmoe", "reduced": True, "device": "cpu"}
    default = load_model(ModelSource(**source))
    assert default.source["experts_implementation"] == "grouped_mm"
    eager = load_model(ModelSource(**source, experts_implementation="eager"))
    assert eager.layers[1].mlp.experts.config._experts_implementation == "eager"
    assert eager.source["experts_implementation"] == "eager"
    message = refused(ModelSource(**source, experts_implementation="quick"))
    assert 'experts-implementation "quick" is not known; write one of eager, batched_mm' in message


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "name a checkpoint or --random-init"),
        ({"checkpoint": "a/b", "random_init": "olmoe"}, "and not both"),
        ({"checkpoint": " "}, "is no checkpoint"),
        ({"checkpoint": "a/b", "reduced": True}, "--reduced"),
        ({"checkpoint": "a/b", "text_only": True}, "--text-only"),
        ({"random_init": "olmoe", "revision": "v1"}, '--revision "v1"'),
        ({"random_init": "olmoe", "dtype": "int8"}, '--dtype "int8" cannot be run; write one of bfloat16, float16'),
        ({"random_init": "olmoe", "seed": -1}, "--seed -1"),
    ],
)
def test_sources_that_contradict_themselves(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        ModelSource(**fields)
    assert said in str(caught.value)


def test_sources_that_are_not_there(olmoe: Path) -> None:
    assert "write one of olmoe, deepseekmoe" in refused(ModelSource(random_init="gpt-2"))
    assert "leave the revision out" in refused(ModelSource(checkpoint=str(olmoe), revision="v1", device="cpu"))
    assert '--device "tpu" is not known' in refused(ModelSource(random_init="olmoe", device="tpu"))
    assert '--device "mps" is not known' in refused(ModelSource(random_init="olmoe", device="mps"))


def test_devices_and_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match=r'--device "cuda:1": torch .* finds no CUDA device; write --device cpu'):
        resolve_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 1)
    assert resolve_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(InputError, match='"cuda:2": the last CUDA device is cuda:1'):
        resolve_device("cuda:2")
    assert resolve_dtype(None, torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype(None, torch.device("cpu")) == torch.float32
    assert resolve_dtype("float16", torch.device("cpu")) == torch.float16


def test_what_does_not_fit_is_refused_before_it_is_allocated(
    olmoe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """OLMoE VLM in bfloat16: 14.5 GB (see the card); 8 GB are free."""
    monkeypatch.setattr("epsim.capture.models.device.free_host_bytes", lambda: 8 * 10**9)
    drawn: list[torch.device] = []

    def draw(config: Any, dtype: torch.dtype, device: torch.device, seed: int) -> Any:
        drawn.append(device)
        return draw_weights(config, dtype, device, seed)

    monkeypatch.setattr(load, "draw_weights", draw)
    message = refused(ModelSource(random_init="olmoe", dtype="bfloat16", device="cpu"))
    assert message.startswith(
        "OLMoE-1B-7B-0125: needs 14.5 GB for its weights, and cpu has 8.0 GB free; write --reduced"
    )
    assert drawn == [META]
    monkeypatch.setattr("epsim.capture.models.device.free_host_bytes", lambda: 1000)
    assert "a smaller --dtype, or another --device" in refused(olmoe)


def test_free_memory_of_the_host(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  24 kB\nMemAvailable:   3 kB\n")
    assert free_host_bytes(meminfo) == 3072
    assert free_host_bytes(tmp_path / "none") == pytest.approx(free_host_bytes(), rel=0.9)


def test_free_memory_of_cuda_counts_what_the_process_holds_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5 * 10**9, 10 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 3 * 10**9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 10**9)
    cuda = torch.device("cuda", 0)
    check_memory(7 * 10**9, cuda, "model", "less")
    with pytest.raises(
        CapacityError, match=r"model: needs 7.1 GB for its weights, and cuda:0 has 7.0 GB free; write less"
    ):
        check_memory(7_100_000_000, cuda, "model", "less")


def test_memory_that_runs_out_while_loading(olmoe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(checkpoint_module.OlmoeForCausalLM, "from_pretrained", fail)
    assert "does not fit into the memory of cpu" in refused(olmoe)
    monkeypatch.setattr("epsim.capture.models.random_init.AutoModelForCausalLM.from_config", fail)
    monkeypatch.setattr(load, "_needed", lambda *_: 0)
    assert "does not fit into the memory of cpu" in refused(
        ModelSource(random_init="olmoe", text_only=True, device="cpu")
    )


def test_loading_says_nothing(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit_config(copy, torch_dtype="bfloat16", pad_token_id=-5)
    with warnings.catch_warnings(record=True) as caught:
        load_processor(load_model(ModelSource(random_init="mixtral", reduced=True, device="cpu")))
        load_model(ModelSource(checkpoint=str(copy), device="cpu"))
        edit_weights(copy, lambda weights: weights.pop("lm_head.weight"))
        refused(copy)
    assert capfd.readouterr() == ("", "")
    assert not caught


def test_the_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    require_trace_extra()
    monkeypatch.setattr("epsim.capture.extra.find_spec", lambda name: None if name in ("PIL", "sklearn") else object())
    with pytest.raises(InputError, match=r"needs pillow, scikit-learn; install with: pip install 'epsim\[trace\]'"):
        require_trace_extra()


def test_the_source_and_the_extra_load_no_torch() -> None:
    imports = "import epsim.capture.extra, epsim.capture.models.source, epsim.capture.options, sys"
    code = f"{imports}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# Prompts


def picture(mode: str = "RGB", size: tuple[int, int] = (80, 60)) -> Image.Image:
    return Image.linear_gradient("L").resize(size).convert(mode)


@pytest.fixture(scope="module")
def of_bytes() -> Processor:
    return load_processor(small_model("olmoe"))


@pytest.fixture(scope="module")
def vlm_folder(tmp_path_factory: pytest.TempPathFactory, of_bytes: Processor) -> Path:
    folder = saved(small_model("olmoe"), tmp_path_factory.mktemp("vlm"))
    of_bytes.tokenizer.save_pretrained(folder)
    of_bytes.image_processor.save_pretrained(folder)
    return folder


def processor_of(folder: Path) -> Processor:
    return load_processor(load_model(ModelSource(checkpoint=str(folder), device="cpu")))


def test_bytes_are_tokens() -> None:
    tokenizer = byte_tokenizer(512, 500)
    # ä is C3 A4 in UTF-8, ✓ is E2 9C 93
    ids = tokenizer("<image>aä ✓\n\0<eos>")["input_ids"]
    assert ids == [257, 500, 97, 0xC3, 0xA4, 32, 0xE2, 0x9C, 0x93, 10, 0, 258]
    every = bytes(range(256)).decode("latin-1")
    assert tokenizer.decode(tokenizer(every)["input_ids"], skip_special_tokens=True) == every
    assert tokenizer.decode([104, 105, 300, 511]) == "hi<300><511>"
    assert tokenizer.decode(list(range(256)))[:128] == every[:128]
    assert len(tokenizer) == 512


def test_an_image_becomes_as_many_tokens_as_the_model_has_features_of_it(of_bytes: Processor) -> None:
    assert (of_bytes.tokens_per_image, of_bytes.image_token_id) == (TOKENS_PER_IMAGE, IMAGE_TOKEN_ID)
    encoded = of_bytes.encode("hi", [picture(), picture("L", (30, 200))])
    one = [IMAGE_TOKEN_ID] * TOKENS_PER_IMAGE + [10]
    assert encoded.token_ids.dtype == torch.int64
    assert encoded.token_ids.tolist() == [257, *one, *one, 104, 105]
    assert encoded.pixel_values is not None
    assert encoded.pixel_values.shape == (2, 3, 56, 56)
    assert encoded.pixel_values.dtype == torch.float32
    between = of_bytes.encode("a<image>b", [picture("RGBA")]).token_ids.tolist()
    assert between == [257, 97, *[IMAGE_TOKEN_ID] * TOKENS_PER_IMAGE, 98]
    assert of_bytes.encode("hi").pixel_values is None
    assert of_bytes.eos_token_ids == frozenset()


def test_pixels_are_those_of_clip(of_bytes: Processor) -> None:
    """A grey of 51: (51 / 255 - mean) / std, with openai/clip-vit-large-patch14-336's preprocessor_config.json."""
    pixels = of_bytes.encode("x", [Image.new("L", (100, 70), 51)]).pixel_values
    assert pixels is not None
    means, stds = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    for channel, (mean, std) in enumerate(zip(means, stds, strict=True)):
        torch.testing.assert_close(pixels[0, channel], torch.full((56, 56), (0.2 - mean) / std))


@pytest.mark.parametrize("backbone", ["moonlight", "mixtral"])
def test_encoded_prompts_fit_the_model(backbone: str) -> None:
    model = load_model(ModelSource(random_init=backbone, reduced=True, device="cpu"))
    processor = load_processor(model)
    encoded = processor.encode("What is this?", [picture()])
    assert int(encoded.token_ids.eq(512).sum()) == processor.tokens_per_image == 576
    embedded = model.embed(encoded.token_ids[None], encoded.pixel_values)
    features = model.module.get_image_features(pixel_values=encoded.pixel_values).pooler_output[0]
    assert torch.equal(embedded[0, 1:577], features)


def test_prompts_that_do_not_fit_their_images(of_bytes: Processor) -> None:
    with pytest.raises(InputError, match="1 x <image> for 2 images"):
        of_bytes.encode("<image>", [picture(), picture()])
    with pytest.raises(InputError, match="1 x <image> for 0 images"):
        of_bytes.encode("<image>")
    text = load_processor(load_model(ModelSource(random_init="olmoe", reduced=True, text_only=True, device="cpu")))
    assert text.encode("hi").token_ids.tolist() == [257, 104, 105]
    with pytest.raises(InputError, match="1 images for a model that takes text only"):
        text.encode("hi", [picture()])


def test_a_checkpoint_brings_its_own_processor(vlm_folder: Path, of_bytes: Processor) -> None:
    processor = processor_of(vlm_folder)
    assert processor.eos_token_ids == {258}
    reference = LlavaProcessor(
        image_processor=of_bytes.image_processor,
        tokenizer=of_bytes.tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    text, images = "<image>\nOne <image> more?", [picture(), picture(size=(56, 90))]
    wanted = reference(text=text, images=images, return_tensors="pt")
    encoded = processor.encode(text, images)
    assert torch.equal(encoded.token_ids, wanted["input_ids"][0])
    assert encoded.pixel_values is not None
    assert torch.equal(encoded.pixel_values, wanted["pixel_values"])
    assert json.loads(json.dumps(processor.origin))["tokenizer"] == "checkpoint"


@pytest.mark.parametrize("template", [TEMPLATE, LLAVA_TEMPLATE], ids=["plain", "llava"])
def test_the_chat_template_is_applied(template: str, vlm_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(vlm_folder, tmp_path / "chat"))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    image = "<image>" * TOKENS_PER_IMAGE
    chat = processor_of(folder)
    shown = chat.tokenizer.decode(chat.encode("What?", [picture()]).token_ids)
    assert shown == f"<bos>USER: {image}\nWhat? ASSISTANT:"
    raw = processor_of(vlm_folder)
    assert raw.tokenizer.decode(raw.encode("What?", [picture()]).token_ids) == f"<bos>{image}\nWhat?"
    assert (chat.origin["chat_template"], raw.origin["chat_template"]) == (True, False)


def test_a_template_of_a_text_model_writes_its_special_tokens_itself(copy: Path) -> None:
    tokenizer = byte_tokenizer(512, None)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(copy)
    processor = processor_of(copy)
    assert processor.tokenizer.decode(processor.encode("Hm").token_ids) == "USER: Hm ASSISTANT:"
    assert replace(processor, chat_template=None).encode("Hm").token_ids.tolist() == [257, 72, 109]
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    tokenizer.save_pretrained(copy)
    with pytest.raises(InputError, match="chat template does not render it"):
        processor_of(copy).encode("Hm")


def test_processors_that_do_not_fit_their_model(vlm_folder: Path, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no tokenizer; put its tokenizer\.json into the folder"):
        processor_of(copy)
    (copy / "tiktoken.model").write_text("AA== 0\n")
    (copy / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["code.Tokenizer", null]}}')
    with pytest.raises(InputError, match="its tokenizer is code of its own, which is not run"):
        processor_of(copy)
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="its tokenizer cannot be loaded") as caught:
        processor_of(copy)
    assert "\n" not in str(caught.value)
    byte_tokenizer(512, None).save_pretrained(copy)
    edit_config(copy, vocab_size=200)
    edit_weights(
        copy, lambda w: w.update({k: w[k][:200].clone() for k in ("lm_head.weight", "model.embed_tokens.weight")})
    )
    with pytest.raises(InputError, match="the tokenizer gives id 257, and the model embeds 200 ids"):
        processor_of(copy).encode("hi")
    folder = Path(shutil.copytree(vlm_folder, tmp_path / "vlm"))
    edit_config(folder, image_token_index=400)  # of which the tokenizer knows nothing
    with pytest.raises(InputError, match="has 0 image tokens where 1 images need 16"):
        processor_of(folder).encode("x", [picture()])
    edit_config(folder, image_token_index=IMAGE_TOKEN_ID)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings |= {"crop_size": {"height": 70, "width": 70}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="makes 70 x 70 pixels, and the model takes 56 x 56"):
        processor_of(folder).encode("x", [picture()])
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match="its image processor cannot be loaded"):
        processor_of(folder)
