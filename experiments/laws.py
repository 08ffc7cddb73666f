"""The numerical laws the library stands on, measured.

python experiments/laws.py
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynarank import factors, linalg
from dynarank._discovery import discover
from dynarank.factors import FactorPair, LowRankFactors
from dynarank.integrators.base import AbstractIntegrator, Point
from dynarank.integrators.parallel_bug import ParallelBUG
from dynarank.layers._factored import AbstractFactoredLayer
from dynarank.layers.linear import LowRankLinear
from dynarank.optim.low_rank_optimizer import LowRankOptimizer
from dynarank.optim.steps import take_step

RESULTS = Path(__file__).parent / "results"
VARIANTS = {
    "Linear": (nn.Linear(30, 20), (16, 30)),
    "Conv1d": (nn.Conv1d(6, 20, 5, stride=2, padding=2), (4, 6, 31)),
    "Conv2d, stride 2, dilation 2": (nn.Conv2d(6, 20, 3, stride=2, padding=2, dilation=2), (4, 6, 15, 15)),
    "Conv2d, circular padding": (nn.Conv2d(6, 20, 3, padding=1, padding_mode="circular"), (4, 6, 9, 9)),
    "Conv3d": (nn.Conv3d(4, 20, (2, 3, 3), padding="same"), (2, 4, 6, 7, 5)),
}


def spectrum(rank: int, smallest: float) -> Tensor:
    """Return singular values that fall evenly in the logarithm from 1 to ``smallest``."""
    return torch.logspace(0, float(torch.tensor(smallest).log10()), rank, dtype=torch.float64)


def random_factors(m: int, n: int, sigma: Tensor) -> LowRankFactors:
    """Return random orthonormal bases with the given singular values, in float64."""
    U, V = (linalg.orthonormalise(torch.randn(size, len(sigma), dtype=torch.float64)) for size in (m, n))
    return LowRankFactors(U, torch.diag(sigma), V)


def tangent_gradient_error(dense: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, smallest: float) -> float:
    """Return the largest relative deviation of dK, dL, dS, read from two factors, from the dense projections."""
    twins = discover("dynarank.layers", AbstractFactoredLayer).values()
    twin = next(cls for cls in twins if cls.dense_type is type(dense))
    layer = twin.from_dense(dense.double(), rank=8).to(dtype)
    m, n = layer.matrix_shape
    layer.set_factors(factors.to_pair(random_factors(m, n, spectrum(8, smallest))))
    pair = layer.point()
    x = torch.randn(shape, dtype=dtype)
    probe = torch.randn_like(layer(x).detach())
    (layer(x) * probe).sum().backward()
    exact = layer.to_dense().double()
    (exact(x.double()) * probe.double()).sum().backward()
    G = exact.weight.grad.reshape(m, n)
    at = factors.read_balanced(pair)
    read = factors.tangent_gradient_balanced(at, layer.point_gradient())
    U, V = at.U.double(), at.V.double()
    wanted = {"dK": G @ V, "dL": G.T @ U, "dS": U.T @ G @ V}
    return max(float((getattr(read, k).double() - w).abs().max() / w.abs().max()) for k, w in wanted.items())


def parallel_bug_error() -> float:
    """Return how far parallel BUG is from the truncated SVD of the Riemannian step, relative to W."""
    W0 = random_factors(31, 23, spectrum(6, 1e-4))
    G = torch.randn(31, 23, dtype=torch.float64)
    pair = factors.to_pair(W0)
    gradient = FactorPair(pair.B @ G.T, pair.A @ G)
    moved, _ = ParallelBUG().advance(pair, gradient, {}, lr=0.1, momentum=0.0, trusted=True)
    PU, PV = W0.U @ W0.U.T, W0.V @ W0.V.T
    U, sigma, Vh = torch.linalg.svd(W0.to_dense() - 0.1 * (PU @ G + G @ PV - PU @ G @ PV))
    best = (U[:, :6] * sigma[:6]) @ Vh[:6]
    return float((moved.to_dense() - best).norm() / best.norm())


def truncation_error(dtype: torch.dtype) -> float:
    """Return how far the error of a truncation is from the tail of the spectrum, relative to the tail."""
    W = random_factors(40, 25, spectrum(10, 1e-3))
    W = LowRankFactors(W.U.to(dtype), W.S.to(dtype), W.V.to(dtype))
    tail = linalg.tails(W.sigma)
    return max(
        float(((W.to_dense() - factors.truncate(W, rank=r).to_dense()).norm() - tail[r]).abs() / tail[r])
        for r in range(1, 10)
    )


def slope(target: Tensor, point: Point) -> FactorPair | Tensor:
    """Return the gradient of ``|W - target|^2 / 2`` in what a point stores."""
    G = point.to_dense() - target
    return FactorPair(point.B @ G.T, point.A @ G) if isinstance(point, FactorPair) else point.U.T @ G @ point.V


def gauge_error(integrator: AbstractIntegrator, dtype: torch.dtype, *, condition: float) -> float:
    """Return how far weights get apart in 100 steps where the start is split into factors in another way.

    Two networks with the same weights train on the same data with ``LowRankOptimizer``; the factors of one are turned
    by a matrix of the given condition number, 1 for a rotation. The largest relative difference over the layers.
    """
    ends = []
    for turned in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(LowRankLinear(12, 16, rank=5), nn.Tanh(), LowRankLinear(16, 6, rank=3)).double()
        x, y = torch.randn(64, 12, dtype=torch.float64), torch.randn(64, 6, dtype=torch.float64).tanh()
        for layer in (model[0], model[2]) if turned else ():
            regauge_(layer, condition)
        model, x, y = model.to(dtype), x.to(dtype), y.to(dtype)
        optimizer = LowRankOptimizer(
            model,
            lr=0.4 * integrator.typical_lr,
            integrator=integrator,
            rank_policy="fixed",
            base=torch.optim.SGD,
            base_options={"lr": 0.05},
        )

        def closure(model: Any = model, x: Tensor = x, y: Tensor = y, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss.detach()

        for _ in range(100):
            take_step(optimizer, closure)
        ends.append([layer.to_dense().weight.detach().double() for layer in (model[0], model[2])])
    return max(float((one - other).norm() / one.norm()) for one, other in zip(*ends, strict=True))


def regauge_(layer: LowRankLinear, condition: float) -> None:
    """Split the weight into ``C^T A`` and ``C^-1 B``, in place."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(2, layer.rank, layer.rank, generator=generator, dtype=torch.float64)
    P, Q = torch.linalg.qr(drawn)[0]
    C = P @ torch.diag(condition ** torch.linspace(-0.5, 0.5, layer.rank, dtype=torch.float64)) @ Q
    with torch.no_grad():
        layer.A.copy_(C.T @ layer.A)
        layer.B.copy_(torch.linalg.solve(C, layer.B))


def drift(integrator: AbstractIntegrator, lr: float, steps: int = 10_000) -> float:
    """Return max |U^T U - I| over float32 steps with a decaying spectrum and rank events every 25 steps."""
    generator = torch.Generator().manual_seed(0)
    m, n = 60, 80
    target = random_factors(m, n, spectrum(16, 1e-6)).to_dense().float()
    point = factors.to_pair(
        LowRankFactors(*(p.float() for p in vars(random_factors(m, n, spectrum(8, 1e-6))).values()))
    )
    state, worst = integrator.init(point), 0.0
    for step in range(1, steps + 1):
        wanted = target - 0.1 * torch.randn(m, n, generator=generator)
        point, state = integrator.step(point, partial(slope, wanted), state, lr=lr, momentum=0.9, trusted=True)
        at = factors.read_balanced(point) if isinstance(point, FactorPair) else point
        for basis in (at.U, at.V):
            worst = max(worst, float((basis.T @ basis - torch.eye(basis.shape[1])).abs().max()))
        if step % 25 == 0 and isinstance(point, FactorPair):
            kept = factors.truncate(at, rank=6)
            left, right = torch.randn(m, 3, generator=generator), torch.randn(n, 3, generator=generator)
            grown = factors.augment(
                kept, left=linalg.complement(kept.U, left, 3), right=linalg.complement(kept.V, right, 3)
            )
            new = factors.to_pair(grown)
            state, point = integrator.transport(state, point, new), new
    return worst


def main() -> None:
    """Measure every law and write the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for name, (dense, shape) in VARIANTS.items():
        for dtype, goal in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            worst = max(tangent_gradient_error(dense, shape, dtype, smallest) for smallest in (1.0, 1e-4, 1e-8))
            rows.append((f"tangent gradients of {name}, {str(dtype)[6:]}, sigma down to 1e-8", worst, goal))
    rows.append(("parallel BUG against the truncated Riemannian step, float64", parallel_bug_error(), 1e-10))
    rows.append(("truncation error against the tail, float64", truncation_error(torch.float64), 1e-10))
    rows.append(("truncation error against the tail, float32", truncation_error(torch.float32), 1e-4))
    for name, cls in discover("dynarank.integrators", AbstractIntegrator).items():
        if cls.keeps_gauge:
            rows.append((f"orthonormality over 10,000 float32 steps, {name}", drift(cls(), 0.05), 1e-5))
            for dtype, goal in ((torch.float64, 1e-10), (torch.float32, 1e-3)):
                for kind, condition in (("rotation", 1.0), ("any gauge, condition 1e3", 1e3)):
                    name_of = f"100 steps from another gauge ({kind}), {str(dtype)[6:]}, {name}"
                    rows.append((name_of, gauge_error(cls(), dtype, condition=condition), goal))
    lines = ["| law | largest deviation | goal | |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {value:.1e} | {goal:.0e} | {'holds' if value <= goal else 'misses'} |"
        for name, value, goal in rows
    ]
    text = "\n".join(lines)
    (RESULTS / "laws.md").write_text(f"# Laws\n\n`python experiments/laws.py`, seed 0\n\n{text}\n")
    print(text)


if __name__ == "__main__":
    main()
