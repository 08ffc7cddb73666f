"""A calibration as text: where layers of common shapes break even, and how far it can be trusted."""

from collections.abc import Iterator, Sequence

from dynarank._tables import aligned
from dynarank.cost_model.costs import AbstractCosts, Check
from dynarank.cost_model.work import PURPOSES, Kind, Purpose, Work

ROWS = (8, 64, 512, 4096)
SHAPES: tuple[tuple[Kind, tuple[int, int]], ...] = (
    *(("linear", (size, size)) for size in (64, 128, 256, 512, 1024)),
    *(("linear", shape) for shape in ((64, 512), (512, 64), (512, 2048), (2048, 512))),
    *(("conv2d", (size, 9 * size)) for size in (16, 64, 256)),
    *(("conv2d channels last", (size, 9 * size)) for size in (16, 64, 256)),
)


def break_even_table(costs: AbstractCosts, purpose: Purpose) -> str:
    """Return the ranks up to which factors are not slower than a dense layer, as fractions of ``mn / (m + n)``."""
    head = (purpose, "m x n", "mn/(m+n)", *(f"{rows} rows" for rows in ROWS))
    rows = []
    for kind, shape in SHAPES:
        works = [Work(kind, shape, rank=1, rows=count) for count in ROWS]
        ranks = [costs.break_even_rank(work, purpose) for work in works]
        cells = (_fraction(rank, work) for rank, work in zip(ranks, works, strict=True))
        rows.append((kind, "{} x {}".format(*shape), f"{works[0].break_even:.1f}", *cells))
    return aligned(head, rows, right=tuple(range(1, len(head))))


def _fraction(rank: int, work: Work) -> str:
    if rank == 0:
        return "never"
    return "always" if rank == min(work.shape) else f"{rank / work.break_even:.2f}"


def check_table(checks: Sequence[Check]) -> str:
    """Return how good the fit is for shapes that it has not seen."""
    head = ("held out", "", "layers", "error", "worst", "time lost", "by the rule")
    rows = [
        (
            check.kind,
            check.purpose,
            str(check.layers),
            *(f"{100 * value:.1f} %" for value in (check.median_error, check.worst_error, check.loss, check.rule_loss)),
        )
        for check in checks
    ]
    return aligned(head, rows, right=(2, 3, 4, 5, 6))


def texts(costs: AbstractCosts, checks: Sequence[Check]) -> Iterator[str]:
    """Yield the tables, each with what it says."""
    for purpose in PURPOSES:
        yield break_even_table(costs, purpose)
    yield (
        "Largest rank at which a layer is not slower through its factors than dense, as a fraction of mn/(m+n), where\n"
        "factors have as many entries as the weight. Training is a forward and a backward pass, without an optimizer."
    )
    if not checks:
        return
    yield check_table(checks)
    yield (
        "Shapes that the fit has not seen: median and worst error of the time of a low-rank layer relative to the\n"
        "dense one, and the time lost by choosing between the two by the fit, and by the rule that is used without it."
    )
    for check in checks:
        if check.loss > check.rule_loss:
            yield f"{check.kind}, {check.purpose}: the rule chooses better than the fit. Measure longer, undisturbed."
