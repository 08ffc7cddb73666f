"""``analyze``: what the weights of a model or of a file look like, and what they could become."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dynarank.analysis._file import analyze_tensors
from dynarank.analysis._model import analyze_model
from dynarank.analysis._weight import Tell, check_budgets, silent
from dynarank.analysis.findings import Analysis
from dynarank.analysis.weight_files import stored_tensors
from dynarank.factorize.sites import Selector
from dynarank.measure import Forward, call

BUDGETS = (0.75, 0.5, 0.33, 0.25)


def analyze(
    model: nn.Module | str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    calibration: Iterable[Any] | None = None,
    budgets: Sequence[float] = BUDGETS,
    timed: float | None = None,
    forward: Forward = call,
    target_modules: Selector = None,
    exclude_modules: Selector = None,
    include_head: bool = True,
    tell: Tell = silent,
    **options: Any,
) -> Analysis:
    """Return what every weight looks like and what the model comes to at a few budgets; nothing is changed.

    Each weight is told by its singular values: how fast they decay, how many rise above those of random entries, and
    at which rank two factors are smaller. With calibration data the errors are those of the layers' outputs, and it is
    measured how much each layer matters to the outputs of the model.

    A file needs no code of the model: its matrices are read one after the other, so that it may be larger than the
    memory. There every matrix is taken for a weight that inputs are multiplied by, except what is called an embedding.

    Args:
        model: Any module, dense or with low-rank layers; or a file of safetensors or of ``torch.save``, an index of
            shards, a folder with one of these; or tensors by name.
        calibration: Batches of representative data, as in ``compress_``; for a module only.
        budgets: Parameters that the model may have: up to 1 as fractions of what it has, above 1 as numbers.
        timed: Seconds to spend on timing each replacement of each layer; None for no timing. Needs calibration.
        forward: How a batch goes through the model; by default ``measure.call``.
        target_modules: Weights to consider, as in ``factorize_``; all by default.
        exclude_modules: Weights to leave alone, as in ``factorize_``.
        include_head: Whether the classifier head may be replaced; of a file it is not known which one that is.
        tell: Called before each weight with how many are done, how many there are, and its name.
        options: Further options of `Compressor`, for a module only: ``method``, ``forms``, ``rank_multiple``,
            ``measured_sensitivity``, ``divergence``, ``memory``.

    Raises:
        ValueError: There is nothing to analyse, a weight is not finite or on the meta device, a name matches nothing,
            or calibration data do not fit.
        FileNotFoundError: There is no such file.
        TypeError: ``model`` is of another kind, or options for modules were given with a file.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> found = analyze(nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20)), budgets=(0.5, 0.01))
        >>> found["0"].break_even, found["0"].spectrum.rank_90
        (17, 18)
        >>> found.outlooks[0].plan.parameters_after <= 925, found.outlooks[1].problem
        (True, 'cannot be met: with every layer at its smallest it is 170 parameters, 9.2 %')

    Reference:
        Martin, Mahoney, "Implicit self-regularization in deep neural networks", JMLR 2021,
        https://arxiv.org/abs/1810.01075, for reading trained weights against random matrices.
    """
    budgets = check_budgets(budgets)
    if isinstance(model, nn.Module):
        return analyze_model(
            model,
            calibration=calibration,
            budgets=budgets,
            timed=timed,
            forward=forward,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            include_head=include_head,
            tell=tell,
            **options,
        )
    if not isinstance(model, str | os.PathLike | Mapping):
        raise TypeError(f"analyze takes a module, a path or tensors by name, got {type(model).__name__}.")
    given = {"calibration": calibration, "timed": timed, **options}
    if wrong := [name for name, value in given.items() if value is not None]:
        raise TypeError(f"analyze: {', '.join(wrong)} need a module, which can be run; got weights alone.")
    return analyze_tensors(
        f"{len(model)} tensors" if isinstance(model, Mapping) else Path(model).name,
        stored_tensors(model),
        budgets=budgets,
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        tell=tell,
    )
