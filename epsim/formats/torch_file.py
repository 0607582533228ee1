"""Files of torch.save, read without running what is in them: `load_torch`, `save_torch`, `tensor`.

torch is imported here alone, and only when such a file is asked for.
"""

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epsim.atomic import whole_file, write_errors
from epsim.errors import FormatError
from epsim.json_file import check_regular


def load_torch(path: Path, noun: str) -> Any:
    """Return what a .pt file holds: tensors (on the CPU), numbers, texts, lists and mappings, and nothing else.

    Raises FormatError if torch is not installed, or the file is damaged or holds anything else.
    """
    _require_torch(path)
    if path.suffix != ".pt":
        raise FormatError(f"{path}: does not end in .pt; write the path of {noun}")
    import torch

    try:
        check_regular(path)
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's on raw pickles, beside the line that says the same
            return torch.load(file, weights_only=True, map_location="cpu")
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror or error}; write the path of {noun}") from error
    except MemoryError:
        raise
    except Exception as error:  # of a damaged file torch raises many kinds, RuntimeError and UnpicklingError most
        raise FormatError(
            f"{path}: is no file of torch.save that holds only tensors and plain values; write {noun}"
        ) from error


def save_torch(path: Path, content: dict[str, NDArray[np.int32]]) -> None:
    """Write a mapping of int32 arrays as tensors, whole or not at all."""
    _require_torch(path)
    import torch

    with whole_file(path) as part, write_errors(path):
        torch.save({name: torch.from_numpy(np.array(array)) for name, array in content.items()}, part)


def tensor(value: object) -> object:
    """Return a tensor as a NumPy array (int32 where it holds whole numbers), anything else as it is."""
    if type(value).__module__.partition(".")[0] != "torch" or not hasattr(value, "numpy"):
        return value
    try:
        array: NDArray[Any] = value.numpy()
    except Exception:  # a kind of tensor that NumPy does not have: bfloat16, sparse
        return f"a tensor of {getattr(value, 'dtype', 'another kind')}"
    return array


def _require_torch(path: Path) -> None:
    if find_spec("torch") is None:
        raise FormatError(f"{path}: a .pt file needs torch; install it with: pip install 'epsim[trace]'")
