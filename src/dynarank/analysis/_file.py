"""The analysis of weights alone: every matrix in a file or a mapping is a candidate, one at a time in memory."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor, nn

from dynarank import cost
from dynarank.analysis._weight import Tell, blank_entry, check_finite, outlooks, unreadable, with_spectrum
from dynarank.analysis.findings import Analysis, LayerAnalysis
from dynarank.analysis.spectra import singular_values, truncation_errors
from dynarank.analysis.weight_files import StoredTensor
from dynarank.compress._survey import TOO_SMALL, Survey
from dynarank.compress.budgets import Parameters
from dynarank.compress.forms.base import Options
from dynarank.compress.forms.matrix import Matrix
from dynarank.compress.plan import Totals, plan_within
from dynarank.compress.report import CompressionReport
from dynarank.factorize._select import Selection, shortened
from dynarank.factorize.sites import Selector, Site

CONVOLUTIONS = {3: "conv1d", 4: "conv2d", 5: "conv3d"}
EMBEDDING = re.compile(r"embed|(^|[._])(wte|wpe|emb|tokens?|positions?)([._]|$)", re.IGNORECASE)
FACTORS = ("A", "B", "S", "U", "V")  # names of the parts of a low-rank weight


def analyze_tensors(
    source: str,
    tensors: Sequence[StoredTensor],
    *,
    budgets: Sequence[float],
    target_modules: Selector,
    exclude_modules: Selector,
    tell: Tell,
) -> Analysis:
    """Return the analysis of the tensors of a file; errors are those of the weights.

    Raises:
        ValueError: There is no matrix among them or none that can be analysed, a weight is not finite, or a name
            matches nothing.
    """
    matrices = [tensor for tensor in tensors if len(tensor.shape) >= 2]
    if not matrices:
        raise ValueError(f"analyze: {source} holds no matrix: none of its {len(tensors)} tensors has two dimensions.")
    if all(unreadable(tensor.dtype) or tensor.bytes == 0 for tensor in matrices):
        told = shortened([f"{tensor.name} ({tensor.dtype})" for tensor in matrices])
        raise ValueError(f"analyze: {source} holds no floating-point weight to analyse, but {told}.")
    reasons = _reasons(matrices, target_modules, exclude_modules)
    layers, surveys = [], []
    for index, (tensor, reason) in enumerate(zip(matrices, reasons, strict=True)):
        tell(index, len(matrices), tensor.name)
        layer, known = _analyzed(tensor, reason)
        layers.append(layer)
        surveys.append(known)
    own = [tensor for tensor in tensors if not tensor.same_as]
    parameters, stored = sum(prod(tensor.shape) for tensor in own), sum(tensor.bytes for tensor in own)
    sizes = [tensor.bytes // max(1, prod(tensor.shape)) for tensor in matrices]

    def plan(budget: float) -> CompressionReport:
        return _plan(surveys, parameters, float(budget * parameters if budget <= 1 else budget))

    found = outlooks(budgets, surveys, plan, parameters=parameters, stored=stored, itemsize=lambda index: sizes[index])
    return Analysis(source, tuple(layers), found, parameters, stored)


def _analyzed(tensor: StoredTensor, reason: str) -> tuple[LayerAnalysis, Survey]:
    """Return the entry of one tensor and what planning needs to know; the tensor itself is freed."""
    m, n = tensor.shape[0], prod(tensor.shape[1:])
    known = Survey(tensor.name, _kind(tensor), (m, n), m * n, reason=reason)
    if tensor.same_as or unreadable(tensor.dtype) or tensor.bytes == 0:
        return blank_entry(tensor.name, known, tensor.shape, tensor.dtype), known
    weight = tensor.load()
    check_finite(tensor.name, weight)
    sigma = singular_values(weight).cpu()
    if not reason:
        options = _options(sigma, m, n)
        known = replace(known, menu=((Matrix(), options),)) if options.ranks else replace(known, reason=TOO_SMALL)
    return with_spectrum(blank_entry(tensor.name, known, tensor.shape, tensor.dtype), known, sigma), known


def _options(sigma: Tensor, m: int, n: int) -> Options:
    """Return what the matrix form offers for a weight, from its spectrum alone."""
    ranks = range(1, min(cost.break_even_rank(m, n), m, n) + 1)
    parameters = torch.tensor([cost.factor_parameters(m, n, rank) for rank in ranks], dtype=torch.int64)
    errors = truncation_errors(sigma)[1 : len(ranks) + 1]
    return Options("matrix", tuple((rank,) for rank in ranks), errors, parameters, torch.zeros_like(parameters))


def _plan(surveys: Sequence[Survey], parameters: int, allowed: float) -> CompressionReport:
    # Planning asks the model for its layers by name and looks at none: anything with such names stands in for it.
    stand_in = nn.ModuleList(nn.Identity() for _ in surveys)
    numbered = [replace(known, name=str(index)) for index, known in enumerate(surveys)]
    totals = Totals(parameters, None, None, parameters)
    report = plan_within(stand_in, numbered, Parameters(), allowed, totals, faster_only=False).report
    layers = [replace(layer, name=known.name) for layer, known in zip(report.layers, surveys, strict=True)]
    return replace(report, layers=tuple(layers))


# --- which weights could be replaced -----------------------------------------------------------------------------


def _reasons(matrices: Sequence[StoredTensor], target_modules: Selector, exclude_modules: Selector) -> Iterator[str]:
    """Yield why each tensor is to be left alone, or an empty string; a file shows names and shapes only."""
    target = Selection(target_modules, argument="target_modules")
    exclude = Selection(exclude_modules, argument="exclude_modules")
    names = [tensor.name for tensor in matrices]
    sites = [
        Site((name.removesuffix(".weight"), name), None, _kind(t), None, "")
        for name, t in zip(names, matrices, strict=True)
    ]
    for selection in (target, exclude):
        if unmatched := selection.unmatched(sites):
            raise ValueError(f"{selection.argument}: {unmatched[0]!r} matches no weight. Weights: {shortened(names)}.")
    partners = {tensor.same_as: tensor.name for tensor in matrices if tensor.same_as}
    for tensor, site in zip(matrices, sites, strict=True):
        tied = tensor.same_as or partners.get(tensor.name)
        named = target.best(site) is not None
        if reason := unreadable(tensor.dtype):
            yield reason
        elif tensor.bytes == 0:
            yield "it is empty"
        elif tied:
            yield f"it is tied to {tied!r}"
        elif exclude.best(site) is not None:
            yield "named in exclude_modules"
        elif target.choices and not named:
            yield "not named in target_modules"
        else:
            yield "" if named else _guess(tensor.name, names)


def _guess(name: str, names: Sequence[str]) -> str:
    """Return why a weight is probably no matrix that inputs are multiplied by, or an empty string."""
    stem, _, last = name.rpartition(".")
    if last in FACTORS and any(f"{stem}.{other}".lstrip(".") in names for other in FACTORS if other != last):
        return "a factor of a low-rank weight; analyse the model itself to see the product"
    if EMBEDDING.search(name):
        return "an embedding, by its name: its rows are looked up, not multiplied"
    return ""


def _kind(tensor: StoredTensor) -> str:
    return "linear" if len(tensor.shape) == 2 else CONVOLUTIONS.get(len(tensor.shape), "tensor")
