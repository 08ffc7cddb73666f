"""Muon on two factors in turn, whose gauge is put right now and then: orthogonalised steps that cost little."""

from dataclasses import dataclass
from typing import final

import torch

from dynarank import linalg
from dynarank.factors import FactorPair
from dynarank.integrators._gauge_fixed import AbstractGaugeFixed


@final
@dataclass(frozen=True)
class GaugeFixedMuon(AbstractGaugeFixed):
    """Each factor in turn takes an orthogonalised step that changes ``W`` by ``h = lr sqrt(m / n)`` in spectral norm.

    Of all changes ``dA^T B`` of ``W`` with that norm, the one that lowers the loss most is
    ``h C^-1/2 polar(C^-1/2 A.grad)`` with ``C = B B^T``. In the balanced diagonal gauge ``C`` is ``Sigma`` and scales
    rows; between balancings the squared lengths of the rows stand for it, and ``C + h``, which it may become by the
    step, for ``C``, since a factor of length 0 could not be divided by. Every step averages the gradients of both
    factors and moves one, ``A``, then ``B``: so one polar factor of ``r`` rows is all that a step needs. A learning
    rate carries over between layers and ranks.

    Args:
        rows: About how many rows of inputs meet the layer in a step: samples, or tokens, or pixels.
        early: Steps at the beginning with an interval of ten.

    Reference:
        Cesista, Crowson, Simal, Biderman, "LoRA-Muon: spectral steepest descent on the low-rank manifold", 2026,
        https://arxiv.org/abs/2606.12921, for steepest descent on a factor. There both move at once, with roots of
        ``C`` in every step.
    """

    typical_lr = 0.025

    def move_(
        self, pair: FactorPair, gradient: FactorPair, averages: FactorPair, *, step: int, lr: float, momentum: float
    ) -> None:
        """Average the gradients, and step along the polar factor of one of them."""
        for average, slope in ((averages.A, gradient.A), (averages.B, gradient.B)):
            average.mul_(momentum).add_(slope)
        m, n = pair.shape
        h = lr * (m / n) ** 0.5
        moving, other = ("A", pair.B) if step % 2 == 0 else ("B", pair.A)
        squares = torch.linalg.vector_norm(other, dim=-1, keepdim=True).square_()
        root = squares.add_(h).clamp_min_(torch.finfo(squares.dtype).tiny).sqrt_()  # of C, (r, 1)
        slope = linalg.widen(getattr(gradient, moving))
        ahead = torch.add(slope, getattr(averages, moving), alpha=momentum).div_(root)  # Nesterov
        getattr(pair, moving).addcdiv_(linalg.newton_schulz(ahead), root, value=-h)
