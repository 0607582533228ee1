"""Where a model goes and whether it fits: `resolve_device`, `resolve_dtype`, `check_memory`, `memory_errors`.

`quiet` is for loading.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from epsim.capture.models.source import DTYPES
from epsim.errors import CapacityError, InputError

GB = 1e9


def resolve_device(name: str) -> torch.device:
    """Return the device that `ModelSource.device` names, with its index; raises InputError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f'--device "{name}" is not known; write auto, cpu, cuda or cuda:<number>')
    if device.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError(f'--device "{name}": torch {torch.__version__} finds no CUDA device; write --device cpu')
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise InputError(f'--device "{name}": the last CUDA device is cuda:{torch.cuda.device_count() - 1}; write that')
    return torch.device("cuda", index)


def resolve_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Return the dtype that `ModelSource.dtype` names: bfloat16 on CUDA and float32 on the CPU if it names none."""
    chosen = name or ("bfloat16" if device.type == "cuda" else "float32")
    if chosen not in DTYPES:
        raise InputError(f'--dtype "{chosen}" cannot be run; write one of {", ".join(DTYPES)}')
    dtype: torch.dtype = getattr(torch, chosen)
    return dtype


def weight_bytes(module: PreTrainedModel) -> int:
    """Return the bytes of all weights and buffers of a model, which may be on the device "meta"."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def check_memory(
    needed_bytes: int, device: torch.device, what: str, advice: str, *, needed_for: str = "weights"
) -> None:
    """Raise CapacityError if the weights of `what` are larger than the memory that is free on `device`.

    `needed_for` says what else `needed_bytes` count. What the KV cache and a forward pass need comes on top. Nothing is
    checked where the operating system does not say what is free. `advice` is what else to write, e.g. "--reduced".
    """
    free = _free_cuda_bytes(device) if device.type == "cuda" else free_host_bytes()
    if free is not None and needed_bytes > free:
        raise CapacityError(
            f"{what}: needs {needed_bytes / GB:.1f} GB for its {needed_for}, and {device} has {free / GB:.1f} GB free; "
            f"write {advice}"
        )


def _free_cuda_bytes(device: torch.device) -> int:
    """What the driver has free, and what this process has reserved and does not use."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + unused)


def free_host_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Return the bytes of memory that programs can still get, or None if the operating system does not say."""
    try:
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


@contextmanager
def memory_errors(device: torch.device, smaller: str = "--batch-size or --chunk-size") -> Iterator[None]:
    """Turn memory that runs out in a forward or backward pass into a CapacityError; `smaller`: what may be so."""
    try:
        yield
    except RuntimeError as error:  # of which torch.OutOfMemoryError is one; the CPU has no error of its own
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise CapacityError(f"{device}: out of memory; write a smaller {smaller}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the log lines, progress bars and warnings of transformers from the terminal; what fails still raises."""
    verbosity, hub = transformers_logging.get_verbosity(), logging.getLogger("huggingface_hub")
    bars, hub_level = transformers_logging.is_progress_bar_enabled(), hub.level
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    hub.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        hub.setLevel(hub_level)
        if bars:
            transformers_logging.enable_progress_bar()


def circumstances(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What else decides on the figures that come out: as JSON takes it."""
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
