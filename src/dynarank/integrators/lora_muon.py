"""LoRA-Muon: spectral steepest descent on the two factors, the same for every way to split the weight into them."""

import torch
from torch import Tensor

from dynarank import linalg
from dynarank.factors import FactorPair, LowRankFactors, read_pair, to_pair
from dynarank.integrators._tangent import outside
from dynarank.integrators.base import AbstractIntegrator, Point, State, read, read_gradient


class LoRAMuon(AbstractIntegrator):
    """Each factor takes the step that lowers the loss most where its change of ``W`` has spectral norm ``h``.

    With ``C = B B^T = L L^T`` the step of ``A`` is ``h L^-T polar(L^-1 A.grad)``, and that of ``B`` likewise. In the
    balanced diagonal gauge ``C`` is ``Sigma``, ``L^-1 A.grad`` is ``dK^T``, and nothing is solved. Each factor has half
    of the whole: ``h = lr sqrt(m / n) / 2``, so that ``W`` moves by about ``lr sqrt(m / n)`` in spectral norm. Unlike
    a tangent step it keeps the product of the two changes; the pair is balanced again afterwards by Gram matrices,
    without QR.

    That product is of size ``h^2 Sigma^-1``, without bound where a singular value is small, as that of every new
    direction is. So here ``Sigma + h`` stands for ``Sigma``: in any gauge ``C + h E`` for ``C``, with the geometric
    mean ``E`` of ``C`` and ``(A A^T)^-1``. The averages are those of ``dK`` and ``dL``, projected on the new bases; the
    paper averages the gradients of the factors.

    Reference:
        Cesista, Crowson, Simal, Biderman, "LoRA-Muon: spectral steepest descent on the low-rank manifold", 2026,
        https://arxiv.org/abs/2606.12921.
    """

    typical_lr = 0.02

    def init(self, point: Point) -> State:
        """Return zero momenta."""
        at = read(point, trusted=False)
        return {"K": torch.zeros_like(at.U), "L": torch.zeros_like(at.V)}

    def advance(
        self, point: Point, gradient: FactorPair | Tensor, state: State, *, lr: float, momentum: float, trusted: bool
    ) -> tuple[Point, State]:
        """Average ``dK`` and ``dL``, step against their polar factors, balance the pair."""
        at = read(point, trusted=trusted)
        g = read_gradient(at, point, gradient, trusted=trusted)
        averages = {"K": g.dK + momentum * state["K"], "L": g.dL + momentum * state["L"]}
        h = 0.5 * lr * (at.shape[0] / at.shape[1]) ** 0.5
        A = _step(at.U, averages["K"], at.sigma.unsqueeze(-2), h)
        B = _step(at.V, averages["L"], at.sigma.unsqueeze(-2), h)
        new = read_pair(FactorPair(A.mT, B.mT))
        return to_pair(new), _project(averages, at, new)

    def transport(self, state: State, old: Point, new: Point) -> State:
        """Project the momenta on the new bases."""
        return _project(state, read(old, trusted=True), read(new, trusted=True))

    def directions(self, state: State, point: Point) -> tuple[Tensor, Tensor] | None:
        """Return the leading singular directions of the momenta outside the bases."""
        at = read(point, trusted=True)
        return linalg.svd(outside(at.U, state["K"]))[0], linalg.svd(outside(at.V, state["L"]))[0]


def _step(basis: Tensor, average: Tensor, sigma: Tensor, h: float) -> Tensor:
    """Return ``A1^T = U Sigma^1/2 - h polar(dK Sigma^1/2 D^-1/2) D^-1/2`` with ``D = Sigma + h``."""
    damped = sigma + h  # (1, r)
    return basis * sigma.sqrt() - h * linalg.newton_schulz(average * (sigma / damped).sqrt()) / damped.sqrt()


def _project(state: State, old: LowRankFactors, new: LowRankFactors) -> State:
    """Return ``G V V^T V1`` and ``G^T U U^T U1`` for what was ``G V`` and ``G^T U``."""
    return {"K": state["K"] @ (old.V.mT @ new.V), "L": state["L"] @ (old.U.mT @ new.U)}
