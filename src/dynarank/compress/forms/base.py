"""What a form is: a family of ever smaller replacements for one layer, each with its error and its cost."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynarank.measure import Moments, Trace

Rank = tuple[int, ...]


@dataclass(frozen=True)
class Options:
    """The replacements that one form offers for one layer, from the smallest to the largest.

    Args:
        form: Name of the form.
        ranks: The rank of each option; a tuple, since some forms have two.
        errors: ``||(W - W') x||^2 / ||W x||^2``, the mean over the inputs ``x``; over the entries of ``W`` where no
            moments were given.
        parameters: Numbers in the weight.
        multiplications: Multiplications in one forward pass as traced; 0 without a trace.

    Shape:
        All of one length ``k``; ``errors`` is float64, the last two int64.
    """

    form: str
    ranks: tuple[Rank, ...]
    errors: Tensor
    parameters: Tensor
    multiplications: Tensor


class AbstractForm(ABC):
    """A family of replacements for a layer. Nothing here changes the layer that is looked at.

    ``moments`` decide what an error is. With those of the layer's inputs it is the error of the outputs, the
    activation-aware truncation; without, it is that of the weight, the plain singular value decomposition.
    """

    @abstractmethod
    def accepts(self, layer: Any) -> bool:
        """Whether the form applies to a layer."""

    @abstractmethod
    def options(self, layer: Any, moments: Moments | None, trace: Trace | None) -> Options:
        """Return what the form offers for a layer: only options with fewer numbers than it has now."""

    @abstractmethod
    def build(self, layer: Any, moments: Moments | None, rank: Rank) -> nn.Module:
        """Return the replacement of a given rank, with the bias of the layer."""

    @abstractmethod
    def shaped(self, layer: Any, rank: Rank) -> nn.Module:
        """Return a replacement of the same shapes with arbitrary weights, as it is deployed: for timing."""


@torch.no_grad()
def matrix_of(layer: Any) -> Tensor:
    """Return the weight of a dense or low-rank layer as a matrix, outputs by everything else, in float64.

    Shape:
        ``(m, n)``.
    """
    return layer.weight.detach().as_subclass(Tensor).flatten(1).double()


def centred(moments: Moments | None, layer: Any) -> Tensor | None:
    """Return the metric of a layer's inputs: the covariance where a bias can take the mean's part, else the moment.

    Shape:
        ``(n, n)`` float64 where the layer is, or None without moments.
    """
    if moments is None:
        return None
    device = next(layer.parameters()).device
    second = moments.second.to(device)
    if getattr(layer, "bias", None) is None:
        return second
    mean = moments.mean.to(device)
    return second - torch.outer(mean, mean)


@torch.no_grad()
def correct_bias_(new: Any, layer: Any, moments: Moments | None, approximation: Tensor) -> None:
    """Give ``new`` a bias of its own that makes up for the mean of what the truncation leaves out.

    Args:
        new: The layer that holds the bias.
        layer: The layer before.
        moments: Moments of its inputs; without them the bias is kept as it is.
        approximation: ``W'`` as a matrix ``(m, n)`` in float64.
    """
    if layer.bias is None or moments is None:
        return
    shift = (matrix_of(layer) - approximation) @ moments.mean.to(approximation.device)  # (m,)
    bias = (layer.bias.double() + shift).to(layer.bias.dtype)
    new.bias = nn.Parameter(bias, requires_grad=layer.bias.requires_grad)


@dataclass(frozen=True)
class OutputSpectrum:
    """How the outputs ``W x`` of a matrix spread over orthogonal directions, in order of their size.

    Truncating ``W`` to ``U_r U_r^T W`` is the best approximation of rank ``r`` in the metric: its squared error is the
    sum of the energies that are left out. Without a metric this is the singular value decomposition of ``W``.

    Args:
        energies: Mean squares of the outputs along each direction, falling; squared singular values without a metric.
        U: Directions, or None where only the energies were asked for.

    Shape:
        ``energies (k,)``, ``U (m, k)`` with ``k = min(m, n)`` or as many as were asked for, both float64.

    Reference:
        Principal component analysis of the outputs, as in Yu, Wu, "Compressing transformers: features are low-rank,
        but weights are not!", AAAI 2023, https://doi.org/10.1609/aaai.v37i9.26304. The result is that of whitening
        the inputs (Wang et al., "SVD-LLM", ICLR 2025, https://arxiv.org/abs/2403.07378), without an inverse.
    """

    energies: Tensor
    U: Tensor | None = None

    @property
    def errors(self) -> Tensor:
        """Relative squared error of truncating to rank 0, 1, ..., k; 0 throughout for a weight of zeros."""
        return left_over(self.energies, float(self.energies.sum()))


def left_over(energies: Tensor, total: float) -> Tensor:
    """Return the share of ``total`` that is missing without any, with the first, ..., with all of the energies."""
    kept = torch.cat([energies.new_zeros(1), energies.cumsum(0)])
    return (1 - kept / total).clamp_min(0) if total else torch.zeros_like(kept)


@torch.no_grad()
def output_spectrum(
    weight: Tensor, metric: Tensor | None, *, directions: bool = False, count: int | None = None
) -> OutputSpectrum:
    """Return the energies of ``W x``, and the directions if asked for.

    Args:
        weight: ``W``.
        metric: Second moment of ``x``; the identity if None.
        directions: Whether to compute ``U`` as well.
        count: How many directions, the largest first; all by default.

    Shape:
        ``weight (m, n)`` and ``metric (n, n)`` float64.

    Example:
        >>> W = torch.diag(torch.tensor([3.0, 2.0], dtype=torch.float64))
        >>> output_spectrum(W, None).energies.tolist()
        [9.0, 4.0]
        >>> output_spectrum(W, torch.diag(torch.tensor([1.0, 9.0], dtype=torch.float64))).energies.tolist()
        [36.0, 9.0]
    """
    m, n = weight.shape
    Q: tuple[Tensor, Tensor] | None = None
    if m > n and metric is None and not directions:
        weight = weight.mT  # its Gram matrix is the smaller one, with the same energies
    elif m > n:  # the outputs lie in the column space: work with n x n
        Q = torch.geqrf(weight)  # as reflections, which cost less to apply to a few directions than to multiply out
        weight = Q[0][:n].triu()
    outputs = weight @ weight.mT if metric is None else weight @ metric @ weight.mT  # (k, k)
    if not directions:
        return OutputSpectrum(torch.linalg.eigvalsh(outputs).flip(0).clamp_min(0)[: min(m, n)])
    energies, U = torch.linalg.eigh(outputs)
    energies, U = energies.flip(0).clamp_min(0)[: min(m, n)], U.flip(1)[:, : min(m, n)][:, :count]
    return OutputSpectrum(energies, U if Q is None else torch.ormqr(*Q, functional.pad(U, (0, 0, 0, m - n))))
