"""Checkpoints on a disk: what they are (`Checkpoint`, `open_checkpoint`) and their weights (`load_weights`,
`save_weights`).

Weights are safetensors, whole or in shards, in the layout of the hub or as transformers saves them. Code that a
checkpoint brings along is never run.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    DeepseekV3ForCausalLM,
    LlavaForConditionalGeneration,
    MixtralForCausalLM,
    OlmoeForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeForCausalLM,
)

from epsim.capture.modality_gate import FILE_NAME as MODALITY_GATE
from epsim.capture.models.deepseek import DeepseekForCausalLM, check_expressible
from epsim.errors import CapacityError, InputError

TEXT_MODELS: dict[str, type[PreTrainedModel]] = {
    "olmoe": OlmoeForCausalLM,
    "deepseek": DeepseekForCausalLM,
    "deepseek_v3": DeepseekV3ForCausalLM,
    "qwen3_moe": Qwen3MoeForCausalLM,
    "mixtral": MixtralForCausalLM,
}
VISION_TYPES = ("clip_vision_model", "siglip_vision_model")
_EXPERT = re.compile(r"(.*\.experts\.)(\d+)(\..*)")
HASHED_BYTES = 2048
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder whose config.json names an architecture that can be run."""

    folder: Path
    config: PreTrainedConfig
    model_class: type[PreTrainedModel]

    def fingerprint(self) -> dict[str, str]:
        """Return SHA-256 of config.json, and of the weights: names, shapes and the first bytes of every tensor.

        With a modality gate, of that file too. To hash all bytes of the weights would take as long as loading them. A
        tensor that was trained differs from its start.
        """
        weights = hashlib.sha256()
        for path in weight_files(self.folder):
            weights.update(path.name.encode())
            _hash_tensors(path, weights)
        config = hashlib.sha256((self.folder / "config.json").read_bytes())
        found = {"config_sha256": config.hexdigest(), "weights_sha256": weights.hexdigest()}
        gate = self.folder / MODALITY_GATE
        if gate.is_file():
            found["modality_gate_sha256"] = hashlib.sha256(gate.read_bytes()).hexdigest()
        return found


def open_checkpoint(folder: Path) -> Checkpoint:
    """Return what config.json in `folder` says; raises InputError if that cannot be run. Reads no weights."""
    raw = read_json(folder / "config.json")
    model_type = raw.get("model_type")
    if raw.get("quantization_config"):
        raise InputError(f"{folder}: is quantised, which epsim does not run; write a checkpoint of 16 or 32 bit")
    if model_type == "llava":
        _check_vision(folder, raw)
        _check_text(folder, raw.get("text_config") or {}, "text_config.")
        model_class: type[PreTrainedModel] = LlavaForConditionalGeneration
    else:
        _check_text(folder, raw, "")
        model_class = TEXT_MODELS[raw["model_type"]]
    try:
        config = model_class.config_class.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise InputError(f"{folder}/config.json: {one_line(error)}; write the config.json of the model") from error
    return Checkpoint(folder=folder, config=config, model_class=model_class)


def load_weights(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Return the model with its weights as `dtype` on `device`.

    With the library accelerate, weights go straight to a CUDA device; without it through the memory of the host.
    Raises InputError if files are missing, damaged, or do not have exactly the tensors that config.json asks for.
    """
    check_expert_tensors(weight_files(checkpoint.folder))
    direct = device.type != "cpu" and not through_host(device)
    try:
        module, info = checkpoint.model_class.from_pretrained(
            checkpoint.folder,
            config=checkpoint.config,
            dtype=dtype,
            device_map={"": device} if direct else None,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below, with names
            output_loading_info=True,
        )
        loaded: PreTrainedModel = module.to(device)
    except torch.OutOfMemoryError as error:
        raise CapacityError(f"{checkpoint.folder}: does not fit into the memory of {device}; free some") from error
    except (RuntimeError, OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"{checkpoint.folder}: its weights cannot be loaded: {one_line(error)}") from error
    _check_loaded(checkpoint.folder, info)
    return loaded


def save_weights(module: PreTrainedModel, folder: Path) -> None:
    """Write weights and config.json into a folder; raises OSError if that cannot be, as where the disk is full."""
    try:
        module.save_pretrained(folder)
    except SafetensorError as error:  # what its writer makes of an OSError
        raise OSError(one_line(error)) from error


def through_host(device: torch.device) -> bool:
    """Return whether weights are in the memory of the host on their way to `device`: transformers needs accelerate."""
    return device.type == "cpu" or find_spec("accelerate") is None


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint; raises InputError if one is missing or damaged."""
    if (folder / SINGLE).is_file():
        files = [folder / SINGLE]
    elif (folder / INDEX).is_file():
        shards = read_json(folder / INDEX).get("weight_map", {}).values()
        files = [folder / name for name in sorted(set(shards))]
    else:
        files = []
    if not files:
        raise InputError(f"{folder}: has no {SINGLE} or {INDEX}; write a checkpoint with its weights as safetensors")
    if missing := [path.name for path in files if not path.is_file()]:
        raise InputError(f"{folder}: lacks {len(missing)} of {len(files)} files of weights, e.g. {missing[0]}; get it")
    for path in files:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: is damaged or cut off ({one_line(error)}); get it again") from error
    return files


def _hash_tensors(path: Path, digest: Any) -> None:
    """Add a safetensors file to a hash: its header, which says where tensors are, and `HASHED_BYTES` of each."""
    with path.open("rb") as file:
        size = file.read(8)
        header = file.read(int.from_bytes(size, "little"))
        digest.update(header)
        start = file.tell()
        for name, entry in json.loads(header).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                file.seek(start + begin)
                digest.update(file.read(min(end - begin, HASHED_BYTES)))


def check_expert_tensors(files: list[Path]) -> None:
    """Raise InputError, with a name, if a layer lacks a tensor of one expert or has it in another shape.

    transformers joins the tensors of all experts, and does not say which one is wrong.
    """
    shapes: dict[tuple[str, str], dict[int, list[int]]] = {}
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                if match := _EXPERT.fullmatch(name):
                    before, expert, after = match.groups()
                    shapes.setdefault((before, after), {})[int(expert)] = tensors.get_slice(name).get_shape()
    num_experts: dict[str, int] = {}
    for (before, _), of_experts in shapes.items():
        num_experts[before] = max(num_experts.get(before, 0), max(of_experts) + 1)
    for (before, after), of_experts in shapes.items():
        for expert in range(num_experts[before]):
            name, shape, usual = f"{before}{expert}{after}", of_experts.get(expert), next(iter(of_experts.values()))
            if shape != usual:
                found = "is missing" if shape is None else f"is {shape} and those of other experts are {usual}"
                raise InputError(f"{files[0].parent}: tensor {name} {found}; get the checkpoint again")


def one_line(error: BaseException, limit: int = 300) -> str:
    """Return the message of an error on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + " …"


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a checkpoint; raises InputError if there is none."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path.parent}: has no {path.name} that can be read; write a checkpoint's folder") from error
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({one_line(error)}); get it again") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path}: is not a JSON object; get it again")
    return raw


def _check_text(folder: Path, raw: Mapping[str, Any], prefix: str) -> None:
    model_type = raw.get("model_type")
    if model_type not in TEXT_MODELS:
        experts = ("num_experts", "n_routed_experts", "num_local_experts", "num_experts_per_tok")
        dense = not any(raw.get(name) for name in experts)
        found = f'{prefix}model_type "{model_type}"' if model_type else f"no {prefix}model_type"
        problem = "has no experts to route to" if dense else "is not an architecture that epsim runs"
        raise InputError(f"{folder}: {found} {problem}; write a checkpoint of one of {', '.join(TEXT_MODELS)}")
    if model_type == "deepseek":
        check_expressible(raw, f"{folder}/config.json: {prefix}")


def _check_vision(folder: Path, raw: Mapping[str, Any]) -> None:
    vision_type = (raw.get("vision_config") or {}).get("model_type", VISION_TYPES[0])
    if vision_type not in VISION_TYPES:
        raise InputError(
            f'{folder}: vision_config.model_type "{vision_type}" is not an encoder that epsim runs; '
            f"write a LLaVA checkpoint with one of {', '.join(VISION_TYPES)}"
        )


def _check_loaded(folder: Path, info: Mapping[str, Any]) -> None:
    """Hold what transformers only warns of: every tensor that the config asks for was there, and no other."""
    problems = []
    if missing := sorted(info["missing_keys"]):
        problems.append(f"{len(missing)} missing, e.g. {', '.join(missing[:2])}")
    if mismatched := sorted(info["mismatched_keys"]):
        name, found, wanted = mismatched[0]
        shapes = f"{name} is {list(found)} and should be {list(wanted)}"
        problems.append(f"{len(mismatched)} of another shape, e.g. {shapes}")
    if unexpected := sorted(info["unexpected_keys"]):
        problems.append(f"{len(unexpected)} too many, e.g. {', '.join(unexpected[:2])}")
    if problems:
        raise InputError(
            f"{folder}: the weights do not match config.json: tensors {'; '.join(problems)}; "
            "write a folder whose two belong together"
        )
