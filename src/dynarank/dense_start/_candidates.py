"""The dense layers that may become low-rank while they train."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dynarank import cost, linalg
from dynarank.factorize._heads import find_heads
from dynarank.factorize._plan import Options, Plan, check_known, plan_site
from dynarank.factorize._select import Selection, shortened
from dynarank.factorize._sites import find_sites, multiplying
from dynarank.factorize.sites import carry_attributes
from dynarank.factors import FactorPair, LowRankFactors


@dataclass(frozen=True)
class Candidate:
    """A dense layer.

    Args:
        name: Its qualified name.
        twin: A low-rank layer with its options, on the meta device, which knows how the weight becomes a matrix.
    """

    name: str
    twin: Any

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(m, n)`` of the weight as a matrix."""
        return self.twin.matrix_shape

    @property
    def full(self) -> int:
        """Full rank."""
        return min(self.shape)

    def pays(self, rank: int) -> bool:
        """Whether two factors of this rank hold less than the dense weight."""
        return rank <= self.most

    @property
    def most(self) -> int:
        """Largest rank that pays."""
        return cost.break_even_rank(*self.shape)

    def matrix(self, weight: Tensor) -> Tensor:
        """Return a weight, or anything else of its shape, as ``(m, n)``, detached, in at least float32."""
        return linalg.widen(self.twin.as_matrix(weight.detach()))

    def build(self, dense: Any, point: LowRankFactors, *, form: Literal["pair", "core"]) -> Any:
        """Return a low-rank layer with these factors to take the place of the dense one, whose bias it shares."""
        layer = _empty_twin(type(self.twin), dense).to_empty(device=dense.weight.device)
        layer.train(dense.training).requires_grad_(dense.weight.requires_grad)
        layer.set_factors(point, form=form)
        if getattr(dense, "bias", None) is not None:
            layer.bias = dense.bias
        carry_attributes(dense, layer, fresh=layer.dense_twin("meta"))
        return layer

    def sample(self, dense: Any, *, rank: int) -> Any:
        """Return a low-rank layer of random factors that takes the inputs of the dense one and shares nothing with it.

        The global generator is not touched.
        """
        layer = _empty_twin(type(self.twin), dense).to_empty(device=dense.weight.device)
        generator = torch.Generator().manual_seed(0)
        A, B = (torch.randn(rank, size, generator=generator) / size**0.5 for size in self.shape)
        layer.set_factors(FactorPair(A, B))
        if getattr(layer, "bias", None) is not None:
            nn.init.zeros_(layer.bias)
        return layer


StayDense = Callable[[Mapping[str, Candidate]], Mapping[str, str]]


def find_candidates(
    model: nn.Module, choice: Mapping[str, Any], stay_dense: StayDense | None = None
) -> tuple[dict[str, Candidate], dict[str, str]]:
    """Return the trainable dense layers for which some rank pays, and why others that have a low-rank twin are none.

    Args:
        model: The dense model; it is left as it is.
        choice: ``target_modules``, ``exclude_modules``, ``include_head`` and ``conv_form`` as in `factorize_`.
        stay_dense: Says which of those candidates are to be none after all, and why.

    Raises:
        ValueError: There is none, a name matches nothing, or convolutions would get ranks in several modes.
    """
    form = choice.get("conv_form", "matrix")
    if str(form).startswith("tucker"):
        raise ValueError(
            f"conv_form must be 'matrix' or 'spatial' for a dense start, got {form!r}: a core in several modes has no "
            "bases that could stay."
        )
    plans = _plans(model, choice, form)
    reasons = {plan.site.name: _reason(plan) for plan in plans if plan.site.twin is not None}
    found = {
        plan.site.name: Candidate(plan.site.name, _empty_twin(plan.target.twin, plan.site.module))
        for plan in plans
        if plan.target is not None and not reasons[plan.site.name]
    }
    if stay_dense is not None and found:
        reasons |= stay_dense(found)
    if all(reasons.values()):
        why = shortened([f"{name or 'the model'} ({reason})" for name, reason in reasons.items()])
        raise ValueError(
            f"no layer could go low-rank: {why if reasons else 'the model has no layer with a low-rank twin'}. "
            "Check target_modules, exclude_modules and include_head."
        )
    left = {name: reason for name, reason in reasons.items() if reason}
    return {name: candidate for name, candidate in found.items() if name not in left}, left


def check_replaceable(model: nn.Module, names: Iterable[str]) -> None:
    """Raise if something has come to stand against replacing a layer, which did not when it became a candidate.

    Raises:
        RuntimeError: Such as a gradient hook on its weight, which would be lost.
    """
    obstacles = {site.name: site.obstacle for site in find_sites(model)}
    for name in names:
        if obstacle := obstacles.get(name, "it is no longer in the model under this name"):
            raise RuntimeError(
                f"{name}: the layer was to go low-rank now, but since the dense start was built, {obstacle}. Undo "
                "that, or exclude the layer with exclude_modules."
            )


def _plans(model: nn.Module, choice: Mapping[str, Any], form: Any) -> list[Plan]:
    """Return what `factorize_` would do with every layer at rank 1."""
    options = Options(
        rank=1,
        rank_fraction=None,
        rank_multiple=1,
        include_head=bool(choice.get("include_head")),
        min_size=0,
        keep_dense_above_break_even=True,
        conv_form=form,
        parameters=None,
    )
    target, exclude = (Selection(choice.get(k), argument=k) for k in ("target_modules", "exclude_modules"))
    pattern = Selection(None, argument="rank_pattern")
    sites = find_sites(model)
    check_known(model, sites, target, exclude)
    heads = {} if options.include_head else find_heads(model, multiplying(sites))
    return [plan_site(site, heads, target, exclude, pattern, {}, options) for site in sites]


def _reason(plan: Plan) -> str:
    """Return why a layer stays as it is, or an empty string."""
    if plan.site.low_rank:
        return "low-rank already"
    if plan.ranks and not plan.site.module.weight.requires_grad:
        return "its weight is frozen"
    return plan.reason


def _empty_twin(kind: Any, dense: Any) -> Any:
    """Return a low-rank layer of rank 1 with the options of a dense one, on the meta device."""
    options = kind.dense_options(dense)
    if "bias" in dense._parameters:  # an embedding knows of none
        options |= {"bias": dense.bias is not None}
    return kind(**options, rank=1, device="meta", dtype=dense.weight.dtype)
