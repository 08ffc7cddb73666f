"""What every integrator obeys, whatever its method: run on all that discovery finds."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from dynarank import factors
from dynarank._discovery import discover
from dynarank.factors import FactorPair, LowRankFactors
from dynarank.integrators.base import AbstractIntegrator, Point, State

INTEGRATORS = discover("dynarank.integrators", AbstractIntegrator)
KEEPING = [name for name, cls in INTEGRATORS.items() if cls.keeps_gauge]
SIZES = [(7, 5, 1), (5, 7, 2), (7, 5, 4), (5, 7, 5), (6, 6, 6), (1, 5, 1)]
CYCLE = 12  # steps that hold a whole cycle of a method that changes its form

Gradient = Callable[[Point, Tensor], FactorPair | Tensor]
Slope = Callable[[Point], FactorPair | Tensor]
MakePair = Callable[[int, int, int], FactorPair]


@pytest.fixture(params=sorted(INTEGRATORS))
def integrator(request: pytest.FixtureRequest) -> AbstractIntegrator:
    return INTEGRATORS[request.param]()


@pytest.fixture(params=KEEPING)
def keeping(request: pytest.FixtureRequest) -> AbstractIntegrator:
    """An integrator that promises the balanced diagonal gauge."""
    return INTEGRATORS[request.param]()


@pytest.fixture(params=SIZES, ids=lambda size: "{}x{} rank {}".format(*size))
def pair(request: pytest.FixtureRequest, make_pair: MakePair) -> FactorPair:
    return make_pair(*request.param)


def draw(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def path(
    integrator: AbstractIntegrator, start: Point, slope: Slope, *, lr: float, steps: int
) -> Iterator[tuple[Point, State]]:
    """Yield the points and states of consecutive steps, as an optimizer takes them."""
    point, state = start, integrator.init(start)
    for _ in range(steps):
        point, state = integrator.step(point, slope, state, lr=lr, momentum=0.9, trusted=True)
        yield point, state


def at_rest(integrator: AbstractIntegrator, pair: FactorPair, gradient_of: Gradient) -> tuple[FactorPair, State]:
    """Return a pair and a state some steps on, so that the state is not the initial one."""
    G = draw(*pair.shape)
    visited = path(integrator, pair, lambda point: gradient_of(point, G), lr=0.01, steps=3 * CYCLE)
    return [(p, s) for p, s in visited if isinstance(p, FactorPair)][2]


def tensors(*things: Point | FactorPair | Tensor | State) -> list[Tensor]:
    """Return every tensor of points, gradients and states."""
    found = []
    for thing in things:
        parts = thing if isinstance(thing, dict) else {"": thing} if isinstance(thing, Tensor) else vars(thing)
        found += [part for part in parts.values() if isinstance(part, Tensor)]
    return found


def assert_near(point: Point, W: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(point.to_dense(), W, atol=atol, rtol=0)


# --- the step ----------------------------------------------------------------------------------------------------


def test_a_step_of_size_zero_changes_nothing(integrator, pair, gradient_of):
    G = draw(*pair.shape)
    for point, _ in path(integrator, pair, lambda point: gradient_of(point, G), lr=0.0, steps=CYCLE):
        assert_near(point, pair.to_dense())


def test_a_gradient_of_zero_changes_nothing(integrator, pair, gradient_of):
    zero = torch.zeros(pair.shape, dtype=torch.float64)
    for point, _ in path(integrator, pair, lambda point: gradient_of(point, zero), lr=0.1, steps=CYCLE):
        assert_near(point, pair.to_dense())


def test_a_small_step_lowers_a_quadratic_loss(integrator, pair, gradient_of):
    target = draw(*pair.shape)
    slope = lambda point: gradient_of(point, point.to_dense() - target)  # noqa: E731
    point, _ = integrator.step(pair, slope, integrator.init(pair), lr=1e-3, momentum=0.9, trusted=True)
    assert float((point.to_dense() - target).norm()) < float((pair.to_dense() - target).norm())


@pytest.mark.parametrize(("m", "n", "rank"), [(7, 5, 1), (5, 7, 3), (6, 6, 6)])
def test_a_target_of_the_same_rank_is_reached(integrator, make_pair, gradient_of, m, n, rank):
    pair, target = make_pair(m, n, rank), draw(m, rank) @ draw(rank, n, seed=6)
    target *= pair.to_dense().norm() / target.norm()
    slope = lambda point: gradient_of(point, point.to_dense() - target)  # noqa: E731
    *_, (last, _) = path(integrator, pair, slope, lr=0.02, steps=800)
    assert float((last.to_dense() - target).norm()) < 0.1 * float((pair.to_dense() - target).norm())


def test_a_step_is_a_pure_function(integrator, pair, gradient_of):
    G, before = draw(*pair.shape), torch.get_rng_state()
    point, state = pair, integrator.init(pair)
    for _ in range(CYCLE):
        given = gradient_of(point, G)
        slope = lambda other, here=point, given=given: given if other is here else gradient_of(other, G)  # noqa: E731
        inputs = tensors(point, given, state)
        kept = [part.clone() for part in inputs]
        options = {"lr": 0.05, "momentum": 0.9, "trusted": True}
        first = integrator.step(point, slope, state, **options)
        second = integrator.step(point, slope, state, **options)
        assert all(torch.equal(one, other) for one, other in zip(inputs, kept, strict=True)), "an argument was changed"
        assert all(torch.equal(one, other) for one, other in zip(tensors(*first), tensors(*second), strict=True))
        point, state = first
    assert torch.equal(before, torch.get_rng_state()), "the global generator was used"


def test_the_state_is_tensors_of_fixed_shapes(integrator, pair, gradient_of):
    G = draw(*pair.shape)
    for point, state in path(integrator, pair, lambda point: gradient_of(point, G), lr=0.05, steps=CYCLE):
        assert isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values())
        if isinstance(point, FactorPair):
            fresh = integrator.init(point)
            assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in fresh.items()}
            assert (point.rank, point.shape) == (pair.rank, pair.shape)


def test_the_start_is_at_rest(integrator, pair):
    assert all(not part.any() for part in integrator.init(pair).values())


def test_pairs_come_back_in_the_balanced_diagonal_gauge(keeping, pair, gradient_of):
    G = draw(*pair.shape)
    for point, _ in path(keeping, pair, lambda point: gradient_of(point, G), lr=0.05, steps=CYCLE):
        if isinstance(point, FactorPair):
            sigma = torch.linalg.svdvals(point.to_dense())[: point.rank]
            torch.testing.assert_close(point.A @ point.A.mT, torch.diag(sigma), atol=1e-12, rtol=0)
            torch.testing.assert_close(point.B @ point.B.mT, torch.diag(sigma), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["rotation", "any gauge"])
def test_the_step_of_the_weight_does_not_depend_on_the_gauge(keeping, pair, gradient_of, kind):
    G = draw(*pair.shape, seed=8)
    C = torch.linalg.qr(draw(pair.rank, pair.rank))[0]
    if kind == "any gauge":
        C = torch.diag(torch.logspace(-0.5, 0.5, pair.rank, dtype=torch.float64)) @ C
    turned = FactorPair(C.mT @ pair.A, torch.linalg.solve(C, pair.B))
    slope = lambda point: gradient_of(point, G)  # noqa: E731
    found = [
        keeping.step(point, slope, keeping.init(point), lr=0.05, momentum=0.9, trusted=trusted)[0]
        for point, trusted in ((pair, True), (pair, False), (turned, False))
    ]
    assert_near(found[1], found[0].to_dense())
    assert_near(found[2], found[0].to_dense(), atol=1e-11)


# --- what surrounds the step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", ["identity", "signs"])
def test_transport_along_a_turn_changes_nothing(integrator, pair, gradient_of, turn):
    here, state = at_rest(integrator, pair, gradient_of)
    signs = torch.ones(pair.rank, 1).double() if turn == "identity" else draw(pair.rank, 1).sign()
    there = FactorPair(signs * here.A, signs * here.B)
    carried = integrator.transport(state, here, there)
    G = draw(*pair.shape, seed=9)
    steps = [
        integrator.step(point, lambda at: gradient_of(at, G), known, lr=0.05, momentum=0.9, trusted=True)[0]
        for point, known in ((here, state), (there, carried))
    ]
    assert_near(steps[1], steps[0].to_dense())


def of_rank(W: LowRankFactors, rank: int) -> FactorPair:
    """The same weight cut to a rank, or grown to it by random directions."""
    if rank <= W.rank:
        return factors.to_pair(factors.truncate(W, rank=rank))
    left, right = (torch.linalg.qr(torch.cat([b, draw(len(b), rank - W.rank)], -1))[0] for b in (W.U, W.V))
    return factors.to_pair(factors.augment(W, left=left[:, W.rank :], right=right[:, W.rank :]))


def test_transport_fits_every_new_rank_and_changes_no_argument(integrator, pair, gradient_of):
    here, state = at_rest(integrator, pair, gradient_of)
    for rank in range(1, min(pair.shape) + 1):
        there = of_rank(factors.read_pair(here), rank)
        kept = [part.clone() for part in tensors(here, there, state)]
        carried, fresh = integrator.transport(state, here, there), integrator.init(there)
        assert {k: v.shape for k, v in carried.items()} == {k: v.shape for k, v in fresh.items()}
        assert all(bool(torch.isfinite(part).all()) for part in carried.values())
        assert all(torch.equal(one, other) for one, other in zip(tensors(here, there, state), kept, strict=True))
        slope = lambda at: gradient_of(at, draw(*pair.shape))  # noqa: E731
        integrator.step(there, slope, carried, lr=0.05, momentum=0.9, trusted=True)


def test_an_event_may_come_at_any_moment_of_a_cycle(integrator, pair, gradient_of):
    G = draw(*pair.shape)
    for point, state in path(integrator, pair, lambda point: gradient_of(point, G), lr=0.05, steps=CYCLE):
        W = factors.diagonalise(point) if isinstance(point, LowRankFactors) else factors.read_pair(point)
        there = factors.to_pair(factors.truncate(W, rank=1))
        carried, fresh = integrator.transport(state, point, there), integrator.init(there)
        assert {k: v.shape for k, v in carried.items()} == {k: v.shape for k, v in fresh.items()}


def test_directions_are_columns_beside_the_weight_or_none(integrator, pair, gradient_of):
    here, state = at_rest(integrator, pair, gradient_of)
    ways = integrator.directions(state, here)
    if ways is not None:
        (left, right), (m, n) = ways, pair.shape
        assert left.shape[0] == m and right.shape[0] == n and min(left.shape[1], right.shape[1]) >= 1
        assert bool(torch.isfinite(left).all()) and bool(torch.isfinite(right).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_computed_in_float32(integrator, pair, gradient_of, dtype):
    small = FactorPair(pair.A.to(dtype), pair.B.to(dtype))
    slope = lambda at: gradient_of(at, draw(*pair.shape).to(next(iter(vars(at).values())).dtype))  # noqa: E731
    point, state = integrator.step(
        small, slope, integrator.init(small), lr=0.05, momentum=0.9, trusted=dtype == torch.float32
    )
    for part in (*tensors(point), *(value for value in state.values() if value.is_floating_point())):
        assert part.dtype == torch.float32 and bool(torch.isfinite(part).all())


def test_the_gauge_is_declared(integrator):
    assert isinstance(integrator.keeps_gauge, bool)
