"""One vector at several shifts: the input of a convolution reduced to a few directions, the same at every shift."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynarank import linalg
from dynarank.compress.forms.base import left_over, output_spectrum
from dynarank.compress.timing import interpolated

FEW = 32  # up to so many options the error of each is computed
PROBES = 8  # of more options only so many, mostly small ones, where a rank matters most
EXACT = 1e-12  # relative squared errors below this are rounding
RIDGE = 1e-8  # of the mean diagonal: least squares use no direction that the calibration data hardly have


@dataclass(frozen=True)
class SharedBasis:
    """Directions in which the input of a convolution is kept at every shift, and how well outputs are made of them.

    A patch is one vector at ``s`` shifts, such as a pixel and its neighbours: ``W x = sum_b W_b x_b``. Each ``x_b``
    becomes the same few numbers ``V^T x_b``, which any weights may follow.

    Args:
        V: Orthonormal directions, the best first.
        fits: What each direction adds to the least-squares fit of the outputs, as weights on features that are
            orthonormal in the metric.
        total: Mean square of the outputs.

    Shape:
        ``V (p, k)``, ``fits (m, k, s)``, float64.
    """

    V: Tensor
    fits: Tensor
    total: float

    @property
    def errors(self) -> Tensor:
        """Relative squared error of the best fit on 0, 1, ..., k directions."""
        return left_over(self.fits.square().sum((0, 2)), self.total)

    @property
    def shifts(self) -> int:
        """Number of shifts ``s``."""
        return self.fits.shape[2]

    def error_of(self, rest: Tensor, metric: Tensor) -> float:
        """Return the relative squared error of the outputs where ``rest (m, p * s)`` of the weight is left out."""
        return max(0.0, float((rest @ metric * rest).sum())) / self.total if self.total else 0.0


@torch.no_grad()
def shared_basis(weight: Tensor, metric: Tensor | None, *, shifts: int, count: int) -> SharedBasis:
    """Return the directions that serve all shifts best, chosen as if inputs at different shifts were uncorrelated.

    Args:
        weight: ``W``; its columns run over the entries of ``x_b`` and, fastest, over the shifts.
        metric: Second moment of ``x``; the identity if None.
        shifts: Number of shifts ``s``.
        count: Number of directions ``k``, at most ``p``.

    Shape:
        ``weight (m, p * s)`` and ``metric (p * s, p * s)``, float64.
    """
    m = len(weight)
    stacked = weight.unflatten(1, (-1, shifts)).mT.reshape(m * shifts, -1)  # every W_b, (m * s, p)
    mean = None if metric is None else _mean_metric(metric, shifts)
    U = output_spectrum(stacked, mean, directions=True, count=count).U
    assert U is not None
    V = linalg.orthonormalise(stacked.mT @ U)  # (p, k)
    cross, root = _normal_equations(weight, metric, V, shifts)
    fits = torch.linalg.solve_triangular(root, cross, upper=False).mT.reshape(m, -1, shifts)
    return SharedBasis(V, fits, float((weight * (weight if metric is None else weight @ metric)).sum()))


@torch.no_grad()
def fit_on(V: Tensor, weight: Tensor, metric: Tensor | None, *, shifts: int) -> Tensor:
    """Return the weights ``(m, k, s)`` on ``V^T x_b`` whose outputs are nearest to ``W x``: least squares."""
    projected = torch.einsum("mps,pk->mks", weight.unflatten(1, (-1, shifts)), V)
    if metric is None:
        return projected
    # The projection, and least squares for what it leaves out: where that is nothing, nothing is rounded.
    cross, root = _normal_equations(weight - expanded(projected, V), metric, V, shifts)
    return projected + torch.cholesky_solve(cross, root).mT.reshape(projected.shape)


@torch.no_grad()
def improved(V: Tensor, weight: Tensor, metric: Tensor, *, shifts: int, total: float) -> Tensor:
    """Return directions on which the outputs are fitted better: one step of descent, as long as it helps most.

    The step is along the gradient, preconditioned as if inputs at different shifts were uncorrelated. Where nothing is
    left to fit, compared with ``total``, the directions stay.
    """
    weights = fit_on(V, weight, metric, shifts=shifts)  # (m, k, s)
    rest = weight - expanded(weights, V)
    slope = rest @ metric
    if float((slope * rest).sum()) <= EXACT * total:
        return V
    gradient = torch.einsum("mps,mks->pk", slope.unflatten(1, (-1, shifts)), weights)
    flat = weights.movedim(1, 0).flatten(1)  # (k, m * s)
    step = torch.cholesky_solve(gradient, _root(_mean_metric(metric, shifts)))
    step = torch.cholesky_solve(step.mT, _root(flat @ flat.mT)).mT  # (p, k)
    change = expanded(weights, step)
    curvature = float((change @ metric * change).sum())
    return linalg.orthonormalise(V + float((gradient * step).sum()) / curvature * step) if curvature > 0 else V


def expanded(weights: Tensor, V: Tensor) -> Tensor:
    """Return the weight ``(m, p * s)`` of ``weights (m, k, s)`` on ``V^T x_b``."""
    return torch.einsum("mks,pk->mps", weights, V).flatten(1)


def corrected(errors: Tensor, exact: Callable[[int], float]) -> Tensor:
    """Return falling errors of options: exact for a few of them, the others lowered by the share that is between.

    Args:
        errors: Bounds that are known of all.
        exact: Returns the error of one option.
    """
    count = len(errors)
    probes = range(PROBES) if count > FEW else ()
    nodes = sorted({round(count ** (step / (PROBES - 1))) - 1 for step in probes}) or list(range(count))
    if not nodes:
        return errors
    shares = [exact(i) / float(errors[i]) if float(errors[i]) > EXACT else 1.0 for i in nodes]
    kind: dict[str, Any] = {"dtype": torch.float64, "device": errors.device}
    line = interpolated(torch.arange(count, **kind), torch.tensor(nodes, **kind), torch.tensor(shares, **kind))
    return (errors * line).cummin(0).values


def _mean_metric(metric: Tensor, shifts: int) -> Tensor:
    """Return the mean of the second moments of the ``x_b``, ``(p, p)``."""
    p = len(metric) // shifts
    return metric.reshape(p, shifts, p, shifts).diagonal(dim1=1, dim2=3).mean(-1)


def _normal_equations(weight: Tensor, metric: Tensor | None, V: Tensor, shifts: int) -> tuple[Tensor, Tensor]:
    """Return the moments of ``V^T x_b`` with ``W x``, ``(k * s, m)``, and the Cholesky factor of their own."""
    if metric is None:
        cross = torch.einsum("mps,pk->ksm", weight.unflatten(1, (-1, shifts)), V).flatten(0, 1)
        return cross, torch.eye(len(cross), dtype=V.dtype, device=V.device)
    onto = torch.einsum("pk,psn->ksn", V, metric.unflatten(0, (-1, shifts))).flatten(0, 1)  # (k * s, n)
    gram = torch.einsum("gps,pk->gks", onto.unflatten(1, (-1, shifts)), V).flatten(1)  # (k * s, k * s)
    return onto @ weight.mT, _root(gram)


def _root(gram: Tensor) -> Tensor:
    """Return the Cholesky factor of a Gram matrix, raised on the diagonal: few data or float32 leave it singular."""
    level = (float(gram.diagonal().mean()) or 1.0) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    share = RIDGE
    while int((found := torch.linalg.cholesky_ex(gram + share * level)).info):
        share *= 10
    return found.L
