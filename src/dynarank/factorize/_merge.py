"""The way back: ``merge_`` to dense layers, ``to_plain_`` to plain layers in a row."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parallel import DistributedDataParallel

from dynarank import linalg
from dynarank.factorize._guard import watch
from dynarank.factorize._replace import attention_projections, carry_attributes, replace_
from dynarank.factorize._report import MergedLayer, MergeReport
from dynarank.factorize._select import Selection, Selector, unknown_choice
from dynarank.factorize._sites import Site, find_sites
from dynarank.factors import FactorPair, LowRankFactors
from dynarank.layers._factored import AbstractFactoredLayer
from dynarank.layers.base import AbstractLowRankLayer

Builder = Callable[[AbstractFactoredLayer], tuple[nn.Module, str]]


def merge_(model: nn.Module, *, modules: Selector = None) -> MergeReport:
    """Replace low-rank layers by dense ones, in place: weights are multiplied in at least float32, then cast.

    Args:
        model: A model with low-rank layers.
        modules: Which of them, in the vocabulary of ``factorize_``'s ``target_modules``; None for all.

    Returns:
        What was replaced, with the relative error of each cast.

    Raises:
        ValueError: There is no low-rank layer, or a name matches none.
        RuntimeError: The model is wrapped for distributed training.

    Example:
        >>> from dynarank.layers.linear import LowRankLinear
        >>> model = nn.Sequential(LowRankLinear(8, 6, rank=2), nn.ReLU())
        >>> len(merge_(model)), model[0]
        (1, Linear(in_features=8, out_features=6, bias=True))
    """
    projections = attention_projections(model)
    return _replace_all(model, modules, lambda layer: (_dense(layer, projections), ""), verb="merge_")


def to_plain_(model: nn.Module, *, modules: Selector = None) -> MergeReport:
    """Replace low-rank layers by two plain torch layers each, in place, for export and quantisation.

    A convolution in Tucker form becomes three: 1x1, the kernel between few channels, 1x1. A layer becomes dense instead
    where that is smaller or equal, and inside ``nn.MultiheadAttention``, which reads the weight itself. Other code of a
    model that reads ``layer.weight`` fails on several layers: ``merge_`` such a layer first.

    Args:
        model: A model with low-rank layers.
        modules: Which of them, in the vocabulary of ``factorize_``'s ``target_modules``; None for all.

    Returns:
        What was replaced, and by what.

    Raises:
        ValueError: There is no low-rank layer, or a name matches none.
        RuntimeError: The model is wrapped for distributed training.

    Example:
        >>> from dynarank.layers.linear import LowRankLinear
        >>> model = nn.Sequential(LowRankLinear(8, 6, rank=2), nn.ReLU())
        >>> report = to_plain_(model)
        >>> model[0]
        Sequential(
          (0): Linear(in_features=8, out_features=2, bias=False)
          (1): Linear(in_features=2, out_features=6, bias=True)
        )
    """
    projections = attention_projections(model)

    def build(layer: AbstractFactoredLayer) -> tuple[nn.Module, str]:
        if id(layer) in projections:
            return _dense(layer, projections), "nn.MultiheadAttention reads its weight"
        if layer.deployed_parameters() >= layer.dense_parameters:
            return _dense(layer, projections), "plain layers would not be smaller"
        return layer.to_plain(), ""

    return _replace_all(model, modules, build, verb="to_plain_")


def _dense(layer: AbstractFactoredLayer, projections: set[int]) -> Any:
    dense: Any = layer.to_dense()
    if id(layer) not in projections:
        return dense
    # torch's own class for out_proj, which keeps dynamic quantisation away from it.
    guarded = NonDynamicallyQuantizableLinear(dense.in_features, dense.out_features, device="meta")
    guarded.weight, guarded.bias = dense.weight, dense.bias
    return guarded.train(dense.training)


@torch.no_grad()
def _replace_all(model: nn.Module, modules: Selector, build: Builder, *, verb: str) -> MergeReport:
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise RuntimeError(f"{verb} found DistributedDataParallel, which holds the old parameters. Unwrap the model.")
    sites = _chosen(model, Selection(modules, argument="modules"), verb)
    new, entries = {}, []
    for site in sites:
        layer: AbstractFactoredLayer = site.module
        module, note = build(layer)
        form = "plain" if isinstance(module, nn.Sequential) else "dense"
        error = _relative_error(layer, module)
        entries.append(MergedLayer(site.name, layer.matrix_shape, layer.rank, form, error, note, layer.all_ranks))
        carry_attributes(layer, module, fresh=layer.smallest())
        new[layer] = module
    old = [(p, f"a factor of {site.name!r}") for site in sites for p in _factors_of(site.module)]
    replace_(model, new)
    watch(model, old, verb=verb)
    return MergeReport(tuple(entries))


def _factors_of(layer: AbstractFactoredLayer) -> list[nn.Parameter]:
    return [p for name in layer.factor_names if (p := layer._parameters.get(name)) is not None]


def _chosen(model: nn.Module, selection: Selection, verb: str) -> list[Site]:
    sites = [site for site in find_sites(model) if site.low_rank]
    if not sites:
        raise ValueError(f"{verb} found no low-rank layer in the model.")
    if isinstance(model, AbstractFactoredLayer):
        method = "to_dense()" if verb == "merge_" else "to_plain()"
        raise ValueError(f"{verb} cannot replace the model itself in place. Use layer.{method}.")
    for choice in selection.unmatched(sites):
        raise unknown_choice("modules", choice, model, [site.name for site in sites])
    return [site for site in sites if not selection.choices or selection.best(site) is not None]


def _relative_error(layer: AbstractFactoredLayer, module: Any) -> float:
    """Return ``||W' - W||_F / ||W||_F`` with both in at least float32; 0 on the meta device.

    ``W`` is what the layer computes with: where fewer directions are active, those alone.
    """
    exact = _product(layer.point(), _active(layer))
    if isinstance(layer, AbstractLowRankLayer):
        exact = layer.as_matrix(layer.as_weight(exact))
    if exact.is_meta:
        return 0.0
    if isinstance(module, nn.Sequential) and len(module) == 3:
        inwards, kernel, outwards = (linalg.widen(part.weight) for part in module)  # type: ignore[arg-type]
        stored = torch.einsum("or,rshw,si->oihw", outwards[..., 0, 0], kernel, inwards[..., 0, 0]).flatten(1)
    elif isinstance(module, nn.Sequential):
        first, second = (linalg.widen(part.weight) for part in module)  # type: ignore[arg-type]
        if isinstance(module[0], nn.Embedding):
            stored = first @ second.mT
        else:
            left = second.reshape(len(second), len(first), -1).mT.reshape(-1, len(first))  # (m, r)
            stored = left @ first.flatten(1)
    else:
        weight = linalg.widen(module.weight)
        stored = layer.as_matrix(weight) if isinstance(layer, AbstractLowRankLayer) else weight.flatten(1)
    size = float(torch.linalg.vector_norm(exact))
    return float(torch.linalg.vector_norm(stored - exact)) / size if size else 0.0


def _active(layer: AbstractFactoredLayer) -> slice:
    """Return the directions that a layer computes with."""
    restricted = isinstance(layer, AbstractLowRankLayer) and layer.active_rank < layer.rank
    return slice(layer.active_rank) if restricted else slice(None)  # type: ignore[attr-defined]


def _product(point: FactorPair | LowRankFactors, used: slice) -> Tensor:
    if isinstance(point, FactorPair):
        return linalg.widen(point.A[used]).mT @ linalg.widen(point.B[used])
    return linalg.widen(point.U[:, used]) @ linalg.widen(point.S[used, used]) @ linalg.widen(point.V[:, used]).mT
