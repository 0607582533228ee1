"""Mistakes that people make: each gives exit code 2 and one line (path, value, rule, mend), and writes nothing."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from epsim import cli

SCENARIO = """\
name: tiny
model: olmoe
cluster: orin-2x-10gbe
trace: {kind: uniform, vision_tokens: 2, text_tokens: 2, output_tokens: 2}
workload: {batch_sizes: [1]}
"""
KNOWN = "cluster, description, homes, model, name, parallelism, placement, simulation, trace, transmission, workload"
MODELS = "deepseekmoe, llama-3.2-3b, llava-1.5-7b, llava-next-34b, mixtral, moonlight, olmo-1b, olmoe, qwen3-moe"
POLICIES = ["contiguous", "round_robin", "random", "modality_bins", "coactivation", "balanced_coactivation"]
POLICIES += ["predicted_time", "eplb_hierarchical", "eplb_global", "replicated", "token_migration", "exact", "file"]
CLUSTERS = "a800-2x8, h100-2x8, h200-1x8, orin-2x-10gbe"
Complaint = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a scenario and the results of an earlier run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(SCENARIO)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("earlier")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def complaint(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Complaint:
    """Return a function that runs the command line, asserts a clean failure and returns what it says."""

    def run(*arguments: str) -> str:
        before = contents(folder)
        monkeypatch.setattr(sys, "argv", ["epsim", *arguments])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        printed = capsys.readouterr()
        assert exit_info.value.code == 2
        assert printed.out == ""
        assert contents(folder) == before
        assert printed.err.startswith("epsim: ")
        assert printed.err.endswith("\n")
        assert len(printed.err.splitlines()) == 1
        return printed.err.removeprefix("epsim: ").removesuffix("\n")

    return run


FILES = {
    "binary": (b"\x89PNG\x00\xff", "bad.yaml: not a text file in UTF-8; write the path of a scenario file in YAML"),
    "nul": (b"name: a\x00b", "bad.yaml: not valid YAML: special characters are not allowed"),
    "syntax": (
        b"name: [1, 2\nmodel: olmoe\n",
        "bad.yaml: not valid YAML: line 2, column 6: expected ',' or ']', but got ':'",
    ),
    "tab": (
        b"name: a\n\tmodel: b\n",
        "bad.yaml: not valid YAML: line 2, column 1: found character '\\t' that cannot start any token",
    ),
    "two documents": (
        b"name: a\n---\nname: b\n",
        "bad.yaml: not valid YAML: line 2, column 1: but found another document",
    ),
    "deep": (b"name: " + b"[" * 3000, "bad.yaml: not valid YAML: nested too deeply"),
    "digits": (
        b"seed: " + b"9" * 5000,
        "bad.yaml: not valid YAML: a number cannot be read; put it in quotes if it is text",
    ),
    "empty": (b"", "bad.yaml: the file is empty; write the fields of a scenario"),
    "only a comment": (b"# nothing\n", "bad.yaml: the file is empty; write the fields of a scenario"),
    "list": (b"- name: a\n", 'bad.yaml: [{"name": "a"}] is not a mapping; write the fields of a scenario'),
    "scalar": (b"hello\n", 'bad.yaml: "hello" is not a mapping; write the fields of a scenario'),
    "repeated field": (
        SCENARIO.encode() + b"name: again\n",
        'bad.yaml: not valid YAML: line 6, column 1: "name" is there twice',
    ),
    "typo": (SCENARIO.encode() + b"modle: olmoe\n", 'modle: is not a known field; did you mean "model"?'),
    "unknown field": (
        SCENARIO.encode() + b"batch_sizes: [1]\n",
        f"batch_sizes: is not a known field; known are {KNOWN}",
    ),
    "number as field": (
        SCENARIO.encode() + b"1: x\n",
        "scenario: 1 is not the name of a field; write text, in quotes if it looks like a number",
    ),
    "no name": (SCENARIO.replace("name: tiny\n", "").encode(), "name: is missing; write it"),
    "no model": (SCENARIO.replace("model: olmoe\n", "").encode(), "model: is missing; write it, e.g. {name: ...}"),
    "no trace": (SCENARIO.split("trace")[0].encode(), "trace: is missing; write it, e.g. {kind: file}"),
    "recursive alias": (
        b"name: a\nmodel: &m\n  moe: *m\ncluster: orin-2x-10gbe\ntrace: {kind: uniform}\n",
        "model.name: is missing; write it (and 8 more)",
    ),
    "half a character": (
        SCENARIO.replace("tiny", '"\\ud800"').encode(),
        'name: "\\ud800" holds half a character (a lone surrogate); write it out',
    ),
    "kind as trace file": (
        SCENARIO.split("trace")[0].encode() + b"trace: uniform\n",
        'trace: "uniform" is not a file; write {kind: uniform} for such a trace',
    ),
    "overrides list": (
        SCENARIO.encode() + b"overrides: [a, b]\n",
        'overrides: ["a", "b"] is not a mapping of paths to values; '
        'write e.g. {"cluster.links[0].bandwidth": 25 Gbit/s}',
    ),
    "overrides path": (
        SCENARIO.encode() + b"overrides: {'cluster.links[7].latency': 1 us}\n",
        'overrides "cluster.links[7].latency": there is no entry 7; write one of 0, ethernet',
    ),
    "model file": (
        SCENARIO.replace("olmoe", "card.yaml").encode(),
        "card.yaml: cannot be read: No such file or directory; write the path of a model file",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_scenario_file(name: str, folder: Path, complaint: Complaint) -> None:
    content, message = FILES[name]
    (folder / "bad.yaml").write_bytes(content)
    assert complaint("simulate", "bad.yaml", "--out", "out") == message


def test_scenario_file_is_missing(complaint: Complaint) -> None:
    message = "gone.yaml: cannot be read: No such file or directory; write the path of a scenario file"
    assert complaint("simulate", "gone.yaml", "--out", "new") == message


def test_scenario_file_is_a_directory(complaint: Complaint) -> None:
    message = "out: cannot be read: Is a directory; write the path of a scenario file"
    assert complaint("scenario", "show", "out") == message


VALUES = {
    # presets and sections
    "model=olmo": f'model: "olmo" is not a preset; write one of {MODELS}, or a path that ends in .yaml; '
    'did you mean "olmoe"?',
    "cluster=laptop": f'cluster: "laptop" is not a preset; write one of {CLUSTERS}, or a path that ends in .yaml',
    "model=[]": "model: [] is not a mapping of fields; write e.g. {name: ...}",
    "model=llava-1.5-7b": "model: LLaVA-1.5-7B has no MoE layers; write a model with experts, e.g. olmoe, "
    "or parallelism.kind: tp or dp",
    "placement=random": 'placement: "random" is not a mapping of fields; write e.g. {policy: random}',
    "placement={}": f"placement.policy: is missing; write one of {', '.join(sorted(POLICIES))}",
    "placement=~": "placement: null is not a mapping of fields; write e.g. {policy: contiguous}",
    "transmission=async": 'transmission: "async" is not a mapping of fields; write e.g. {mode: ...}',
    "trace={kind: published, method: baseline}": "trace.benchmark: is missing; "
    "write one of MMMU, SQA-IMG, POPE, GQA, TextVQA",
    "transmission.dedupe=node": 'transmission.dedupe: is not a known field; did you mean "dedup"?',
    "cluster.links[0].colour=red": "cluster.links[0].colour: is not a known field; "
    "known are ack_overhead, bandwidth, burst, duplex, each, frame_overhead, from, latency, message_header, "
    "message_overhead, name, to",
    "trace.benchmark=POPE": "trace.benchmark: is not a known field; "
    "known are kind, output_tokens, requests, seed, text_tokens, vision_tokens",
    # names that are chosen from a list
    "placement.policy=best": 'placement.policy: "best" is not known; '
    f"write one of {', '.join(POLICIES)}",
    "trace.kind=~": "trace.kind: null is not known; write one of file, uniform, zipf, published",
    "transmission.mode=fast": 'transmission.mode: "fast" is not known; write sync, async or two_batch',
    "transmission.dedup=off": "transmission.dedup: false is not known; write none, device or node",
    "transmission.dispatch_dtype=fp4": 'transmission.dispatch_dtype: "fp4" is not known; write bf16, fp8 or fp32',
    "simulation.fidelity=exact": 'simulation.fidelity: "exact" is not known; write event, analytic or simpy',
    "homes.policy=here": 'homes.policy: "here" is not known; write balanced or by_modality',
    "model.attention.kind=sparse": 'model.attention.kind: "sparse" is not known; write one of mha, gqa, mla',
    "trace={kind: published, benchmark: VQA, method: baseline}": 'trace.benchmark: "VQA" is not known; '
    "write MMMU, SQA-IMG, POPE, GQA or TextVQA",
    "trace={kind: published, benchmark: POPE, method: hard}": 'trace.method: "hard" is not known; '
    "write baseline, attention-soft or gaussian-soft",
    # kinds of parallelism
    "parallelism.kind=sp": 'parallelism.kind: "sp" is not known; write one of ep, tp, dp, afd, pd',
    "parallelism=tp": 'parallelism: "tp" is not a mapping of fields; write e.g. {kind: tp}',
    "parallelism={kind: dp, size: 2}": "parallelism.size: is not a known field; known are kind",
    "parallelism={kind: tp, size: 3}": "parallelism.size: 3 does not divide 2 devices; write one of 1, 2",
    "parallelism.kind=tp model.attention.num_heads=3": "parallelism.size: 2 does not split attention.num_heads 3 "
    "of OLMoE-1B-7B-0125; write 1",
    "parallelism={kind: afd, attention_devices: 2}": "parallelism.attention_devices: 2 leaves none of 2 devices; "
    "write 1 or less",
    "parallelism={kind: pd, prefill_devices: 0}": "parallelism.prefill_devices: 0 is not above 0; "
    "write a larger number",
    "parallelism.kind=afd homes.policy=by_modality": 'homes.policy: "by_modality" has no meaning under afd, where '
    "tokens live on the attention devices; leave it out",
    "parallelism.kind=pd homes.policy=by_modality": 'homes.policy: "by_modality" has no meaning under pd, where '
    "tokens live first in the one, then in the other pool; leave it out",
    "parallelism.kind=tp placement.policy=random": 'placement.policy: "random" has no meaning under tp, where every '
    "device holds a slice of every expert; leave it out (on the command line: --set \"placement={}\")",
    "parallelism.kind=tp transmission.mode=async": 'transmission.mode: "async" has no meaning under tp, where every '
    "device holds a slice of every expert; leave it out (on the command line: --set \"transmission={}\")",
    "parallelism.kind=tp transmission.overlap_shared=true": "transmission.overlap_shared: true has no meaning under "
    "tp, where every device holds a slice of every expert; leave it out (on the command line: "
    '--set "transmission={}")',
    "parallelism.kind=dp homes.policy=by_modality": 'homes.policy: "by_modality" has no meaning under dp, where every '
    "device holds the whole model; leave it out (on the command line: --set \"homes={}\")",
    # quantities
    "cluster.links[0].bandwidth=10 GB": 'cluster.links[0].bandwidth: "10 GB" is not a rate; write e.g. "10 Gbit/s"',
    "cluster.links[0].bandwidth=10": 'cluster.links[0].bandwidth: 10 is not a rate; write e.g. "10 Gbit/s"',
    "cluster.links[0].bandwidth=10 gbit/s": 'cluster.links[0].bandwidth: "10 gbit/s" is not a rate; '
    'write e.g. "10 Gbit/s"',
    "cluster.links[0].bandwidth=0 Gbit/s": 'cluster.links[0].bandwidth: "0 Gbit/s" is not from 1 B/s to 1000000 TB/s; '
    'write e.g. "10 Gbit/s"',
    "cluster.links[0].bandwidth=-1 Gbit/s": 'cluster.links[0].bandwidth: "-1 Gbit/s" is not from 1 B/s to '
    '1000000 TB/s; write e.g. "10 Gbit/s"',
    "cluster.links[0].bandwidth=1e30 GB/s": 'cluster.links[0].bandwidth: "1e30 GB/s" is not from 1 B/s to '
    '1000000 TB/s; write e.g. "10 Gbit/s"',
    "cluster.links[0].latency=-1 us": 'cluster.links[0].latency: "-1 us" is not from 0 s to 1000000 s; '
    'write e.g. "5 us"',
    "cluster.links[0].message_header=-1 B": 'cluster.links[0].message_header: "-1 B" is not from 0 B to 1000000 TB; '
    'write e.g. "64 GB"',
    "cluster.links[0].burst=0": 'cluster.links[0].burst: 0 is not a size; write e.g. "64 GB"',
    "cluster.links[0].frame_overhead=1.5": "cluster.links[0].frame_overhead: 1.5 is above 1; write 1 or less",
    "cluster.links[0].ack_overhead=-0.1": "cluster.links[0].ack_overhead: -0.1 is below 0.0; write 0.0 or more",
    "cluster.links[0].burst=64KiB simulation.fidelity=analytic": 'simulation.fidelity: "analytic" has no formula for '
    'burst (of the link "ethernet orin0->orin1"); write event',
    "transmission.barriers=own simulation.fidelity=analytic": 'simulation.fidelity: "analytic" has no formula for '
    "transmission.barriers: own; write event",
    "cluster.device_types.orin.messaging={send: 1 us}": "cluster.device_types.orin.messaging.send: is not a known "
    "field; known are background_bandwidth, receive_overhead, send_bandwidth, send_overhead",
    "cluster.device_types.orin.messaging.send_overhead=1us simulation.fidelity=analytic": 'simulation.fidelity: '
    '"analytic" has no formula for messaging.send_overhead (of the device orin0); write event',
    "transmission.barriers=none": 'transmission.barriers: "none" is not known; write all or own',
    "transmission.connections=rank": 'transmission.connections: "rank" is not known; write flow or pair',
    "cluster.links[0].latency=.nan": 'cluster.links[0].latency: nan is not a time; write e.g. "5 us"',
    "cluster.segment=1e400 GB": 'cluster.segment: "1e400 GB" is too large; write e.g. "64 GB"',
    "workload.slo.ttft=5": 'workload.slo.ttft: 5 is not a time; write e.g. "5 us"',
    "cluster.device_types.orin.flops={fp16: 3 TFLOP/s}": "cluster.device_types.orin.flops: ['fp16'] lacks bf16; "
    'write e.g. "bf16: 312 TFLOP/s"',
    # types
    "name=5": "name: 5 is not text; write text, in quotes if it looks like a number",
    "name=''": 'name: "" is empty; write at least one character',
    'workload.num_batches="3"': 'workload.num_batches: "3" is not a whole number; write e.g. 3',
    "workload.num_batches=true": "workload.num_batches: true is not a whole number; write e.g. 1",
    "workload.num_batches=2.5": "workload.num_batches: 2.5 is not a whole number; write e.g. 2",
    "model.tie_embeddings=1": "model.tie_embeddings: 1 is neither true nor false; write one of them, without quotes",
    "cluster.device_types.orin.compute_efficiency=true": "cluster.device_types.orin.compute_efficiency: true is not "
    "a finite number; write e.g. 0.5",
    "cluster.device_types.orin.compute_efficiency='0.5'": 'cluster.device_types.orin.compute_efficiency: "0.5" is '
    "not a finite number; write e.g. 0.5",
    "cluster.device_types.orin.memory_usable=.nan": "cluster.device_types.orin.memory_usable: NaN is not a finite "
    "number; write e.g. 0.5",
    "trace={kind: zipf, exponent: .inf}": "trace.exponent: Infinity is not a finite number; write e.g. 0.5",
    "cluster.devices[0].each=3": "cluster.devices[0].each: 3 is not a mapping of fields",
    "cluster.devices[0].each={1: 2}": "cluster.devices[0].each: 1 is not the name of a field; "
    "write text, in quotes if it looks like a number",
    "cluster.devices[0].each={1x: 2}": 'cluster.devices[0].each: "1x" is not a name; '
    "write letters, digits and _, a letter first",
    # ranges
    "workload.batch_sizes=5": "workload.batch_sizes: 5 is not a list; write e.g. [5]",
    "workload.batch_sizes=[]": "workload.batch_sizes: [] is empty; write at least one entry",
    "workload.batch_sizes=[8, 1]": "workload.batch_sizes: [8, 1] must rise without repeats; write e.g. [1, 8]",
    "workload.batch_sizes=[1, 1]": "workload.batch_sizes: [1, 1] must rise without repeats; write e.g. [1]",
    "workload.batch_sizes=[0, 1]": "workload.batch_sizes[0]: 0 is not above 0; write a larger number",
    "workload.batch_sizes=[99999999999]": "workload.batch_sizes[0]: 99999999999 is above 2147483647; "
    "write 2147483647 or less",
    "workload.batch_sizes=[100000000]": "trace: 100000000 requests x 5 tokens x 16 layers x top-8 are 6.4e+10 expert "
    "ids, more than the 4.3e+09 that are drawn in memory; use fewer or smaller batches, or shorter requests",
    "workload.max_output_tokens=0": "workload.max_output_tokens: 0 is not above 0; write a larger number",
    "transmission.num_chunks=0": "transmission.num_chunks: 0 is not above 0; write a larger number",
    "transmission.num_chunks=65": "transmission.num_chunks: 65 is above 64; write 64 or less",
    "simulation.timeline_decode_steps=-1": "simulation.timeline_decode_steps: -1 is below 0; write 0 or more",
    "trace.seed=-1": "trace.seed: -1 is below 0; write 0 or more",
    "trace.seed=9223372036854775808": "trace.seed: 9223372036854775808 is above 9223372036854775807; "
    "write 9223372036854775807 or less",
    "trace={kind: zipf, exponent: 11}": "trace.exponent: 11 is above 10; write 10 or less",
    "trace={kind: uniform, vision_tokens: 0, text_tokens: 0}": "trace: text_tokens 0 and vision_tokens 0 leave no "
    "prompt; write at least 1 of either",
    "cluster.device_types.orin.compute_efficiency=1.5": "cluster.device_types.orin.compute_efficiency: 1.5 is above 1; "
    "write 1 or less",
    "model.num_layers=1000000000": "model.num_layers: 1000000000 is above 1000; write 1000 or less",
    "model.moe.topk=99": "model.moe: topk 99 is more than num_experts 64; a token goes to topk different experts, "
    "write topk <= num_experts",
    "placement={policy: modality_bins, momentum: 1}": "placement.momentum: 1 is not below 1; write a smaller number",
    "placement={policy: modality_bins, batch_requests: 4}": "placement: batch_requests 4 has no meaning without "
    "momentum; write momentum, e.g. 0.99",
    "placement={policy: exact, time_limit: 60}": 'placement.time_limit: 60 is not a time; write e.g. "5 us"',
    "placement={policy: replicated, base: random}": 'placement.base: "random" is not known; write contiguous, '
    "round_robin, modality_bins, coactivation or balanced_coactivation",
    "placement={policy: replicated, spare_slots: 0}": "placement.spare_slots: 0 is not above 0; write a larger number",
    # what one part says of another
    "placement={policy: replicated, spare_slots: 33}": "placement.spare_slots: 33 is above 32, where every device has "
    "all of the 64 experts; write 32 or less",
    "placement.policy=replicated parallelism.kind=pd": "placement.policy: replicated needs tokens to live on the "
    "devices that hold experts, and under parallelism.kind afd or pd they do not; write another policy, e.g. "
    "coactivation",
    "placement={policy: modality_bins, num_bins: 3}": "placement.num_bins: 3 does not divide 64 experts; "
    "use a divisor, e.g. 2",
    "model.moe.num_experts=63": "placement: 63 experts do not divide over 2 devices; use a number of devices that "
    "divides the experts, or a placement file with redundant experts",
    "trace.requests=1 workload.batch_sizes=[2]": "workload.batch_sizes: 2 x num_batches 1 needs 2 requests, trace "
    "has 1; use smaller or fewer batches, or a longer trace",
    "cluster.device_types.orin.memory=7 GB": "workload: batch 1 does not fit on orin0: experts 6.442 GB + other "
    "weights 1.572 GB + KV cache 655.4 kB + buffers 16.38 kB = 8.015 GB of 5.6 GB usable; use smaller batches, "
    "shorter requests, or more devices",
    "cluster.devices[0].type=xavier": 'cluster.devices[0].type: "xavier" is not in cluster.device_types; '
    "write one of: orin",
    "cluster.devices[0].name=orin": 'cluster.devices[0].name: "orin" is named twice; give every device, nic and '
    "switch a name of its own (with `each`, a name that contains all its variables)",
    "cluster.devices[0].name=a{": 'cluster.devices[0].name: "a{" is not a name pattern; write e.g. "gpu{i}" with '
    "each: {i: 8}",
    "cluster.devices[0].each={j: 2}": 'cluster.devices[0].name: "orin{i}" uses {i}, which `each` lacks; '
    "write e.g. each: {i: 2}",
    "cluster.devices[0].each={i: 2000000000}": "cluster.devices[0].each: {'i': 2000000000} repeats the entry "
    "2000000000 times; write at most 65536",
    "cluster.devices[0].each={i: 3}": 'cluster.links: no route from "orin0" to "orin2"; devices do not forward: '
    "write links that join the two directly or through nics and switches",
    "cluster.links=[]": 'cluster.links: no route from "orin0" to "orin1"; devices do not forward: '
    "write links that join the two directly or through nics and switches",
    "cluster.links[0].to=orin9": 'cluster.links[0].to: "orin9" is not a device, nic or switch; '
    "write one of: orin1, orin0",
    "cluster.links[0].to=orin0": 'cluster.links[0].to: "orin0" is also the from; write another vertex: '
    "a link joins two",
    # the override itself
    "transmission.mode": '--set "transmission.mode": write path=value, e.g. transmission.mode=async',
    "=3": '--set "=3": write path=value, e.g. transmission.mode=async',
    "a..b=1": '--set "a..b": not a path; write names as in cluster.links[0].bandwidth',
    "cluster.links[0=1": '--set "cluster.links[0": not a path; write names as in cluster.links[0].bandwidth',
    "cluster.links[9].latency=1 us": '--set "cluster.links[9].latency": there is no entry 9; write one of 0, ethernet',
    "cluster.links[-1].latency=1 us": '--set "cluster.links[-1].latency": there is no entry -1; '
    "write one of 0, ethernet",
    "cluster.links[wifi].latency=1 us": '--set "cluster.links[wifi].latency": there is no entry wifi; '
    "write one of 0, ethernet",
    "cluster.nics[0].name=a": 'cluster.nics: {"0": {"name": "a"}} is not a list; write one with [ ]',
    "name.x=1": '--set "name.x": name is "tiny", which has no fields; write name=...',
    "cluster.links[0].latency.x=1": '--set "cluster.links[0].latency.x": cluster.links[0].latency is "50 us", which '
    "has no fields; write cluster.links[0].latency=...",
    "name=[": "--set \"name=[\": the value is not YAML (line 1, column 2: expected the node content, but found "
    "'<stream end>'); write it as in a file",
}  # fmt: skip


@pytest.mark.parametrize("override", VALUES)
def test_value(override: str, complaint: Complaint) -> None:
    parts = override.split(" ") if override.count("=") == 2 else [override]
    sets = [argument for part in parts for argument in ("--set", part)]
    assert complaint("simulate", "tiny.yaml", "--out", "out", *sets) == VALUES[override]


@pytest.fixture(scope="module")
def trace_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A sound trace of four requests for OLMoE."""
    folder = tmp_path_factory.mktemp("traces")
    (folder / "tiny.yaml").write_text(SCENARIO)
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["trace", "make", str(folder / "tiny.yaml"), "-o", str(folder / "sound.trace")]
        patch.setattr(sys, "argv", ["epsim", *arguments, "--set", "workload.batch_sizes=[4]"])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
    assert exit_info.value.code == 0
    return (folder / "sound.trace").read_bytes()


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]


def parquet(_: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"a": [1]}), sink)
    return bytes(sink.getvalue().to_pybytes())


def arrow_file(_: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"a": [1]})
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


TRACES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut": (lambda whole: whole[: len(whole) // 2], "its end is missing; the file was cut off, copy or write it again"),
    "empty": (lambda whole: b"", "the file is empty"),
    "text": (lambda whole: b"hello", "it is not an Arrow IPC file, so not a routing trace"),
    "parquet": (parquet, "it is a Parquet file; a routing trace is an Arrow IPC file"),
    "arrow": (arrow_file, 'it is an Arrow file without "epsim" metadata, so not a routing trace'),
    "flipped": (flipped, "record batch 0, column expert_ids: the CRC-32 is wrong; the file is damaged"),
}


@pytest.mark.parametrize("name", TRACES)
def test_trace_file(name: str, folder: Path, complaint: Complaint, trace_bytes: bytes) -> None:
    spoil, rule = TRACES[name]
    (folder / "bad.trace").write_bytes(spoil(trace_bytes))
    (folder / "copy.parquet").write_bytes(b"earlier")
    for command in (
        ("simulate", "tiny.yaml", "--set", "trace=bad.trace", "--out", "out"),
        ("trace", "check", "bad.trace"),
        ("trace", "export", "bad.trace", "--parquet", "-o", "copy.parquet"),
        ("trace", "make", "tiny.yaml", "--set", "trace=bad.trace", "-o", "copy.parquet"),
    ):
        assert complaint(*command) == f"bad.trace: {rule}"


def test_trace_file_is_missing(complaint: Complaint) -> None:
    for command in (("trace", "info", "no.trace"), ("simulate", "tiny.yaml", "--set", "trace=no.trace")):
        assert complaint(*command) == "no.trace: cannot be read: No such file or directory"


def test_trace_of_another_model(folder: Path, complaint: Complaint, trace_bytes: bytes) -> None:
    (folder / "t.trace").write_bytes(trace_bytes)
    command = ("simulate", "tiny.yaml", "--out", "out", "--set", "trace=t.trace", "--set")
    mend = "name the model that the trace was taken from"
    message = f"trace: t.trace has experts 64, model Mixtral-8x7B has 8; {mend}"
    assert complaint(*command, "model=mixtral") == message
    message = f"trace: t.trace has MoE layers 0..15 (16), model OLMoE-1B-7B-0125 has 0..7 (8); {mend}"
    assert complaint(*command, "model.num_layers=8") == message


def test_trace_with_too_few_requests(folder: Path, complaint: Complaint, trace_bytes: bytes) -> None:
    (folder / "t.trace").write_bytes(trace_bytes)
    command = (
        "simulate",
        "tiny.yaml",
        "--out",
        "out",
        "--set",
        "trace=t.trace",
        "--set",
        "workload.batch_sizes=[1, 5]",
    )
    assert complaint(*command) == (
        "workload.batch_sizes: 5 x num_batches 1 needs 5 requests, t.trace has 4; "
        "use smaller or fewer batches, or a longer trace"
    )


ROW = list(range(64))
FORM = 'write a JSON object {"physical_to_logical_map": [layers][slots]} of expert ids'
PLACEMENTS: dict[str, tuple[object, str]] = {
    "not JSON": ("{", f"placement.path: p.json is not JSON; {FORM}"),
    "deep": ("[" * 100_000, f"placement.path: p.json is not JSON; {FORM}"),
    "list": ([[1]], f"placement.path: p.json has another form; {FORM}"),
    "fractions": ([[0.5] * 64] * 16, f"placement.path: p.json has another form; {FORM}"),
    "layers": ([ROW] * 3, "placement.path: p.json has 3 layers, the trace 16; write one row per MoE layer"),
    "ragged": (
        [ROW] * 15 + [[*ROW, 0, 1]],
        "placement.path: rows of p.json differ in length; each layer needs all slots",
    ),
    "odd": ([[*ROW, 0]] * 16, "placement: 65 slots do not divide over 2 devices; use a multiple of 2 slots"),
    "missing expert": (
        [ROW] * 15 + [[0, *ROW[:-1]]],
        "placement: layer 15 has no slot for expert 63; every expert must be on some device",
    ),
    "unknown expert": (
        [ROW] * 15 + [[*ROW[:-1], 64]],
        "placement: layer 15, slot 63 holds expert 64; experts are numbered 0 to 63, and -1 is an empty slot",
    ),
}


@pytest.mark.parametrize("name", PLACEMENTS)
def test_placement_file(name: str, folder: Path, complaint: Complaint) -> None:
    content, message = PLACEMENTS[name]
    if not isinstance(content, str):
        content = json.dumps({"physical_to_logical_map": content} if name != "list" else content)
    (folder / "p.json").write_text(content)
    command = ("simulate", "tiny.yaml", "--out", "out", "--set", "placement={policy: file, path: p.json}")
    assert complaint(*command) == message


def test_placement_file_is_missing(complaint: Complaint) -> None:
    command = ("simulate", "tiny.yaml", "--out", "out", "--set", "placement={policy: file, path: p.json}")
    said = "placement.path: cannot read p.json: No such file or directory; write the path of a placement file"
    assert complaint(*command) == said
    assert complaint(*command[:-1], "placement.policy=file") == "placement.path: is missing; write it"


MODES = "--axis=transmission.mode=sync,async"
COMPARISONS = {
    "no values": (["--axis=a="], '--axis "a=": write path=value,value, e.g. transmission.mode=sync,async'),
    "no path": (["--axis==a,b"], '--axis "=a,b": write path=value,value, e.g. transmission.mode=sync,async'),
    "twice": (
        [MODES, "--axis=transmission.mode=sync"],
        '--axis "transmission.mode=sync": this axis is there twice; put all its values into one',
    ),
    "same value": (
        ["--axis=transmission.mode=sync,sync"],
        '--axis "transmission.mode=sync,sync": a value is there twice; write each once',
    ),
    "not YAML": (
        ["--axis=transmission.mode=[sync"],
        "--axis \"transmission.mode=[sync\": not YAML (line 1, column 8: expected ',' or ']', but got "
        "'<stream end>'); write values as in a file, quoted if need be",
    ),
    "unknown value": (
        ["--axis=transmission.mode=sync,fast"],
        'transmission.mode: "fast" is not known; write sync, async or two_batch',
    ),
    "unknown field": (
        ["--axis=transmision.mode=sync"],
        'transmision: is not a known field; did you mean "transmission"?',
    ),
    "unknown entry": (
        ["--axis=cluster.links[5].latency=1 us"],
        '--axis "cluster.links[5].latency": there is no entry 5; write one of 0, ethernet',
    ),
    "batch sizes": (
        ["--axis=workload.batch_sizes=[1],[2]"],
        "--axis: the batch sizes differ; write them all with --set workload.batch_sizes=[...]",
    ),
    "baseline value": (
        [MODES, "--baseline=transmission.mode=fast"],
        '--baseline "transmission.mode=fast": not a value of this axis; write one of sync, async',
    ),
    "baseline path": (
        [MODES, "--baseline=dedup=node"],
        '--baseline "dedup=node": not an axis; write path=value, path one of transmission.mode',
    ),
    "empty baseline": (
        [MODES, "--baseline="],
        '--baseline "": not an axis; write path=value, path one of transmission.mode',
    ),
    "baseline not YAML": (
        [MODES, "--baseline=transmission.mode=[x"],
        "--baseline \"transmission.mode=[x\": not YAML (line 1, column 3: expected ',' or ']', but got "
        "'<stream end>'); write values as in a file, quoted if need be",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparison(name: str, folder: Path, complaint: Complaint) -> None:
    (folder / "rows.csv").write_text("earlier")
    arguments, message = COMPARISONS[name]
    assert complaint("compare", "tiny.yaml", "--csv", "rows.csv", *arguments) == message


OUTPUTS = {
    ("simulate", "tiny.yaml", "--out", "tiny.yaml"): "tiny.yaml: is not a folder; name another path",
    ("simulate", "tiny.yaml", "--out", "tiny.yaml/a"): "tiny.yaml/a: {folder}tiny.yaml is not a folder; "
    "name another path",
    ("compare", "tiny.yaml", MODES, "--csv", "."): ".: it is a directory; name a file to write",
    ("compare", "tiny.yaml", MODES, "--csv", "no/rows.csv"): "no/rows.csv: there is no folder no; make it, or name "
    "another path",
    ("trace", "make", "tiny.yaml", "-o", "."): ".: it is a directory; name a file to write",
    ("trace", "make", "tiny.yaml", "-o", "out"): "out: it is a directory; name a file to write",
    ("trace", "make", "tiny.yaml", "-o", "no/t.trace"): "no/t.trace: cannot be written: No such file or directory",
}  # fmt: skip


@pytest.mark.parametrize("command", OUTPUTS, ids=" ".join)
def test_output(command: tuple[str, ...], folder: Path, complaint: Complaint) -> None:
    absolute = f"{folder}/" if command[-1].endswith("/a") else ""
    assert complaint(*command) == OUTPUTS[command].format(folder=absolute)


def test_export_without_a_format(folder: Path, complaint: Complaint, trace_bytes: bytes) -> None:
    (folder / "t.trace").write_bytes(trace_bytes)
    assert complaint("trace", "export", "t.trace") == "trace export: no format given; write --parquet"


def test_export_over_the_trace_itself(folder: Path, complaint: Complaint, trace_bytes: bytes) -> None:
    (folder / "t.parquet").write_bytes(trace_bytes)
    line = "t.parquet: would be replaced by its own export; name another file with -o"
    assert complaint("trace", "export", "t.parquet", "--parquet") == line


def test_parquet_into_a_directory(folder: Path, complaint: Complaint, trace_bytes: bytes) -> None:
    (folder / "t.trace").write_bytes(trace_bytes)
    command = ("trace", "export", "t.trace", "--parquet", "-o", "out")
    assert complaint(*command) == "out: it is a directory; name a file to write"


def test_output_is_not_writable(folder: Path, complaint: Complaint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder)
    message = f"new/run: {folder} is not writable; name another path"
    assert complaint("simulate", "tiny.yaml", "--out", "new/run") == message


def test_not_enough_memory(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What the machine lacks is not bad input: exit code 1, and one line all the same."""

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("epsim.scenario.load_scenario", fail)
    monkeypatch.setattr(sys, "argv", ["epsim", "simulate", "tiny.yaml"])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    message = "epsim: not enough memory on this machine; use smaller batches or shorter requests\n"
    assert (exit_info.value.code, capsys.readouterr()) == (1, ("", message))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["simulate", "gone.yaml"], FILES["model file"][1].replace("card", "gone").replace("model", "scenario")),
        (["simulate", "tiny.yaml", "--set", "model=olmo"], VALUES["model=olmo"]),
        (["trace", "info", "gone"], "gone: cannot be read: No such file or directory"),
        (["scenario", "show", "tiny.yaml", "--set", "name=5"], VALUES["name=5"]),
    ],
)
def test_in_a_process_of_its_own(arguments: list[str], line: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "epsim.cli", *arguments], capture_output=True, text=True, check=False, cwd=folder
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"epsim: {line}\n")


def test_debug_shows_the_traceback(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "epsim.cli", "--debug", "simulate", "gone.yaml"],
        capture_output=True, text=True, check=False, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert "ScenarioError: gone.yaml: cannot be read" in done.stderr


def test_an_output_that_is_no_regular_file_is_left_alone(folder: Path, complaint: Complaint) -> None:
    os.mkfifo(folder / "pipe")
    before = (folder / "pipe").lstat()
    command = ("compare", "tiny.yaml", "--axis", "trace.seed=0,1", "--csv", "pipe")
    assert complaint(*command) == "pipe: it is not a regular file; name a file to write"
    assert (folder / "pipe").lstat().st_mode == before.st_mode
