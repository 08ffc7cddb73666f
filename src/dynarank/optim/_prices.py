"""What a rank policy decides; where several ranks share a core, at the prices to which its decisions lead."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from dynarank.layers._factored import AbstractFactoredLayer
from dynarank.ranks.base import AbstractRankPolicy, Decision, LayerSpectrum, PlanContext

ROUNDS = 8

Layers = Mapping[str, AbstractFactoredLayer]
Ranks = Mapping[str, int]


def decide(
    policy: AbstractRankPolicy, context: PlanContext, spectra: Sequence[LayerSpectrum], layers: Layers
) -> Sequence[Decision]:
    """Return a decision for each spectrum.

    A core shrinks with all its ranks at once, so that at today's prices too much would be cut. The policy is asked
    again at prices between those it saw and those its answer leads to; the largest answer counts that takes no more
    than the policy would spend.

    Raises:
        ValueError: The policy answers with something else than one decision each, within what there is.
    """
    if all(s.price is None for s in spectra):
        return _asked(policy, context, spectra)
    spectra = _repriced(spectra, layers, {s.name: 1 for s in spectra})
    room, answers = 0.0, []
    for _ in range(ROUNDS):
        decisions = _asked(policy, context, spectra)
        ranks = {s.name: d.rank for s, d in zip(spectra, decisions, strict=True)}
        room = max(room, sum(s.parameters(ranks[s.name]) for s in spectra))
        answers.append((_numbers(spectra, layers, ranks), decisions))
        spectra = _repriced(spectra, layers, ranks)
    fitting = [answer for answer in answers if answer[0] <= room]
    return (max(fitting, key=_size) if fitting else min(answers, key=_size))[1]


def _asked(policy: AbstractRankPolicy, context: PlanContext, spectra: Sequence[LayerSpectrum]) -> Sequence[Decision]:
    decisions, name = policy.plan(spectra, context), type(policy).__name__
    if len(decisions) != len(spectra):
        raise ValueError(f"{name} planned {len(decisions)} of {len(spectra)} layers; it must return one each.")
    for spectrum, decision in zip(spectra, decisions, strict=True):
        if not 1 <= decision.rank <= len(spectrum.sigma) or decision.candidates < 0:
            raise ValueError(
                f"{name} must keep 1 to {len(spectrum.sigma)} directions of {spectrum.name} and try 0 or more on "
                f"top, got {decision}."
            )
    return decisions


def _size(answer: tuple[float, Sequence[Decision]]) -> float:
    return answer[0]


def _repriced(spectra: Sequence[LayerSpectrum], layers: Layers, ranks: Ranks) -> list[LayerSpectrum]:
    """Return the spectra at prices between theirs and those at these ranks."""
    prices = _prices(layers, ranks)
    return [s if s.price is None else replace(s, price=(s.price * (prices[s.name] or 1)) ** 0.5) for s in spectra]


def _numbers(spectra: Sequence[LayerSpectrum], layers: Layers, ranks: Ranks) -> float:
    """Return what the layers take at these ranks."""
    prices = _prices(layers, ranks)
    return sum(replace(s, price=prices[s.name]).parameters(ranks[s.name]) for s in spectra)


def _prices(layers: Layers, ranks: Ranks) -> dict[str, float | None]:
    """Return by name what a direction takes at these ranks."""
    found: dict[str, float | None] = {}
    for name, layer in layers.items():
        names = [own for own in layer.ranks_by_name(name) if own in ranks]
        if names:
            found |= zip(names, layer.prices([ranks[own] for own in names]), strict=True)
    return found
