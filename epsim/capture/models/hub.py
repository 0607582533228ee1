"""A checkpoint of huggingface.co on this disk: `fetch`. Failures are one line each, and fast."""

from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from epsim.capture.modality_gate import FILE_NAME
from epsim.capture.models.checkpoint import one_line
from epsim.errors import InputError

DESCRIPTIONS = ("*.json", "*.jinja", "*.txt", "*.model")
WEIGHTS = ("model*.safetensors", FILE_NAME)
TIMEOUT_S = 10.0
_REFUSALS = (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError)  # a GatedRepoError is the second


def fetch(name: str, revision: str | None, patterns: Iterable[str]) -> Path:
    """Return the folder of the cache with the files of repository `name` that match; downloads what is missing.

    The folder's name is the commit. Without network, or with HF_HUB_OFFLINE set, the cache is taken as it is.
    Raises InputError for an unknown name or revision, a repository that asks for a login, and without network if
    the cache lacks it.
    """
    wanted = list(patterns)
    try:
        # One request that is not retried: without network, a download tries again for half a minute.
        info = HfApi().model_info(name, revision=revision, timeout=TIMEOUT_S)
    except _REFUSALS as error:
        raise _refused(name, revision, error) from error
    except Exception as error:
        return _cached(name, revision, wanted, error)
    files = [s.rfilename for s in info.siblings or () if any(_matches(s.rfilename, pattern) for pattern in wanted)]
    try:
        return Path(snapshot_download(name, revision=info.sha, allow_patterns=files or ["config.json"]))
    except _REFUSALS as error:
        raise _refused(name, revision, error) from error
    except Exception as error:
        raise InputError(f"{name}: the download broke off; run it again to go on ({one_line(error, 200)})") from error


def _matches(file: str, pattern: str) -> bool:
    return "/" not in file and fnmatch(file, pattern)


def _refused(name: str, revision: str | None, error: Exception) -> InputError:
    if isinstance(error, GatedRepoError):
        return InputError(f"{name}: its licence must be accepted on huggingface.co/{name}; then run: hf auth login")
    if isinstance(error, RevisionNotFoundError):
        return InputError(f'--revision "{revision}": {name} has no such branch, tag or commit; write one that it has')
    if isinstance(error, HFValidationError):
        return InputError(f'"{name}" is neither a folder nor a name on huggingface.co; write e.g. owner/model')
    return InputError(
        f"{name}: huggingface.co knows no such model, or it is private; check the name, or run: hf auth login"
    )


def _cached(name: str, revision: str | None, patterns: list[str], error: Exception) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True))
    except LocalEntryNotFoundError:
        raise InputError(
            f"{name}: cannot be fetched from huggingface.co, and is not in its cache on this machine; write the "
            f"folder of a checkpoint, or connect and unset HF_HUB_OFFLINE ({one_line(error, 200)})"
        ) from error
