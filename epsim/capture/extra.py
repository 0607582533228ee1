"""Whether the libraries that run models are installed: `require_trace_extra`. Imports none of them."""

from importlib.util import find_spec

from epsim.errors import InputError

_PACKAGE_OF_MODULE = {
    "torch": "torch",
    "transformers": "transformers",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "skimage": "scikit-image",
}


def require_trace_extra() -> None:
    """Raise InputError, with the command that helps, if a library of the extra `[trace]` is not installed."""
    missing = [package for module, package in _PACKAGE_OF_MODULE.items() if find_spec(module) is None]
    if missing:
        raise InputError(f"running models needs {', '.join(missing)}; install with: pip install 'epsim[trace]'")
