"""Table S12: inference time as `a + b * batch`, two constants per row, `affine_report`.

The paper names neither GPU nor network, workload or transfer ratios, so no simulation of it could be honest. What can
be said is how much of the table a line explains: serial work per request on a constant.
"""

from typing import Any

import numpy as np

from epsim.validate.published import Floats, Published


def affine_report(published: Published) -> dict[str, Any]:
    """Return constants, s, and in percent errors, in sample and with each batch size left out, and mean savings."""
    batch_B = np.array(published.batch_sizes, dtype=np.float64)
    rows = [_row(method, batch_B, times_B) for method, times_B in published.s12.items()]
    fitted = {key: _change(*(np.array(row[key]) for row in rows)) for key in ("predicted_s", "left_out_s")}
    return {
        "batch_sizes": list(published.batch_sizes),
        "rows": rows,
        "max_error_percent": max(max(map(abs, row["error_percent"])) for row in rows),
        "max_left_out_error_percent": max(max(map(abs, row["left_out_error_percent"])) for row in rows),
        "saving_percent": -fitted["predicted_s"],
        "left_out_saving_percent": -fitted["left_out_s"],
        "published_saving_percent": -published.s12_mean_change_percent,
        "saving_error_points": abs(published.s12_mean_change_percent - fitted["predicted_s"]),
    }


def fit_affine(batch_B: Floats, times_B: Floats) -> tuple[float, float]:
    """Return a and b, s, of `a + b * batch` with the least squared relative errors."""
    scaled = np.stack([1 / times_B, batch_B / times_B], axis=1)
    a_s, b_s = np.linalg.lstsq(scaled, np.ones(len(batch_B)), rcond=None)[0]
    return float(a_s), float(b_s)


def _row(method: str, batch_B: Floats, times_B: Floats) -> dict[str, Any]:
    a_s, b_s = fit_affine(batch_B, times_B)
    left_out_B = np.empty_like(times_B)
    for i in range(len(batch_B)):
        others = np.arange(len(batch_B)) != i
        a_other_s, b_other_s = fit_affine(batch_B[others], times_B[others])
        left_out_B[i] = a_other_s + b_other_s * batch_B[i]
    predicted_B = a_s + b_s * batch_B
    return {
        "method": method,
        "a_s": a_s,
        "b_s": b_s,
        "published_s": times_B.tolist(),
        "predicted_s": predicted_B.tolist(),
        "error_percent": (100 * (predicted_B / times_B - 1)).tolist(),
        "left_out_s": left_out_B.tolist(),
        "left_out_error_percent": (100 * (left_out_B / times_B - 1)).tolist(),
    }


def _change(baseline_B: Floats, other_B: Floats) -> float:
    return float(np.mean(100 * (other_B / baseline_B - 1)))
