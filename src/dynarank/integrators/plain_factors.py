"""Plain training of the two factors, ``U V^T``: the baseline that everybody uses."""

from torch import Tensor

from dynarank import linalg
from dynarank.factors import FactorPair
from dynarank.integrators.base import AbstractIntegrator, Point, State


class PlainFactors(AbstractIntegrator):
    """Gradient descent with Nesterov momentum on ``A`` and ``B`` themselves, without any geometry.

    Each factor takes the step of ``torch.optim.SGD(nesterov=True)``. The step of ``W`` depends on how it is split into
    factors and slows down along small singular values. Momenta are kept in at least float32.

    Reference:
        The baseline of Schotthöfer et al., NeurIPS 2022, https://arxiv.org/abs/2205.13571, section 6.5; compare
        Khodak, Tenenholtz, Mackey, Fusi, "Initialization and regularization of factorized neural layers", ICLR 2021,
        https://arxiv.org/abs/2105.01029.
    """

    typical_lr = 0.1

    keeps_gauge = False

    def init(self, point: Point) -> State:
        """Return zero momenta."""
        return {name: factor.new_zeros(factor.shape) for name, factor in _parts(point).items()}  # (r, m), (r, n)

    def advance(
        self, point: Point, gradient: FactorPair | Tensor, state: State, *, lr: float, momentum: float, trusted: bool
    ) -> tuple[Point, State]:
        """Step against the averaged gradient of each factor."""
        slopes = _parts(gradient)
        averages = {name: slopes[name] + momentum * state[name] for name in slopes}
        moved = {
            name: factor - lr * (slopes[name] + momentum * averages[name]) for name, factor in _parts(point).items()
        }
        return FactorPair(**moved), averages

    def transport(self, state: State, old: Point, new: Point) -> State:
        """Turn each momentum as its factor was turned: ``T`` with ``A_new = T A_old`` in least squares."""
        before, after = _parts(old), _parts(new)
        return {name: linalg.turn_between(before[name], after[name]) @ state[name] for name in state}

    def directions(self, state: State, point: Point) -> None:
        """None are known; the caller draws random ones."""


def _parts(pair: Point | Tensor) -> dict[str, Tensor]:
    if not isinstance(pair, FactorPair):
        raise TypeError("PlainFactors needs a layer in the pair form, got one in the core form.")
    return {"A": linalg.widen(pair.A), "B": linalg.widen(pair.B)}
