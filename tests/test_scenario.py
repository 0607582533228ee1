"""Scenario files: loading, presets, paths, overrides, `scenario show`, and the JSON schema."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from epsim import cli
from epsim.cluster import build_cluster
from epsim.errors import ScenarioError
from epsim.scenario import ScenarioSpec, apply_override, check_scenario, load_raw, load_scenario, scenario_schema
from epsim.scenario.load import preset_names

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(
    path
    for path in (ROOT / "scenarios").rglob("*.yaml")
    if path.name != "parameters.yaml" and path.parent.name != "train"
)
MINIMAL = {"name": "minimal", "model": "olmoe", "cluster": "orin-2x-10gbe", "trace": {"kind": "uniform"}}


def write(path: Path, **changes: Any) -> Path:
    """Write the minimal scenario with some fields changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**MINIMAL, **changes}, sort_keys=False))
    return path


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    return write(tmp_path / "minimal.yaml")


def shown(spec: ScenarioSpec) -> dict[str, Any]:
    return spec.model_dump(mode="json", by_alias=True)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_scenarios_are_sound(path: Path) -> None:
    assert load_scenario(path).name


def test_defaults(minimal: Path) -> None:
    spec = load_scenario(minimal)
    assert spec.model.name == "OLMoE-1B-7B-0125"
    assert spec.cluster.name == "orin-2x-10gbe"
    assert shown(spec)["trace"] == {
        "kind": "uniform", "requests": None, "seed": 0, "vision_tokens": 576, "text_tokens": 128, "output_tokens": 32,
    }  # fmt: skip
    assert {key: shown(spec)[key] for key in ("placement", "homes", "transmission", "workload", "simulation")} == {
        "placement": {"policy": "contiguous"},
        "homes": {"policy": "balanced", "kv_transfer": "overlapped"},
        "transmission": {
            "mode": "sync", "num_chunks": 1, "dedup": "device", "dispatch_dtype": "bf16", "combine_dtype": "bf16",
                "overlap_shared": False, "connections": "flow", "barriers": "all",
        },
        "workload": {
            "batch_sizes": [1, 8, 32], "num_batches": 1, "max_output_tokens": None,
            "slo": {"ttft": None, "tpot": None},
        },
        "simulation": {"fidelity": "event", "timeline_decode_steps": 3},
    }  # fmt: skip


def test_quantities_are_si_inside(minimal: Path) -> None:
    spec = load_scenario(minimal, ["workload.slo.tpot=50 ms"])
    assert spec.cluster.links[0].bandwidth == 9.41e9 / 8
    assert spec.cluster.links[0].latency == 50e-6
    assert spec.cluster.segment == 65536
    assert spec.workload.slo.tpot == 0.05


def test_sizes_that_may_be_zero_are_shown_and_read_again(minimal: Path) -> None:
    settings = ["message_header=0 B", "burst=64 KiB", "frame_overhead=0.0622", "ack_overhead=0.02"]
    spec = load_scenario(minimal, [f"cluster.links[0].{setting}" for setting in settings])
    link = shown(spec)["cluster"]["links"][0]
    assert [link[name] for name in ("message_header", "burst", "frame_overhead")] == ["0 B", "64 KiB", 0.0622]
    minimal.write_text(yaml.safe_dump(shown(spec)))
    assert load_scenario(minimal) == spec
    assert spec.cluster.links[0].burst == 65536


def test_messaging_is_shown_and_read_again(minimal: Path) -> None:
    orin = "cluster.device_types.orin"
    settings = [f"{orin}.messaging.send_overhead=40 us", f"{orin}.messaging.background_bandwidth=8 GB/s"]
    spec = load_scenario(minimal, [*settings, f"{orin}.step_overhead=1 ms"])
    device = shown(spec)["cluster"]["device_types"]["orin"]
    assert device["messaging"] == {
        "send_overhead": "40 us", "send_bandwidth": None, "receive_overhead": "0 s", "background_bandwidth": "8 GB/s",
    }  # fmt: skip
    minimal.write_text(yaml.safe_dump(shown(spec)))
    assert load_scenario(minimal) == spec
    built = build_cluster(spec.cluster.model_dump()).devices[0]
    assert (built.send_overhead_s, built.send_bytes_per_s, built.background_bytes_per_s) == (40e-6, None, 8e9)
    assert (built.receive_overhead_s, built.step_overhead_s) == (0.0, 1e-3)


@pytest.mark.parametrize("section", ["model", "cluster"])
def test_a_file_is_as_good_as_a_preset(section: str, tmp_path: Path) -> None:
    for name in preset_names(section):
        text = (ROOT / "epsim" / "presets" / f"{section}s" / f"{name}.yaml").read_text()
        (tmp_path / "own.yaml").write_text(text)
        by_file = load_scenario(write(tmp_path / "file.yaml", **{section: "own.yaml"}))
        by_name = load_scenario(write(tmp_path / "name.yaml", **{section: name}))
        written_out = load_scenario(write(tmp_path / "out.yaml", **{section: yaml.safe_load(text)}))
        assert by_file == by_name == written_out


def test_paths_in_a_file_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "deep" / "er"
    card = (ROOT / "epsim" / "presets" / "models" / "olmoe.yaml").read_text()
    placement = {"policy": "file", "path": "p.json"}
    scenario = write(folder / "s.yaml", model="../card.yaml", trace="t.trace", placement=placement)
    (tmp_path / "deep" / "card.yaml").write_text(card)
    monkeypatch.chdir(tmp_path)
    relative = Path("deep") / "er"
    spec = load_scenario(relative / "s.yaml")
    assert shown(spec)["trace"] == {"kind": "file", "path": str(relative / "t.trace")}
    assert shown(spec)["placement"]["path"] == str(relative / "p.json")
    assert shown(load_scenario(scenario))["trace"]["path"] == str(folder / "t.trace")


def test_paths_in_the_overrides_of_a_file_are_relative_to_it_too(tmp_path: Path) -> None:
    overrides = {"trace": "t.trace", "placement.policy": "file", "placement.path": "p.json"}
    spec = shown(load_scenario(write(tmp_path / "a" / "s.yaml", overrides=overrides)))
    assert spec["trace"]["path"] == str(tmp_path / "a" / "t.trace")
    assert spec["placement"]["path"] == str(tmp_path / "a" / "p.json")


def test_an_absolute_path_stays(tmp_path: Path) -> None:
    spec = load_scenario(write(tmp_path / "s.yaml", trace={"kind": "file", "path": "/data/t.trace"}))
    assert shown(spec)["trace"]["path"] == "/data/t.trace"


def test_paths_in_set_are_relative_to_the_working_directory(tmp_path: Path) -> None:
    scenario = write(tmp_path / "a" / "s.yaml")
    assert shown(load_scenario(scenario, ["trace=t.trace"]))["trace"]["path"] == "t.trace"


def test_overrides_section_then_set(tmp_path: Path) -> None:
    path = "cluster.links[ethernet].bandwidth"
    scenario = write(tmp_path / "s.yaml", overrides={path: "25 Gbit/s", "transmission.mode": "async"})
    assert load_scenario(scenario).cluster.links[0].bandwidth == 25e9 / 8
    spec = load_scenario(scenario, [f"{path}=40 Gbit/s"])
    assert (spec.cluster.links[0].bandwidth, spec.transmission.mode) == (40e9 / 8, "async")


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("cluster.links[0].latency=7 us", ("cluster", "links", 0, "latency")),
        ("cluster.links[ethernet].latency=7 us", ("cluster", "links", 0, "latency")),
        ("cluster.links.0.latency=7 us", ("cluster", "links", 0, "latency")),
        ("cluster.device_types.orin.launch_overhead=7 us", ("cluster", "device_types", "orin", "launch_overhead")),
        ("workload.slo.ttft=7 us", ("workload", "slo", "ttft")),
        (" workload.slo = {ttft: 7 us}", ("workload", "slo", "ttft")),
    ],
)
def test_set_reaches_a_field(override: str, path: tuple[Any, ...], minimal: Path) -> None:
    found: Any = shown(load_scenario(minimal, [override]))
    for key in path:
        found = found[key]
    assert found == "7 us"


def test_set_by_name_takes_the_entry_of_that_name(tmp_path: Path) -> None:
    links = [{"name": name, "from": "orin0", "to": "orin1", "bandwidth": "1 GB/s"} for name in ("slow", "fast")]
    raw = load_raw(write(tmp_path / "s.yaml"), ["cluster.name=two cables"])
    apply_override(raw, "cluster.links", links)
    apply_override(raw, "cluster.links[fast].bandwidth", "9 GB/s")
    assert [link.bandwidth for link in check_scenario(raw).cluster.links] == [1e9, 9e9]


def test_the_last_set_wins_and_presets_are_not_changed(minimal: Path) -> None:
    spec = load_scenario(minimal, ["model.moe.topk=2", "model.moe.topk=4"])
    assert spec.model.moe is not None
    assert spec.model.moe.topk == 4
    assert load_scenario(minimal).model.moe != spec.model.moe


@pytest.mark.parametrize(
    ("section", "overrides", "expected"),
    [
        ("placement", ["placement.policy=contiguous"], {"policy": "contiguous"}),
        ("placement", ["placement.policy=random"], {"policy": "random", "seed": 0}),
        (
            "placement",
            ["placement.policy=modality_bins"],
            {"policy": "modality_bins", "num_bins": 4, "momentum": None, "batch_requests": None},
        ),
        ("placement", ["placement.policy=random", "placement.seed=3"], {"policy": "random", "seed": 3}),
        ("trace", ["trace.kind=file", "trace.path=t"], {"kind": "file", "path": "t"}),
    ],
)
def test_another_policy_or_kind_starts_afresh(
    section: str, overrides: list[str], expected: dict[str, Any], tmp_path: Path
) -> None:
    trace = {"kind": "zipf", "exponent": 1.5, "seed": 4}
    placement = {"policy": "modality_bins", "num_bins": 4}
    scenario = write(tmp_path / "s.yaml", trace=trace, placement=placement)
    assert shown(load_scenario(scenario, overrides))[section] == expected


def test_the_kind_of_a_trace_that_was_a_file(tmp_path: Path) -> None:
    spec = load_scenario(write(tmp_path / "s.yaml", trace="t.trace"), ["trace.kind=uniform", "trace.seed=5"])
    assert (spec.trace.kind, shown(spec)["trace"]["seed"]) == ("uniform", 5)


def test_a_date_is_text(minimal: Path) -> None:
    assert load_scenario(minimal, ["name=2026-02-30"]).name == "2026-02-30"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_show_prints_is_the_same_scenario(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["workload.slo.ttft=333.3 ms", "cluster.links[0].latency=0.47 us"]
    arguments = [argument for override in overrides for argument in ("--set", override)]
    monkeypatch.setattr(sys, "argv", ["epsim", "scenario", "show", str(path), *arguments])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 0
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    assert load_scenario(tmp_path / "shown.yaml") == load_scenario(path, overrides)


def test_show_writes_what_people_write(minimal: Path) -> None:
    cluster = shown(load_scenario(minimal))["cluster"]
    assert (cluster["segment"], cluster["links"][0]["bandwidth"], cluster["links"][0]["from"]) == (
        "64 KiB", "9.41 Gbit/s", "orin0",
    )  # fmt: skip
    assert cluster["device_types"]["orin"]["flops"]["bf16"] == "42.5 TFLOP/s"


def test_the_first_mistake_is_named_and_the_others_counted() -> None:
    with pytest.raises(ScenarioError, match=r"^transmission\.mode: .*; write sync, async or two_batch \(and 1 more\)$"):
        check_scenario({**MINIMAL, "transmission": {"mode": 1, "dedup": 2}})


# The JSON schema, held against a validator of the keywords that it uses.


def fits(value: Any, node: dict[str, Any], schema: dict[str, Any]) -> bool:
    """Return whether a value fits a node of a JSON schema (draft 2020-12, the keywords that occur in ours)."""
    keywords = sorted(node, key=lambda keyword: keyword != "type")  # the others take the type for granted
    return all(CHECKS[keyword](value, node[keyword], node, schema) for keyword in keywords)


def object_fits(value: Any, node: dict[str, Any], schema: dict[str, Any]) -> bool:
    patterns = node.get("patternProperties", {})
    for key, item in value.items():
        rules = [node["properties"][key]] if key in node.get("properties", {}) else []
        rules += [rule for pattern, rule in patterns.items() if re.search(pattern, key)]
        rest = node.get("additionalProperties", True)
        if not rules and (rest is False or (isinstance(rest, dict) and not fits(item, rest, schema))):
            return False
        if not all(fits(item, rule, schema) for rule in rules):
            return False
    return True


TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "number": (int, float),
}
CHECKS: dict[str, Any] = {
    "$ref": lambda v, rule, node, schema: fits(v, schema["$defs"][rule.removeprefix("#/$defs/")], schema),
    "anyOf": lambda v, rule, node, schema: any(fits(v, option, schema) for option in rule),
    "oneOf": lambda v, rule, node, schema: sum(fits(v, option, schema) for option in rule) == 1,
    "type": lambda v, rule, node, schema: (
        isinstance(v, TYPES.get(rule, int)) and (rule == "boolean" or not isinstance(v, bool))
    ),
    "enum": lambda v, rule, node, schema: v in rule,
    "const": lambda v, rule, node, schema: v == rule,
    "minimum": lambda v, rule, node, schema: v >= rule,
    "maximum": lambda v, rule, node, schema: v <= rule,
    "exclusiveMinimum": lambda v, rule, node, schema: v > rule,
    "exclusiveMaximum": lambda v, rule, node, schema: v < rule,
    "minLength": lambda v, rule, node, schema: len(v) >= rule,
    "minItems": lambda v, rule, node, schema: len(v) >= rule,
    "minProperties": lambda v, rule, node, schema: len(v) >= rule,
    "items": lambda v, rule, node, schema: all(fits(item, rule, schema) for item in v),
    "required": lambda v, rule, node, schema: set(rule) <= set(v),
    "propertyNames": lambda v, rule, node, schema: all(fits(key, rule, schema) for key in v),
    "properties": lambda v, rule, node, schema: object_fits(v, node, schema),
    "patternProperties": lambda v, rule, node, schema: object_fits(v, node, schema),
    "additionalProperties": lambda v, rule, node, schema: not isinstance(v, dict) or object_fits(v, node, schema),
    **dict.fromkeys(("title", "description", "default", "examples", "discriminator", "$defs"), lambda *_: True),
}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_schema_accepts_shipped_scenarios_as_written_and_as_shown(path: Path) -> None:
    schema = scenario_schema()
    assert fits(yaml.safe_load(path.read_text()), schema, schema)
    assert fits(shown(load_scenario(path)), schema, schema)


@pytest.mark.parametrize("section", ["model", "cluster"])
def test_schema_accepts_every_preset(section: str) -> None:
    schema = scenario_schema()
    for path in (ROOT / "epsim" / "presets" / f"{section}s").glob("*.yaml"):
        assert fits({**MINIMAL, section: yaml.safe_load(path.read_text())}, schema, schema), path.name


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""},
        {"colour": "red"},
        {"model": 3},
        {"trace": {"kind": "uniform", "exponent": 2}},
        {"workload": {"batch_sizes": []}},
        {"workload": {"batch_sizes": [0]}},
        {"workload": {"batch_sizes": [True]}},
        {"transmission": {"mode": "fast"}},
        {"transmission": {"num_chunks": 65}},
        {"placement": {"policy": "best"}},
        {"overrides": []},
    ],
)
def test_schema_refuses(changes: dict[str, Any]) -> None:
    schema = scenario_schema()
    assert fits(MINIMAL, schema, schema)
    assert not fits({**MINIMAL, **changes}, schema, schema)


def test_schema_command_prints_the_schema(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["epsim", "scenario", "schema"])
    with pytest.raises(SystemExit):
        cli.main()
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(scenario_schema()))


def test_schema_refers_only_to_what_it_defines() -> None:
    schema = scenario_schema()
    references = set(re.findall(r'"#/\$defs/(\w+)"', json.dumps(schema)))
    assert references == set(schema["$defs"])


# docs/scenario.md


def documented_scenarios() -> list[str]:
    return re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs" / "scenario.md").read_text(), re.MULTILINE | re.DOTALL)


def test_documented_scenarios_are_sound(tmp_path: Path) -> None:
    blocks = documented_scenarios()
    assert len(blocks) >= 2
    for block in blocks:
        (tmp_path / "s.yaml").write_text(block)
        assert load_scenario(tmp_path / "s.yaml").name


def field_names(node: Any) -> set[str]:
    if isinstance(node, dict):
        own = set(node.get("properties", {}))
        return own.union(*(field_names(child) for child in node.values()))
    return set().union(*(field_names(child) for child in node)) if isinstance(node, list) else set()


def test_every_field_of_a_scenario_is_documented() -> None:
    text = (ROOT / "docs" / "scenario.md").read_text()
    schema = scenario_schema()
    for part in ("ModelSpec", "ClusterSpec"):  # docs/models.md and docs/clusters.md
        schema["$defs"].pop(part)
    elsewhere = [name for name in schema["$defs"] if name.startswith(("Mha", "Gqa", "Mla", "Moe", "Vision"))]
    elsewhere += ["StagingSpec", "MessagingSpec", "DeviceTypeSpec", "VertexSpec", "DeviceSpec", "LinkSpec"]
    for name in elsewhere:
        schema["$defs"].pop(name)
    missing = {name for name in field_names(schema) if not re.search(rf"\b{name}\b", text)}
    assert not missing


def test_the_line_that_the_demo_scenario_offers_can_be_taken_in(tmp_path: Path) -> None:
    text = (ROOT / "scenarios" / "orin-2x-olmoe.yaml").read_text(encoding="utf-8")
    head, offered = text.rstrip().rsplit("\n", 1)
    assert offered.startswith("#  cluster.links[ethernet].bandwidth")
    (tmp_path / "s.yaml").write_text(f"{head}\n{offered.replace('#', '')}\n", encoding="utf-8")
    assert load_scenario(tmp_path / "s.yaml").cluster.links[0].bandwidth == 25e9 / 8
    assert load_scenario(ROOT / "scenarios" / "orin-2x-olmoe.yaml").cluster.links[0].bandwidth == 9.41e9 / 8


# Device types by name or file.


def test_a_device_type_may_be_a_file(tmp_path: Path) -> None:
    fields = "{memory: 32 GB, memory_bandwidth: 100 GB/s, flops: {bf16: 10 TFLOP/s}, layer_overhead: 5 ms}"
    (tmp_path / "devices").mkdir()
    (tmp_path / "devices" / "mine.yaml").write_text(fields)
    lines = ["name: x", "model: olmoe", "cluster: orin-2x-10gbe", "trace: {kind: uniform}"]
    scenario = tmp_path / "scenario.yaml"
    scenario.write_text("\n".join([*lines, "overrides: {cluster.device_types.orin: devices/mine.yaml}"]))
    device = load_scenario(scenario).cluster.device_types["orin"]
    assert (device.memory, device.layer_overhead) == (32e9, 0.005)
    # One of its fields, changed through the name.
    changed = load_scenario(scenario, ["cluster.device_types.orin.layer_overhead=7 ms"]).cluster.device_types["orin"]
    assert (changed.memory, changed.layer_overhead) == (32e9, 0.007)
    # In a cluster file the path is relative to that file; on the command line to the working directory.
    shown = load_scenario(scenario).cluster.model_dump(mode="json", by_alias=True)
    (tmp_path / "devices" / "cluster.yaml").write_text(yaml.safe_dump({**shown, "device_types": {"orin": "mine.yaml"}}))
    scenario.write_text("\n".join([*lines, "overrides: {cluster: devices/cluster.yaml}"]))
    assert load_scenario(scenario).cluster.device_types["orin"] == device
    here = [f"cluster.device_types.orin={tmp_path}/devices/mine.yaml"]
    assert load_scenario(scenario, here).cluster.device_types["orin"] == device


def test_an_unknown_device_type_is_one_line(tmp_path: Path) -> None:
    scenario = tmp_path / "scenario.yaml"
    scenario.write_text("name: x\nmodel: olmoe\ncluster: orin-2x-10gbe\ntrace: {kind: uniform}\n")
    for overrides in (["cluster.device_types.orin=orion"], ["cluster.device_types.orin=orion", MEMORY]):
        with pytest.raises(ScenarioError, match=r'^cluster\.device_types\.orin: "orion" is not a preset; write one of'):
            load_scenario(scenario, overrides)


MEMORY = "cluster.device_types.orin.memory=32 GB"
