"""What every integrator is: one step of the matrix differential equation ``dW/dt = -P(W) G`` as pure functions."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from typing import Any, ClassVar

from torch import Tensor

from dynarank import factors, linalg
from dynarank.factors import FactorPair, LowRankFactors, TangentGradient

Point = FactorPair | LowRankFactors
State = dict[str, Tensor]
Slope = Callable[[Point], FactorPair | Tensor]
Stages = Generator[Point, Any, tuple[Point, State]]  # is sent gradients of what the yielded points store


class AbstractIntegrator(ABC):
    """One step on the manifold. It owns no tensors: what lasts is the explicit ``state``.

    A point is what a layer stores: a ``FactorPair`` (with the gradients of its factors as another pair) or, in the
    core form, ``LowRankFactors`` with the gradient ``dS``. The type of the point that ``advance`` returns decides
    the form the layer takes next.
    """

    gradients: ClassVar[int] = 1  # evaluations of the gradient in a step; several need ``step(closure)``
    core_form: ClassVar[bool] = False  # whether it leaves layers in the core form between steps
    in_place: ClassVar[bool] = False  # whether ``stages_`` may write to what it is given
    typical_lr: ClassVar[float] = 0.2  # about which to look for the best
    keeps_gauge: ClassVar[bool] = True  # whether the pairs it returns are in the balanced diagonal gauge

    @abstractmethod
    def init(self, point: Point) -> State:
        """Return the state before the first step: tensors only."""

    @abstractmethod
    def advance(
        self, point: Point, gradient: FactorPair | Tensor, state: State, *, lr: float, momentum: float, trusted: bool
    ) -> tuple[Point, State]:
        """Return the point and the state after one step; the arguments are not changed.

        Args:
            point: Where the weight is.
            gradient: True gradients of what the point stores.
            state: What ``init`` or the last step returned.
            lr: Step size, in the integrator's own convention.
            momentum: Weight of the past in the averaged gradient, 0 to 1; methods without momentum ignore it.
            trusted: Whether ``point`` is exactly what the last step returned, hence in the gauge it was written in.
        """

    def stages(
        self, point: Point, gradient: FactorPair | Tensor, state: State, *, lr: float, momentum: float, trusted: bool
    ) -> Stages:
        """Return what ``advance`` does, as a generator that may yield points where it wants another gradient.

        It is sent the gradient of what such a point stores. Nothing is written to the layer until it returns.
        """
        return self.advance(point, gradient, state, lr=lr, momentum=momentum, trusted=trusted)
        yield point

    def stages_(
        self, point: Point, gradient: FactorPair | Tensor, state: State, *, lr: float, momentum: float, trusted: bool
    ) -> Stages:
        """Return what ``stages`` does, for a caller that does not need point and state any more."""
        return self.stages(point, gradient, state, lr=lr, momentum=momentum, trusted=trusted)

    def step(
        self, point: Point, slope: Slope, state: State, *, lr: float, momentum: float, trusted: bool
    ) -> tuple[Point, State]:
        """Return the point and the state after one step, with ``slope`` for the gradient of what a point stores.

        For use without an optimizer, which drives the stages of all layers together.
        """
        stages = self.stages(point, slope(point), state, lr=lr, momentum=momentum, trusted=trusted)
        try:
            wanted = next(stages)
            while True:
                wanted = stages.send(slope(wanted))
        except StopIteration as end:
            return end.value

    @abstractmethod
    def transport(self, state: State, old: Point, new: Point) -> State:
        """Return the state at ``new``, after the bases of ``old`` were turned, cut or extended; both are trusted."""

    @abstractmethod
    def directions(self, state: State, point: Point) -> tuple[Tensor, Tensor] | None:
        """Return ``left (m, k)`` and ``right (n, k)`` along which the weight wants to grow, best first, or None."""


class AbstractInPlaceIntegrator(AbstractIntegrator):
    """One step that may write to what it is given, so that nothing is copied; a subclass writes ``advance_``.

    An optimizer that has checked the gradients lets it work on what it keeps; ``advance`` works on copies.
    """

    in_place = True

    def stages_(
        self, point: Point, gradient: FactorPair | Tensor, state: State, *, lr: float, momentum: float, trusted: bool
    ) -> Stages:
        """Return a generator that takes the step in place."""
        return self.advance_(point, gradient, state, lr=lr, momentum=momentum)
        yield point

    @abstractmethod
    def advance_(
        self, point: Point, gradient: FactorPair | Tensor, state: State, *, lr: float, momentum: float
    ) -> tuple[Point, State]:
        """Return the point and the state after one step, written over those given or new."""

    def advance(
        self, point: Point, gradient: FactorPair | Tensor, state: State, *, lr: float, momentum: float, trusted: bool
    ) -> tuple[Point, State]:
        """Return the point and the state after one step."""
        copy = type(point)(**{name: linalg.widen(part).clone() for name, part in vars(point).items()})
        kept = {name: value.clone() for name, value in state.items()}
        return self.advance_(copy, gradient, kept, lr=lr, momentum=momentum)


class AbstractClosureIntegrator(AbstractIntegrator):
    """One step from two gradients, the second at a point that the first one led to, as the papers write it.

    A subclass writes ``stages``. The step finishes within one ``step(closure)``: a layer that it leaves in the core
    form, with more directions than the ``rank`` of its state, is cut back to that rank unless a rank event comes first.
    """

    gradients = 2

    def advance(
        self, point: Point, gradient: FactorPair | Tensor, state: State, *, lr: float, momentum: float, trusted: bool
    ) -> tuple[Point, State]:
        """Refuse: one gradient is not enough."""
        raise TypeError(f"{type(self).__name__} takes {self.gradients} gradients a step: drive its stages.")

    @abstractmethod
    def stages(
        self, point: Point, gradient: FactorPair | Tensor, state: State, *, lr: float, momentum: float, trusted: bool
    ) -> Stages:
        """Yield the points where the method wants another gradient; return the point and the state after the step."""

    def step(
        self, point: Point, slope: Slope, state: State, *, lr: float, momentum: float, trusted: bool
    ) -> tuple[Point, State]:
        """Take a whole step and cut it back to its own rank."""
        new, state = super().step(point, slope, state, lr=lr, momentum=momentum, trusted=trusted)
        if isinstance(new, LowRankFactors):
            new = factors.to_pair(factors.truncate(factors.diagonalise(new), rank=int(state["rank"])))
        return new, self.init(new)

    def init(self, point: Point) -> State:
        """Return an empty state."""
        return {}

    def transport(self, state: State, old: Point, new: Point) -> State:
        """Nothing to carry."""
        return {}

    def directions(self, state: State, point: Point) -> None:
        """None are known; the caller draws random ones."""


def read(point: Point, *, trusted: bool) -> LowRankFactors:
    """Return the diagonalised factors of a point."""
    if isinstance(point, LowRankFactors):
        return factors.diagonalise(point)
    return factors.read_balanced(point) if trusted else factors.read_pair(point)


def read_gradient(at: LowRankFactors, point: Point, gradient: FactorPair | Tensor, *, trusted: bool) -> TangentGradient:
    """Return ``dK, dL, dS`` at ``at``, the reading of ``point``."""
    if not isinstance(point, FactorPair) or not isinstance(gradient, FactorPair):
        raise TypeError("a tangent step needs a layer in the pair form, got one in the core form.")
    if trusted:
        return factors.tangent_gradient_balanced(at, gradient)
    return factors.tangent_gradient(at, point, gradient)
