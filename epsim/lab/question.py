"""What is asked of the lab: `Question` (a scenario on a trace) by `ask`, and its policies, `Choice`, by `choose`."""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from epsim.cluster import Cluster
from epsim.errors import InputError, ScenarioError
from epsim.model import ModelCard
from epsim.placement import POLICIES
from epsim.placement.exact import Exact
from epsim.placement.policies import Contiguous
from epsim.run import model_and_cluster
from epsim.scenario import ScenarioSpec, apply_overrides, check_scenario, load_raw
from epsim.scenario.load import preset_names
from epsim.scenario.spec import WorkloadSpec
from epsim.scenario.yaml_text import parse_yaml, read_mapping
from epsim.trace import TraceSource
from epsim.trace.file import TraceFile
from epsim.traces import checked_trace

BATCH_SIZES = [1, 8]  # unless the scenario says some
ALL = "all"
_SECTIONS = ("model", "cluster")


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """A policy with its parameters. label: as the user wrote it. spec: the scenario with it as its placement."""

    label: str
    spec: ScenarioSpec

    @property
    def kind(self) -> str:
        """The name of the policy."""
        return self.spec.placement.policy


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """A scenario without a placement, its model, cluster and trace.

    raw: the scenario as `check_scenario` takes it. load_MLE: how often the whole trace chose each expert.
    most_batches: of each size; None: as many as the requests fill.
    """

    raw: dict[str, Any]
    spec: ScenarioSpec
    model: ModelCard
    cluster: Cluster
    trace: TraceSource
    load_MLE: npt.NDArray[np.int64]
    most_batches: int | None

    def with_placement(self, fields: dict[str, Any]) -> ScenarioSpec:
        """Return the scenario with a placement section."""
        return check_scenario({**copy.deepcopy(self.raw), "placement": fields})

    def num_batches(self, batch_size: int, num_requests: int) -> int:
        """Return how many full batches of a size the requests are simulated in."""
        full = num_requests // batch_size
        return full if self.most_batches is None else min(full, self.most_batches)

    def num_steps(self, batch_size: int, decode_Q: npt.NDArray[np.integer]) -> int:
        """Return the steps of these batches: a prefill each, and as many decode steps as its longest request has.

        decode_Q: the decode tokens of the requests, in their order.
        """
        most, size = self.spec.workload.max_output_tokens, batch_size
        batches = range(self.num_batches(size, len(decode_Q)))
        longest = [int(decode_Q[batch * size : (batch + 1) * size].max()) for batch in batches]
        return sum(1 + (one if most is None else min(one, most - 1)) for one in longest)


def ask(
    trace: Path,
    *,
    scenario: Path | None = None,
    model: str | None = None,
    cluster: str | None = None,
    overrides: Sequence[str] = (),
) -> Question:
    """Return the question of a trace: a scenario's (its own trace and placement do not count), or model and cluster.

    Raises InputError, one line, for whatever does not fit together.
    """
    raw = _raw(TraceFile.open(trace), scenario, model, cluster)
    _override(raw, overrides)
    workload: Any = raw.get("workload") or {}
    if not isinstance(workload, dict):
        check_scenario(raw)  # raises
    most_batches = workload.get("num_batches")
    raw["workload"] = {"batch_sizes": BATCH_SIZES, **workload}
    spec = check_scenario(copy.deepcopy(raw))
    if spec.parallelism.kind != "ep":
        raise ScenarioError(
            f'parallelism.kind: "{spec.parallelism.kind}" spreads experts another way; policies are compared under ep'
        )
    card, built = model_and_cluster(spec)
    source, load_MLE = checked_trace(spec.trace, card, one_request(spec))
    return Question(
        raw=raw, spec=spec, model=card, cluster=built, trace=source, load_MLE=load_MLE, most_batches=most_batches
    )


def _override(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Apply overrides in place; ScenarioError for one, or a file of some, that changes what the command itself sets."""
    trace = dict(raw["trace"])
    for text in overrides:
        apply_overrides(raw, [text])
        if raw["trace"] != trace:
            raise ScenarioError(f'--set "{text}": trace is what this command sets; name the file as the argument')
        if "placement" in raw:
            raise ScenarioError(f'--set "{text}": placement is what this command sets; write policies with --policy')


def _raw(trace: TraceFile, scenario: Path | None, model: str | None, cluster: str | None) -> dict[str, Any]:
    raw: dict[str, Any] = {"name": f"placements of {trace.path.name}"} if scenario is None else load_raw(scenario)
    raw.pop("placement", None)
    raw["trace"] = {"kind": "file", "path": str(trace.path)}
    if model is None and "model" not in raw:
        model = trace.meta.model
        if model not in preset_names("model"):
            raise InputError(
                f"--model: {trace.path} is of {model!r}, which is no preset; write --model or --scenario"
                if model
                else f"--model: {trace.path} names no model; write --model or --scenario"
            )
    if cluster is None and "cluster" not in raw:
        raise InputError("--cluster: is missing; write a preset, a path that ends in .yaml, or --scenario")
    raw |= {key: value for key, value in (("model", model), ("cluster", cluster)) if value is not None}
    return raw


def one_request(spec: ScenarioSpec) -> WorkloadSpec:
    """Return a workload that any trace has the requests for; batches are counted later."""
    return spec.workload.model_copy(update={"batch_sizes": [1], "num_batches": 1})


def parse_policy(text: str, question: Question, option: str = "--policy") -> Choice:
    """Return the policy of `kind,param=value,...`; values are read as YAML, and the scenario's own check holds them.

    option: where the text stands, for messages. Raises ScenarioError, one line, for what is no policy or has no such
    parameter.
    """
    kind, *pairs = re.split(r",(?=[^,=]+=)", text.strip())  # a value may hold commas
    fields: dict[str, Any] = {"policy": kind}
    if "," in kind:
        raise ScenarioError(
            f'{option} "{text}": "{kind.partition(",")[2]}" has no value; write param=value, e.g. random,seed=3'
        )
    for pair in pairs:
        name, _, value = pair.partition("=")
        if name.strip() in fields:
            raise ScenarioError(f'{option} "{text}": {name.strip()} is there twice; write it once')
        try:
            fields[name.strip()] = parse_yaml(value)
        except ValueError as error:
            raise ScenarioError(f'{option} "{text}": {value!r} is not YAML ({error}); write it as in a file') from error
    try:
        return Choice(label=text.strip(), spec=question.with_placement(fields))
    except ScenarioError as error:
        raise ScenarioError(f'{option} "{text}": {error}') from error


@dataclass(frozen=True, kw_only=True, eq=False)
class Chosen:
    """The policies to compare.

    baseline: a label; None: the first that applies. baseline_named: the user named it, so that it has to apply.
    first: the label of the first policy asked for. optional: those that do not apply are left out.
    left_out: why, by label, of those of which that is known already.
    """

    choices: tuple[Choice, ...]
    baseline: str | None
    baseline_named: bool
    first: str
    optional: bool
    left_out: Mapping[str, str]

    def unless_left_out(self, label: str, error: InputError) -> str:
        """Return the reason to leave a policy out that does not apply, or raise the error if it has to apply."""
        if self.baseline_named and label == self.baseline:
            raise InputError(f'--baseline "{label}": {error}') from error
        if not self.optional:
            raise error
        return str(error)


def choose(texts: Sequence[str], baseline: str | None, question: Question, otherwise: str | None = None) -> Chosen:
    """Return the policies of texts as `parse_policy` reads them.

    `all`: every policy that has no required parameters, with `contiguous` as the baseline unless another is named. A
    baseline that is not among the policies is put first. otherwise: the baseline where none is named, without `all`.
    Raises ScenarioError for a policy that is there twice.
    """
    named = [text.strip() for text in texts if text.strip() != ALL]
    optional = len(named) < len(texts)
    for i, text in enumerate(named):
        if text in named[:i]:
            raise ScenarioError(f'--policy "{text}": is there twice; write it once')
    left_out: dict[str, str] = {}
    choices: list[Choice] = []
    for text in texts:
        if text.strip() == ALL:
            choices += _every(question, [choice.label for choice in choices] + named, left_out)
        else:
            choices.append(parse_policy(text, question))
    first = choices[0].label
    named_baseline = None if baseline is None else baseline.strip()
    label = named_baseline or (Contiguous.kind if optional else otherwise)
    if label is not None and label not in [choice.label for choice in choices]:
        choices.insert(0, parse_policy(label, question, "--baseline"))
        left_out.pop(label, None)
    return Chosen(
        choices=tuple(choices),
        baseline=label,
        baseline_named=named_baseline is not None,
        first=first,
        optional=optional,
        left_out=left_out,
    )


def files_read(question: Question, chosen: Chosen, scenario: Path | None) -> list[Path]:
    """Return the files that hold the model, the cluster and the placements, as far as they are named by a path."""
    written = {} if scenario is None else read_mapping(scenario, "scenario")  # overrides put contents in their place
    folder = Path() if scenario is None else scenario.parent
    named = [(Path(), question.raw[section]) for section in _SECTIONS]
    named += [(folder, written.get(section)) for section in _SECTIONS]
    files = [at / name for at, name in named if isinstance(name, str) and name.endswith((".yaml", ".yml"))]
    paths = [getattr(choice.spec.placement, "path", None) for choice in chosen.choices]
    return files + [Path(path) for path in paths if path is not None]


def _every(question: Question, named: Sequence[str], left_out: dict[str, str]) -> Iterator[Choice]:
    """Yield every policy with default parameters that is not named; note why one cannot be had without some."""
    for kind in POLICIES:
        if kind in named:
            continue
        if kind == Exact.kind:
            left_out[kind] = (
                "is for small cases, and may take a minute a layer to say that it cannot; ask for it by name"
            )
            continue
        try:
            yield Choice(label=kind, spec=question.with_placement({"policy": kind}))
        except ScenarioError as error:
            left_out[kind] = str(error)
