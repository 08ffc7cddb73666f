"""``factorize_``: dense layers become low-rank ones, in place; everything is planned before anything is replaced."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from torch import nn

from dynarank.cost_model.work import Purpose
from dynarank.factorize._counts import deployed_parameters
from dynarank.factorize._fill import filling
from dynarank.factorize._guard import watch
from dynarank.factorize._heads import Heads, find_heads
from dynarank.factorize._plan import (
    Options,
    Plan,
    Rank,
    check_known,
    check_pattern,
    check_rank,
    check_something_happens,
    plan_site,
)
from dynarank.factorize._replace import FAST_PATH, attention_projections, carry_attributes, replace_
from dynarank.factorize._report import FactorizationReport, LayerEntry
from dynarank.factorize._select import Selection, Selector, shortened
from dynarank.factorize._sites import find_sites, multiplying
from dynarank.factorize._speed import Speed, check_asked, look
from dynarank.factorize._targets import ConvForm
from dynarank.factorize.sites import refuse_wrapped


def factorize_(
    model: nn.Module,
    *,
    rank: int | Literal["full"] | None = None,
    rank_fraction: float | None = None,
    parameters: int | float | None = None,
    target_modules: Selector = None,
    exclude_modules: Selector = None,
    rank_pattern: Mapping[Any, Rank] | None = None,
    rank_multiple: int = 1,
    include_head: bool = False,
    min_size: int = 0,
    keep_dense_above_break_even: bool = True,
    conv_form: ConvForm = "matrix",
    example_inputs: Any = None,
    faster_in: Purpose | None = None,
) -> FactorizationReport:
    """Replace dense layers of ``model`` by low-rank ones, in place: each weight becomes its truncated SVD.

    Linear layers and convolutions without groups are replaced; everything else stays dense and the report says why.
    Nothing is random, weights are not rescaled, biases stay the same parameters, forward and backward hooks move to
    the new layers. Build the optimizer afterwards. A failure leaves the model as it was.

    Embeddings stay dense unless ``target_modules`` asks for them: by name or regular expression, by the kind
    ``"embedding"`` or by their class.

    The classifier head stays dense unless it is named in ``target_modules`` or ``include_head`` is set. It is found by
    its role; see the notes of the report.

    Args:
        model: Any module with layers inside.
        rank: Rank to start with, the same for all layers. ``"full"`` starts at ``min(m, n)``, for training that cuts
            ranks later; until then such layers are larger than dense ones.
        rank_fraction: Rank to start with as a fraction of ``min(m, n)``, in (0, 1]. A quarter if nothing is given.
        parameters: Instead of a rank: how many numbers the model may hold as deployed, or, as a float in (0, 1], that
            as a fraction of what it holds now. The largest ranks that fit, about the same fraction of
            ``min(m, n)`` everywhere; layers in ``rank_pattern`` keep the rank given there.
        target_modules: Layers to replace, in PEFT's vocabulary: a list of names, suffixes and module classes; a
            regular expression that the whole qualified name matches; or one of the kinds ``"linear"``, ``"conv"``
            (also ``"conv2d"`` and so on) and ``"all"``. None means all.
        exclude_modules: Layers to leave dense, in the same vocabulary.
        rank_pattern: Rank (int), fraction (float) or ``"full"`` for some layers, by exact name, suffix, regular
            expression, kind or module class; the more specific key wins, in this order.
        rank_multiple: Store factors in multiples of this many rows; the rows beyond the rank are zero.
        include_head: Whether to replace the classifier head too.
        min_size: Weights with fewer entries stay dense.
        keep_dense_above_break_even: Whether layers whose factors would not be smaller stay dense.
        conv_form: What becomes of each ``nn.Conv2d`` with a kernel larger than 1x1. ``"matrix"``: ``r`` filters and a
            1x1 convolution. ``"spatial"``: a convolution along each axis. ``"tucker"``: a 1x1 convolution to few
            channels, a kernel between few channels and a 1x1 convolution back, with a rank of outputs and one of
            inputs. ``"tucker4"``: ranks along both axes of the kernel as well. For the last two an integer is the
            largest rank of any mode, a fraction is of the size of each mode, at least 2 of four ranks: four ranks
            of 1 can never grow. All other layers are matrices.
        example_inputs: A batch for the model (a tensor, a tuple of arguments, or a mapping of keyword arguments). The
            head is then the layer that is seen to write the output, in a forward pass in eval mode without gradients.
        faster_in: ``"training"`` or ``"inference"``: layers that are not expected to be faster there at the rank they
            start with stay dense. ``example_inputs`` is then a batch of the size that will be used. What is expected
            rests on what ``dynarank calibrate`` measured on this machine, or else on a rule of thumb. Layers whose
            times neither knows, such as those in Tucker form, are factorised, with a note. With ``parameters`` no
            layer gets a rank at which it is slower than dense. None: do not ask.

    Returns:
        A report that lists every weight; print it.

    Raises:
        ValueError: No layer would be replaced, a name matches nothing, a rank is out of range, the parameters are too
            few, or ``faster_in`` comes without ``example_inputs``.
        RuntimeError: The model is already wrapped for distributed training.

    Example:
        >>> model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 10))
        >>> print(factorize_(model, rank=4))
        layer  kind    shape    rank  before  after
        0      linear  30 x 40     4   1,200    280
        2      linear  10 x 30     -     300    300  dense: classifier head, the last layer of nn.Sequential
        1 of 2 weights factorised; the model goes from 1,540 to 620 numbers (40.3 %) as deployed.
    """
    options = Options(
        rank, rank_fraction, rank_multiple, include_head, min_size, keep_dense_above_break_even, conv_form, parameters
    )
    check_asked(faster_in, example_inputs)
    target = Selection(target_modules, argument="target_modules")
    exclude = Selection(exclude_modules, argument="exclude_modules")
    pattern = Selection(rank_pattern, argument="rank_pattern")
    for key, value in (rank_pattern or {}).items():
        check_rank(f"rank_pattern[{key!r}]", value)
    refuse_wrapped(model, "factorize_")
    before = deployed_parameters(model)
    sites = find_sites(model)
    check_known(model, sites, target, exclude)
    heads = {} if include_head else find_heads(model, multiplying(sites), example_inputs)
    speed = None
    if faster_in is not None:
        speed = look(model, sites, example_inputs, purpose=faster_in, rank_multiple=rank_multiple)
    chosen = {"heads": heads, "target": target, "exclude": exclude, "pattern": pattern, "ranks": rank_pattern or {}}
    plan = partial(plan_site, **chosen, options=options, speed=speed)
    plans = [plan(site) for site in sites]
    if parameters is not None:
        allowed = parameters if isinstance(parameters, int) else int(parameters * before)
        starts = _filling(plans, pattern, before, allowed, speed)
        plans = [plan(site, start=starts.get(site.module)) for site in sites]
    check_pattern(model, plans, pattern)
    check_something_happens(plans)
    new = {plan.site.module: _built(plan, rank_multiple) for plan in plans if plan.ranks}
    projections = attention_projections(model)
    entries = tuple(_entry(plan, projections, rank_multiple, speed) for plan in plans)
    weights = [(plan.site.module.weight, f"the dense weight of {plan.site.name!r}") for plan in plans if plan.ranks]
    replace_(model, new)
    watch(model, weights, verb="factorize_")
    notes = [*_notes(model, plans, heads, options), *([str(speed)] if speed else [])]
    return FactorizationReport(entries, before, deployed_parameters(model), tuple(notes))


def _filling(
    plans: list[Plan], pattern: Selection, before: int, parameters: int, speed: Speed | None
) -> dict[nn.Module, int | float]:
    """Return where layers start that have no rank of their own."""
    free, others, most = [], before, {}
    for plan in plans:
        if plan.target is None:
            continue
        others -= plan.target.entries
        if pattern.best(plan.site) is None:
            free.append((plan.site.module, plan.target))
            if speed is not None and (largest := speed.most(plan.site.module, plan.target)) is not None:
                most[plan.site.module] = largest
        else:
            others += min(plan.target.numbers(plan.ranks), plan.target.entries)
    dense = [f"{plan.site.name} ({plan.reason})" for plan in plans if plan.selected and plan.target is None]
    return filling(free, others=others, parameters=parameters, most=most, dense=dense)


def _built(plan: Plan, rank_multiple: int) -> nn.Module:
    """Return the low-rank layer that takes the place of a dense one."""
    dense, target = plan.site.module, plan.target
    assert target is not None
    try:
        layer = target.build(dense, plan.ranks, rank_multiple=rank_multiple)
    except ValueError as error:
        raise ValueError(f"factorize_ left the model as it was: {plan.site.name}: {error}") from error
    carry_attributes(dense, layer, fresh=layer.dense_twin("meta"))
    return layer


# --- the report --------------------------------------------------------------------------------------------------


def _entry(plan: Plan, projections: set[int], rank_multiple: int, speed: Speed | None) -> LayerEntry:
    site, module = plan.site, plan.site.module
    if site.low_rank:
        shape, size, ranks = module.matrix_shape, module.deployed_parameters(), module.all_ranks
        return LayerEntry(site.name, site.kind, shape, "low-rank before", module.rank, size, size, ranks=ranks)
    target, ranks = plan.target, plan.ranks
    if target is None:
        return _dense_entry(plan)
    size = min(target.numbers(ranks), target.entries)
    expected = "" if speed is None else speed.expected(module, target, ranks)
    remarks = (
        (expected, expected),
        (len(site.names) > 1, f"shared by {', '.join(site.names)}"),
        (id(module) in projections, "nn.MultiheadAttention multiplies it out in each forward pass"),
        (
            target.numbers(ranks, multiple=rank_multiple) >= target.entries,
            "larger than dense in training until its rank is cut",
        ),
        (target.note, target.note),
    )
    note = "; ".join(text for applies, text in remarks if applies)
    sizes = (target.entries, size)
    return LayerEntry(site.name, target.kind, target.shape, "factorized", ranks[0], *sizes, note=note, ranks=ranks)


def _dense_entry(plan: Plan) -> LayerEntry:
    """The entry of a weight that stays dense; a module with several has one entry, with all of them counted."""
    site = plan.site
    matrices = {k: p for k, p in site.module._parameters.items() if p is not None and not nn.parameter.is_lazy(p)}
    matrices = {k: p for k, p in matrices.items() if p.dim() >= 2}
    size = sum(p.numel() for p in matrices.values())
    only = next(iter(matrices.items())) if len(matrices) == 1 else None
    shape = (only[1].shape[0], only[1].numel() // max(1, only[1].shape[0])) if only else None
    name = f"{site.name}.{only[0]}".lstrip(".") if only and not (site.twin or only[0] == "weight") else site.name
    reason = plan.reason
    if isinstance(site.module, nn.MultiheadAttention):
        reason = "packed projections of nn.MultiheadAttention, bare parameters and no layers"
    return LayerEntry(name, site.kind, shape, "dense", None, size, size, reason)


def _notes(model: nn.Module, plans: list[Plan], heads: Heads, options: Options) -> list[str]:
    kept = {plan.site.module for plan in plans if not plan.ranks}
    notes = []
    if not heads and not options.include_head:
        notes.append(
            "No classifier head was recognised. If there is one, pass it in exclude_modules, or pass example_inputs."
        )
    named = [plan.site.name for plan in plans if plan.site.module in heads and plan.site.module not in kept]
    if named:
        notes.append(f"Classifier head factorised, since it was named: {shortened(named)}.")
    if any(FAST_PATH in vars(module) for module in model.modules()):
        notes.append(
            "The inference fast path of nn.TransformerEncoderLayer reads dense weights and is off where a layer was "
            "factorised; outputs at padded positions are then computed instead of zero."
        )
    chosen = [plan for plan in plans if plan.selected]
    took = any(plan.target and plan.target.twin is not plan.site.twin for plan in chosen)
    if options.conv_form != "matrix" and chosen and not took:
        notes.append(f"No layer took conv_form={options.conv_form!r}.")
    return notes
