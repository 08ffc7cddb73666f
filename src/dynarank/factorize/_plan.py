"""What will become of each layer: a rank, or the reason why it stays dense. Nothing is changed here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from dynarank import cost
from dynarank.errors import unknown_name
from dynarank.factorize._heads import Heads
from dynarank.factorize._replace import clashing_attributes
from dynarank.factorize._select import EXACT, KIND, Choice, Selection, shortened, unknown_choice
from dynarank.factorize._sites import Site
from dynarank.factorize._speed import Speed
from dynarank.factorize._targets import CONV_FORMS, ConvForm, Target, target_of

Rank = int | float | Literal["full"]

QUARTER = 0.25


@dataclass(frozen=True)
class Options:
    rank: int | Literal["full"] | None
    rank_fraction: float | None
    rank_multiple: int
    include_head: bool
    min_size: int
    keep_dense_above_break_even: bool
    conv_form: ConvForm
    parameters: int | float | None

    def __post_init__(self) -> None:
        if self.conv_form not in CONV_FORMS:
            raise unknown_name("conv_form", self.conv_form, CONV_FORMS)
        given = [name for name in ("rank", "rank_fraction", "parameters") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"factorize_ takes one of rank, rank_fraction and parameters, got {' and '.join(given)}.")
        check_parameters(self.parameters)
        if isinstance(self.rank, float):
            raise TypeError(f"rank must be an int or 'full', got {self.rank}. Pass rank_fraction for a fraction.")
        if self.rank is not None:
            check_rank("rank", self.rank)
        if self.rank_fraction is not None:
            check_rank("rank_fraction", float(self.rank_fraction))
        if self.rank_multiple < 1:
            raise ValueError(f"rank_multiple must be at least 1, got {self.rank_multiple}.")

    @property
    def start(self) -> Rank:
        """Rank of layers that ``rank_pattern`` does not mention."""
        if self.rank is not None:
            return self.rank
        if self.parameters is not None:
            return 1  # at least; `filling` finds how much more
        return QUARTER if self.rank_fraction is None else float(self.rank_fraction)


def check_rank(where: str, value: object) -> None:
    if isinstance(value, bool) or not (isinstance(value, int | float) or value == "full"):
        raise TypeError(f"{where} must be an int, a float in (0, 1] or 'full', got {value!r}.")
    if isinstance(value, float) and not 0 < value <= 1:
        raise ValueError(f"{where}: a fraction of min(m, n) must be in (0, 1], got {value}.")
    if isinstance(value, int) and value < 1:
        raise ValueError(f"{where}: a rank must be at least 1, got {value}.")


def check_parameters(value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"parameters must be an int or a float in (0, 1], got {value!r}.")
    if isinstance(value, float) and not 0 < value <= 1:
        raise ValueError(f"parameters: a fraction must be in (0, 1], got {value}. Pass an int for a number.")
    if isinstance(value, int) and value < 1:
        raise ValueError(f"parameters must be at least 1, got {value}.")


@dataclass(frozen=True)
class Plan:
    """What will become of one site: a target with its ranks, or the reason why there is none."""

    site: Site
    target: Target | None
    ranks: tuple[int, ...]  # one for a matrix, those of the modes for a tensor; empty where the layer stays dense
    reason: str
    selected: bool  # by name, before any rule about ranks


def plan_site(
    site: Site,
    heads: Heads,
    target: Selection,
    exclude: Selection,
    pattern: Selection,
    ranks: Mapping[Any, Rank],
    options: Options,
    start: Rank | None = None,
    speed: Speed | None = None,
) -> Plan:
    reason = site.obstacle if site.low_rank else reason_to_leave(site, heads, target, exclude)
    if reason or site.low_rank:
        return Plan(site, None, (), reason, False)
    value, named = options.start if start is None else start, False
    if (best := pattern.best(site)) is not None:
        value, named = ranks[best[0]], best[1] == EXACT
    twin = target_of(site, options.conv_form)
    found, reason = _ranks(site, twin, value, options, named=named)
    if found and speed is not None and (slower := speed.reason(site.module, twin, found[0])):
        found, reason = (), slower
    return Plan(site, twin if found else None, found, reason, True)


def reason_to_leave(site: Site, heads: Heads, target: Selection, exclude: Selection) -> str:
    """Return why a layer is left alone whatever its rank would be, or an empty string."""
    if site.obstacle:
        return site.obstacle
    if exclude.best(site) is not None:
        return "named in exclude_modules"
    chosen = target.best(site) if target.choices else None
    if target.choices and chosen is None:
        return "not named in target_modules"
    if site.module in heads and (chosen is None or chosen[1] == KIND):
        return f"classifier head, {heads[site.module]}"
    if site.looks_up and not _names_embeddings(chosen, site):
        return "embedding; name it in target_modules to factorise it"
    return ""


def _names_embeddings(chosen: tuple[Choice, int] | None, site: Site) -> bool:
    """Whether a choice asks for embeddings: by a name, or by a kind or class that is theirs alone."""
    if chosen is None:
        return False
    choice, way = chosen
    own = issubclass(choice, nn.Embedding) if isinstance(choice, type) else choice == site.kind
    return way != KIND or own


def _ranks(site: Site, target: Target, value: Rank, options: Options, *, named: bool) -> tuple[tuple[int, ...], str]:
    """Return the ranks to start with, or none and the reason."""
    if target.entries < options.min_size:
        return (), f"{target.entries:,} entries, fewer than min_size = {options.min_size:,}"
    if target.twin is not site.twin and (clashes := clashing_attributes(site.module, target.twin)):
        return (), f"its attribute {clashes[0]!r} means something else in a low-rank layer"
    if not target.modes:
        rank, reason = _rank(site, target, value, options, named=named)
        return () if rank is None else (rank,), reason
    ranks = target.mode_ranks(value)
    if options.keep_dense_above_break_even and target.numbers([1] * target.modes) >= target.entries:
        return (), "too small: even ranks of 1 would hold as many numbers"
    if options.keep_dense_above_break_even and target.numbers(ranks) >= target.entries and value != "full":
        return (), f"ranks {ranks} would hold {target.numbers(ranks):,} numbers, not fewer than {target.entries:,}"
    return ranks, ""


def _rank(site: Site, target: Target, value: Rank, options: Options, *, named: bool) -> tuple[int | None, str]:
    """Return the rank to start with, or None and the reason. A layer named exactly must be able to take its rank."""
    rows, columns = target.shape
    largest, pays = min(rows, columns), cost.break_even_rank(rows, columns)
    if value == "full":
        rank = largest
    else:
        rank = max(1, round(value * largest)) if isinstance(value, float) else int(value)
    if rank > largest and named:
        raise ValueError(f"rank_pattern[{site.name!r}]: rank must be between 1 and min(m, n) = {largest}, got {rank}.")
    if rank > largest:
        return None, f"rank {rank} is above min(m, n) = {largest}"
    if options.keep_dense_above_break_even and pays < 1:
        return None, "too small: even rank 1 would hold as many numbers"
    if options.keep_dense_above_break_even and rank > pays and value != "full":
        return None, f"rank {rank} would not be smaller; at most {pays} is"
    return rank, ""


# --- checks ------------------------------------------------------------------------------------------------------


def check_known(model: nn.Module, sites: list[Site], target: Selection, exclude: Selection) -> None:
    layers = [site for site in sites if site.twin is not None]
    known = [site.name for site in layers]
    for choice in target.unmatched(layers):
        raise unknown_choice("target_modules", choice, model, known)
    # To exclude what would stay dense anyway is no mistake; to exclude a container is one, since it excludes nothing.
    chosen = {id(site.module) for site in layers}
    plain = [
        Site((name,), module, type(module).__name__, None, "")
        for name, module in model.named_modules()
        if not any(id(child) in chosen for child in module.modules())
    ]
    for choice in exclude.unmatched([*layers, *plain]):
        raise unknown_choice("exclude_modules", choice, model, known)


def check_pattern(model: nn.Module, plans: list[Plan], pattern: Selection) -> None:
    for key in pattern.unmatched(plan.site for plan in plans if plan.selected):
        left = [plan for plan in plans if pattern.way(key, plan.site) is not None and plan.site.twin is not None]
        if not left:
            raise unknown_choice("rank_pattern", key, model, [p.site.name for p in plans if p.site.twin is not None])
        why = left[0].reason or "low-rank before"
        raise ValueError(
            f"rank_pattern: {key!r} has no effect, since {left[0].site.name!r} is not replaced ({why}). "
            "Remove the key, or choose the layer with target_modules or include_head."
        )


def check_something_happens(plans: list[Plan]) -> None:
    if any(plan.ranks or plan.site.low_rank for plan in plans):
        return
    layers = [plan for plan in plans if plan.site.twin is not None]
    if not layers:
        raise ValueError(
            f"factorize_ replaced no layer: the model has none with a low-rank twin. Candidates are nn.Linear and "
            f"nn.Conv1d to nn.Conv3d; found {shortened(sorted({plan.site.kind for plan in plans}))}."
        )
    reasons = shortened([f"{plan.site.name or 'the model'} ({plan.reason})" for plan in layers])
    raise ValueError(
        f"factorize_ replaced no layer: of {len(layers)} with a low-rank twin every one stays dense: {reasons}. "
        "Check rank, target_modules and include_head."
    )
