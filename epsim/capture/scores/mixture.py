"""How tokens are shared out among the Gaussians of a modality: `responsibilities`, and `seed_components` for the start.

SMoES tries k = 2 and 4 components (table S5, supplement 2.2), but gives no rule to fit them. Ours is online EM:

- Start: the tokens of the first batch that has any of the modality are split into C sets. Centres are drawn far from
  each other (k-means++, seeded), then moved by a few rounds of Lloyd's algorithm, all in units of each dimension's
  standard deviation. The sets' moments are the first update.
- Every later batch: the responsibility of a component for a token, under the statistics of before the batch, is the
  token's weight in eq. 5-7 of that component. No temperature: tau is only in eq. 9.
- The weight of a component is its part of the modality's fading count.

A component that gets no token at the start (fewer different tokens than components) stays empty. With one component
every responsibility is 1, and this is the plain Gaussian.

Shapes: T tokens, M = 2 modalities (text, vision), C components of a modality, D hidden size.
"""

import numpy as np
import torch
from torch import Tensor

from epsim.capture.scores.gaussian_statistics import Density

LLOYD_ROUNDS = 5


def responsibilities(density: Density, layer: int, x_TD: Tensor, weight_TM: Tensor) -> Tensor:
    """Return each token's weight in each component of its modality, float32 [T, M, C]: they sum up to `weight_TM`.

    Modalities without statistics get 0.
    """
    share_TMC = density.component_likelihood(layer, x_TD).softmax(dim=-1)
    return torch.where(share_TMC.isfinite(), share_TMC * weight_TM.unsqueeze(-1), 0.0)


def seed_components(x_TD: Tensor, weight_T: Tensor, draws_C: np.ndarray) -> Tensor:
    """Return which component each token starts in: float32 [T, C], one 1 in the row of a token that counts.

    Args:
        x_TD: float [T, D].
        weight_T: float32 [T], 1 for tokens of the modality, else 0; at least one is 1.
        draws_C: float64 [C], uniform in [0, 1): the seeded randomness.
    """
    unit_TD = _standardised(x_TD.to(torch.float32), weight_T)
    centre_CD = _spread_centres(unit_TD, weight_T, draws_C)
    for _ in range(LLOYD_ROUNDS):
        member_TC = _nearest(unit_TD, centre_CD) * weight_T[:, None]
        count_C1 = member_TC.sum(dim=0)[:, None]
        centre_CD = torch.where(count_C1 > 0, member_TC.T @ unit_TD / count_C1.clamp_min(1.0), centre_CD)
    return _nearest(unit_TD, centre_CD) * weight_T[:, None]


def _standardised(x_TD: Tensor, weight_T: Tensor) -> Tensor:
    weight_T1 = weight_T[:, None]
    count = weight_T.sum().clamp_min(1.0)
    centred_TD = (x_TD - (weight_T1 * x_TD).sum(dim=0) / count) * weight_T1
    variance_D = centred_TD.square().sum(dim=0) / count
    floor = torch.finfo(torch.float32).eps * variance_D.mean() + torch.finfo(torch.float32).tiny
    return centred_TD / (variance_D + floor).sqrt()


def _spread_centres(unit_TD: Tensor, weight_T: Tensor, draws_C: np.ndarray) -> Tensor:
    """Return C tokens: the first by chance, each other with a chance by its squared distance from those before it."""
    chance_T, centres = weight_T, []
    for draw in draws_C.tolist():
        cumulative_T = chance_T.to(torch.float64).cumsum(dim=0)
        index = torch.searchsorted(cumulative_T, (draw * cumulative_T[-1:]), right=True)
        centres.append(unit_TD.index_select(0, index.clamp_max(len(unit_TD) - 1)).squeeze(0))
        distance_T = (unit_TD - centres[-1]).square().sum(dim=1) * weight_T
        chance_T = distance_T if len(centres) == 1 else torch.minimum(chance_T, distance_T)
    return torch.stack(centres)


def _nearest(unit_TD: Tensor, centre_CD: Tensor) -> Tensor:
    nearest_T = torch.cdist(unit_TD, centre_CD).argmin(dim=1)
    return torch.nn.functional.one_hot(nearest_T, len(centre_CD)).to(torch.float32)
