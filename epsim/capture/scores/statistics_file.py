"""Gaussian statistics on disk, as safetensors with metadata: `save_statistics`, `load_statistics`.

The metadata is one JSON object under the key `epsim_gaussian_statistics`: whose statistics they are (`FittedModel`),
beta and the temperature's factor. The shapes say the rest.
"""

import json
import math
import os
import zlib
from dataclasses import asdict
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from epsim.atomic import whole_file, write_errors
from epsim.capture.model import MoeModel
from epsim.capture.scores.gaussian_statistics import NUM_MODALITIES, SUMS, FittedModel, GaussianStatistics
from epsim.errors import InputError

METADATA_KEY = "epsim_gaussian_statistics"
FORMAT_VERSION = 1


def fitted_model(model: MoeModel) -> FittedModel:
    """Return what tells statistics of `model` from those of another; the same on any device and in any float type.

    The checksum is of the router weights of the first and the last MoE layer, rounded to bfloat16.
    """
    checksum = 0
    for layer_id in (model.layer_ids[0], model.layer_ids[-1]):
        weight = model.layers[layer_id].mlp.gate.weight.detach().to(torch.bfloat16).cpu().contiguous()
        checksum = zlib.crc32(weight.view(torch.uint8).numpy().tobytes(), checksum)
    return FittedModel(name=model.name, layer_ids=model.layer_ids, hidden_size=model.hidden_size, checksum=checksum)


def save_statistics(statistics: GaussianStatistics, path: str | os.PathLike[str]) -> None:
    """Write `statistics` to `path`, whole or not at all. Raises OutputError if nothing can be written there."""
    about = {
        "format_version": FORMAT_VERSION,
        "model": asdict(statistics.model),
        "beta": statistics.beta,
        "tau_factor": statistics.tau_factor,
        "mock": statistics.mock,
    }
    tensors = {name: getattr(statistics, name).cpu().contiguous() for name in SUMS}
    with whole_file(path) as part, write_errors(part):
        part.write_bytes(save(tensors, metadata={METADATA_KEY: json.dumps(about)}))


def load_statistics(path: str | os.PathLike[str]) -> GaussianStatistics:
    """Read statistics that `save_statistics` wrote, to the CPU.

    Raises InputError if there is no such file, or if it is not one or damaged. That the statistics fit a model is
    checked where they are used.
    """
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in SUMS if name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else str(error).splitlines()[0]
        raise InputError(
            f"{path}: the Gaussian statistics cannot be read: {reason}; name a file that epsim trace fitted"
        ) from error
    return _statistics(path, metadata, tensors)


def _statistics(
    path: str | os.PathLike[str], metadata: dict[str, str], tensors: dict[str, Tensor]
) -> GaussianStatistics:
    if METADATA_KEY not in metadata:
        raise InputError(f"{path}: these are not Gaussian statistics; name a file that epsim fitted")
    try:
        about = json.loads(metadata[METADATA_KEY])
        version = about["format_version"]
        if version != FORMAT_VERSION:
            raise InputError(f"{path}: format version {version!r} is not {FORMAT_VERSION}; fit the statistics again")
        statistics = GaussianStatistics(
            model=_model(about["model"]),
            beta=float(about["beta"]),
            tau_factor=float(about["tau_factor"]),
            mock=bool(about["mock"]),
            **{name: tensors[name] for name in SUMS},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: the Gaussian statistics are damaged ({error}); fit them again") from error
    _check(path, statistics)
    return statistics


def _model(about: dict[str, Any]) -> FittedModel:
    return FittedModel(**(about | {"layer_ids": tuple(about["layer_ids"])}))


def _check(path: str | os.PathLike[str], statistics: GaussianStatistics) -> None:
    """Raise InputError unless the sums have the shapes that the metadata says, and can be sums."""
    model, count = statistics.model, statistics.count_LMC
    if not (0 < statistics.beta <= 1 and 0 < statistics.tau_factor < math.inf):
        raise InputError(f"{path}: beta or tau_factor holds a value that cannot be; fit the statistics again")
    rows = (len(model.layer_ids), NUM_MODALITIES, count.shape[-1] if count.ndim else 0)
    shapes = {"count_LMC": rows, "sum_LMCD": (*rows, model.hidden_size), "square_LMCD": (*rows, model.hidden_size)}
    for name, shape in shapes.items():
        tensor = getattr(statistics, name)
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float64:
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise InputError(f"{path}: {name} is {found} and must be torch.float64 {shape}; fit the statistics again")
        if (
            not tensor.numel()
            or not math.isfinite(tensor.sum().item())
            or (name != "sum_LMCD" and tensor.min().item() < 0)
        ):
            raise InputError(f"{path}: {name} holds values that cannot be; fit the statistics again")
