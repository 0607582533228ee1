"""Running statistics of each modality's hidden vectors: `GaussianStatistics`, of `Moments` of batches.

SMoES (arXiv 2604.23996) eq. 5-7, with C diagonal Gaussians per modality instead of one (table S5). `Density` is what
scores are computed from (eq. 8-9).

Shapes: T tokens, L MoE layers, M = 2 modalities (text, vision), C components of a modality, D hidden size.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

BETA = 0.99  # SMoES, supplement 1.3
TAU_FACTOR = 0.5  # tau = 0.5 D; SMoES, supplement 1.3 and table S8
VARIANCE_FLOOR = 1e-6
NUM_MODALITIES = 2
SUMS = ("count_LMC", "sum_LMCD", "square_LMCD")

_TINY = 1e-300  # against 0 / 0 where a modality has no tokens yet; the state is float64


@dataclass(frozen=True, kw_only=True)
class FittedModel:
    """Which model statistics belong to: name, real ids of the MoE layers, D, and a checksum of router weights."""

    name: str
    layer_ids: tuple[int, ...]
    hidden_size: int
    checksum: int


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Count, mean and sum of squared deviations of sets of tokens, float64; leading dimensions are free.

    Attributes:
        count_MC: [..., M, C], weights summed up, so not always whole numbers.
        mean_MCD: [..., M, C, D], 0 for an empty set.
        deviation_MCD: [..., M, C, D], sum of weight times (x - mean)^2.
    """

    count_MC: Tensor
    mean_MCD: Tensor
    deviation_MCD: Tensor

    def merged(self, other: "Moments") -> "Moments":
        """Return the moments of both sets together (Chan, Golub and LeVeque): exact, whatever the cut."""
        count = self.count_MC + other.count_MC
        share = (other.count_MC / count.clamp_min(_TINY)).unsqueeze(-1)
        shift = other.mean_MCD - self.mean_MCD
        cross = self.count_MC.unsqueeze(-1) * share * shift.square()
        return Moments(
            count_MC=count,
            mean_MCD=self.mean_MCD + share * shift,
            deviation_MCD=self.deviation_MCD + other.deviation_MCD + cross,
        )


def moments(x_TD: Tensor, weight_TMC: Tensor) -> Moments:
    """Return the weighted moments of x_TD, float [T, D], by the weights, float32 [T, M, C]; finite also where 0.

    Two passes in float32, the second corrected for the rounding of the first, so that a mean far from 0 costs nothing.
    """
    x_TD, weight_TA = x_TD.to(torch.float32), weight_TMC.flatten(1)
    count_A1 = weight_TA.sum(dim=0, dtype=torch.float64).unsqueeze(-1)
    divisor_A1 = count_A1.clamp_min(_TINY)
    mean_AD = (weight_TA.T @ x_TD / divisor_A1).to(torch.float32)
    rest_AD, square_AD = torch.empty_like(mean_AD), torch.empty_like(mean_AD)
    for a, weight_T in enumerate(weight_TA.unbind(dim=1)):
        centred_TD = x_TD - mean_AD[a]
        rest_AD[a] = weight_T @ centred_TD
        square_AD[a] = weight_T @ centred_TD.square()
    shape = (*weight_TMC.shape[1:], -1)
    rest_mean_AD = rest_AD / divisor_A1
    return Moments(
        count_MC=count_A1.view(*weight_TMC.shape[1:]),
        mean_MCD=(mean_AD + rest_mean_AD).view(shape),
        deviation_MCD=(square_AD - count_A1 * rest_mean_AD.square()).view(shape),
    )


@dataclass(kw_only=True, eq=False)
class GaussianStatistics:
    """Exponentially fading statistics of every MoE layer and modality, in float64.

    The EMA variant of Welford's algorithm of SMoES, eq. 5-7, as printed: a batch fades what was before it by beta,
    and counts by its tokens. With C > 1 the three sums are those of the components; `epsim.capture.scores.mixture`
    says how tokens are shared out among them. The weight of a component is its part of the modality's count, eq. 5.

    Attributes:
        model: the model that the vectors are of.
        beta: decay per batch, in (0, 1].
        tau_factor: the temperature of eq. 9 is tau = tau_factor * D.
        count_LMC: [L, M, C], N of eq. 5.
        sum_LMCD: [L, M, C, D], S_mu of eq. 6.
        square_LMCD: [L, M, C, D], S_sigma^2 of eq. 7.
        mock: of random tokens.
    """

    model: FittedModel
    beta: float
    tau_factor: float
    count_LMC: Tensor
    sum_LMCD: Tensor
    square_LMCD: Tensor
    mock: bool = False

    @classmethod
    def empty(
        cls,
        model: FittedModel,
        *,
        num_components: int = 1,
        beta: float = BETA,
        tau_factor: float = TAU_FACTOR,
        device: torch.device | str = "cpu",
    ) -> "GaussianStatistics":
        """Return statistics of no tokens."""
        shape = (len(model.layer_ids), NUM_MODALITIES, num_components)
        count = torch.zeros(shape, dtype=torch.float64, device=device)
        rows = torch.zeros(*shape, model.hidden_size, dtype=torch.float64, device=device)
        return cls(
            model=model,
            beta=beta,
            tau_factor=tau_factor,
            count_LMC=count,
            sum_LMCD=rows,
            square_LMCD=rows.clone(),
        )

    @property
    def num_components(self) -> int:
        """Gaussians per modality, C."""
        return self.count_LMC.shape[-1]

    def absorb(self, batch: Moments) -> None:
        """Take in one batch, its moments of all layers [L, M, C]: eq. 5-7."""
        faded = self.beta * self.count_LMC
        cross = faded * batch.count_MC / (faded + batch.count_MC).clamp_min(_TINY)
        shift = batch.mean_MCD - self._mean_LMCD()
        self.square_LMCD = self.beta * self.square_LMCD + batch.deviation_MCD + shift.square() * cross.unsqueeze(-1)
        self.sum_LMCD = self.beta * self.sum_LMCD + batch.count_MC.unsqueeze(-1) * batch.mean_MCD
        self.count_LMC = faded + batch.count_MC

    def missing_modalities(self) -> list[str]:
        """Return the names of the modalities that no token was of, in any layer. Waits for the device."""
        seen_M = (self.count_LMC.sum(dim=-1) > 0).all(dim=0).tolist()
        return [name for name, seen in zip(("text", "vision"), seen_M, strict=True) if not seen]

    def density(self) -> "Density":
        """Return what is needed for log-likelihoods under the statistics as they are now.

        A variance is at least 1e-6 of the mean variance of its layer (over modalities and dimensions), so that a
        dimension that never changed, or a component of one token, does not rule alone.
        """
        mean_LMCD = self._mean_LMCD()
        variance_LMCD = self.square_LMCD / self.count_LMC.clamp_min(_TINY).unsqueeze(-1)
        weight_LMC = self.count_LMC / self.count_LMC.sum(dim=-1, keepdim=True).clamp_min(_TINY)
        typical_L = (weight_LMC.unsqueeze(-1) * variance_LMCD).sum(dim=2).mean(dim=(1, 2))
        floor_L = (VARIANCE_FLOOR * typical_L).clamp_min(torch.finfo(torch.float32).tiny)
        variance_LMCD = variance_LMCD.clamp_min(floor_L[:, None, None, None])
        return Density.of(mean_LMCD, variance_LMCD, weight_LMC, tau=self.tau_factor * self.model.hidden_size)

    def to(self, device: torch.device | str) -> "GaussianStatistics":
        """Return the same statistics with their sums on `device`."""
        sums = {name: getattr(self, name).to(device) for name in SUMS}
        return replace(self, **sums)

    def _mean_LMCD(self) -> Tensor:
        return self.sum_LMCD / self.count_LMC.clamp_min(_TINY).unsqueeze(-1)


@dataclass(frozen=True, kw_only=True)
class Density:
    """Log-likelihoods as two matrix products per layer, float32: x^2 and x times per-component rows.

    The square of eq. 8 is written out, around the middle of the components' means, where the terms that cancel are
    no larger than the distance of the means asks for.

    Attributes:
        centre_LD: [L, D], taken from x first.
        square_LAD: [L, A = M C, D], -1/(2 sigma^2), times (x - centre)^2.
        linear_LAD: [L, A, D], (mu - centre)/sigma^2, times x - centre.
        constant_LA: [L, A], the rest of eq. 8, and the log of the component's weight.
        tau: temperature of eq. 9.
    """

    centre_LD: Tensor
    square_LAD: Tensor
    linear_LAD: Tensor
    constant_LA: Tensor
    tau: float

    @classmethod
    def of(cls, mean_LMCD: Tensor, variance_LMCD: Tensor, weight_LMC: Tensor, *, tau: float) -> "Density":
        """Return the density of components with these means, variances and weights, float64."""
        mass_LMC1 = weight_LMC.unsqueeze(-1)
        centre_LD = (mass_LMC1 * mean_LMCD).sum(dim=(1, 2)) / mass_LMC1.sum(dim=(1, 2)).clamp_min(_TINY)
        centre_LD = centre_LD.to(torch.float32).to(torch.float64)  # what x is compared with, to the bit
        mean_LAD = (mean_LMCD - centre_LD[:, None, None]).flatten(1, 2)
        variance_LAD = variance_LMCD.flatten(1, 2)
        constant_LA = -0.5 * (variance_LAD.log() + mean_LAD.square() / variance_LAD).sum(dim=-1)
        return cls(
            centre_LD=centre_LD.to(torch.float32),
            square_LAD=(-0.5 / variance_LAD).to(torch.float32),
            linear_LAD=(mean_LAD / variance_LAD).to(torch.float32),
            constant_LA=(constant_LA + weight_LMC.flatten(1).log()).to(torch.float32),
            tau=tau,
        )

    def component_likelihood(self, layer: int, x_TD: Tensor) -> Tensor:
        """Return log(weight) + eq. 8 of each component, float32 [T, M, C], of vectors in MoE layer index `layer`."""
        y_TD = x_TD.to(torch.float32) - self.centre_LD[layer]
        terms_TA = torch.addmm(self.constant_LA[layer], y_TD, self.linear_LAD[layer].T)
        terms_TA = torch.addmm(terms_TA, y_TD.square(), self.square_LAD[layer].T)
        return terms_TA.view(len(x_TD), NUM_MODALITIES, -1)

    def score(self, layer: int, x_TD: Tensor) -> Tensor:
        """Return the share of text, float32 [T]: eq. 9, the softmax of log-likelihood / tau over the modalities.

        The likelihood of a modality is the sum over its components, each with its weight.
        """
        terms_TMC = self.component_likelihood(layer, x_TD)
        likelihood_TM = terms_TMC.squeeze(-1) if terms_TMC.shape[-1] == 1 else terms_TMC.logsumexp(dim=-1)
        return torch.sigmoid((likelihood_TM[:, 0] - likelihood_TM[:, 1]) / self.tau)


def hard_weights(is_text_T: Tensor, is_token_T: Tensor) -> Tensor:
    """Return float32 [T, M]: 1 in the column of the token's modality, all 0 for padding."""
    return torch.stack((is_token_T & is_text_T, is_token_T & ~is_text_T), dim=-1).to(torch.float32)


def stacked(layers: list[Moments]) -> Moments:
    """Return the moments of several layers as one, with L in front."""
    return Moments(
        count_MC=torch.stack([layer.count_MC for layer in layers]),
        mean_MCD=torch.stack([layer.mean_MCD for layer in layers]),
        deviation_MCD=torch.stack([layer.deviation_MCD for layer in layers]),
    )
