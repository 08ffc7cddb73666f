"""The energy above the noise that a rank explains: InRank's rule, corrected."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from dynarank.ranks.base import AbstractRankPolicy, Decision, LayerSpectrum, PlanContext, check_fraction
from dynarank.ranks.estimated_noise_edge import EstimatedNoiseEdge


@dataclass(frozen=True)
class SignalEnergy(AbstractRankPolicy):
    """Keeps the smallest rank that holds a fraction ``explained`` of the energy above the noise, layer by layer.

    Another policy says how many directions ``p`` are signal. The strongest of the others, ``sigma_{p+1}``, is where
    noise ends, and what a direction stands above it, ``sigma_i^2 - sigma_{p+1}^2``, is the energy of its signal.

    It is the rule of InRank, `VarianceRatio`, with three corrections, so that an untrained layer does not grow:

    * energy, about zero, in the place of a variance about the mean, which is large or small as the spectrum is uneven
      or even;
    * the bulk of a random matrix is taken off first. There the buffer of untrained directions counts as signal, so
      the rank follows the size of the buffer;
    * a rank falls again where directions no longer hold anything.

    Args:
        policy: Policy that tells signal from noise, and whose candidates are tried.
        explained: Fraction of the energy of the signal to keep. InRank's 0.9 of the variance, taken here, cuts one of
            ten equal directions, and a direction that has just been found before it has grown.

    Example:
        >>> import torch
        >>> layer = LayerSpectrum("fc", torch.tensor([9.0, 8, 7, 3, 0.3, 0.3, 0.3, 0.3]).double(), (64, 48))
        >>> [SignalEnergy(explained=e).plan([layer], PlanContext(0, 0, 0))[0].rank for e in (0.9, 0.99)]
        [3, 4]

    Reference:
        The rule that is corrected: Zhao, Zhang, Chen, Schäfer, Anandkumar, "InRank: incremental low-rank learning",
        2023, https://arxiv.org/abs/2306.11250.
    """

    policy: AbstractRankPolicy = field(default_factory=EstimatedNoiseEdge)
    explained: float = 0.99

    def __post_init__(self) -> None:
        if not isinstance(self.policy, AbstractRankPolicy):
            raise TypeError(f"SignalEnergy: policy must be an instance of a rank policy, got {self.policy!r}.")
        check_fraction("SignalEnergy", "explained", self.explained)

    def plan(self, spectra: Sequence[LayerSpectrum], context: PlanContext) -> list[Decision]:
        """Return the rank that explains enough of what the policy takes for signal, for each layer."""
        found = self.policy.plan(spectra, context)
        return [self._decide(s, d) for s, d in zip(spectra, found, strict=True)]

    def _decide(self, spectrum: LayerSpectrum, signal: Decision) -> Decision:
        sigma, p = spectrum.sigma / spectrum.sigma[0].clamp_min(torch.finfo(torch.float64).tiny), signal.rank
        noise = sigma[p].square() if p < len(sigma) else 0.0
        explained = (sigma[:p].square() - noise).cumsum(0)
        if not explained[-1] > 0:
            return signal
        rank = 1 + int((explained < self.explained * explained[-1]).sum())
        reason = f"{self.explained:g} of the energy {signal.reason}"
        return Decision(min(rank, p), signal.candidates, reason)
