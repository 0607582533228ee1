"""What all figures share: `require_matplotlib`, `figure_style`, `png`.

matplotlib is an extra (`plot`) and is loaded only when a figure is drawn. The same values give the same bytes with the
same matplotlib.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from epsim.errors import InputError

DPI = 110


def require_matplotlib() -> None:
    """Raise InputError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(
            "figures need matplotlib; install it with: pip install -e '.[plot]' in epsim's folder"
        ) from error


@contextmanager
def figure_style(**changes: Any) -> Iterator[None]:
    """Draw into files, not onto a screen, and in the look of all figures; `changes` are rcParams."""
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    style.update(changes)
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a file's name may be in any script
        yield


def png(figure: Any) -> bytes:
    """Return the figure as a PNG file, and close it."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()
