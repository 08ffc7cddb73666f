"""What a layer computes, and the products that each way of computing it takes."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

Purpose = Literal["training", "inference"]
Form = Literal["dense", "factored", "multiplied"]
Kind = Literal["linear", "conv2d", "conv2d channels last"]

PURPOSES: tuple[Purpose, ...] = ("training", "inference")
FORMS: tuple[Form, ...] = ("dense", "factored", "multiplied")
KINDS: tuple[Kind, ...] = ("linear", "conv2d", "conv2d channels last")
OPERATORS = tuple(f"{kind}{part}" for kind in KINDS for part in ("", " up"))


class Stage(NamedTuple):
    """A product ``(rows, inner) (inner, outer)``, and the operator of `OPERATORS` that computes it."""

    operator: str
    outer: int
    inner: int
    rows: float


@dataclass(frozen=True)
class Work:
    """What a layer with a weight ``W (m, n)`` of some rank does in one pass of a model.

    Args:
        kind: A linear layer, or a 2-dimensional convolution whose inputs have one of two layouts.
        shape: ``(m, n)`` of the weight as a matrix: outputs by everything else.
        rank: Rows of the stored factors.
        rows: Rows that the weight is multiplied by in one call: batch times positions.
        calls: How often the layer is called.
    """

    kind: Kind
    shape: tuple[int, int]
    rank: int
    rows: float
    calls: int = 1

    @property
    def break_even(self) -> float:
        """Rank at which factors have as many entries as the weight, ``mn / (m + n)``."""
        m, n = self.shape
        return m * n / (m + n)

    def stages(self, form: Form) -> list[Stage]:
        """Return the products that one call takes: by ``W``, by its factors, or by ``W`` after a product of factors.

        Example:
            >>> [stage[1:] for stage in Work("linear", (20, 30), rank=4, rows=100).stages("factored")]
            [(4, 30, 100), (20, 4, 100)]
        """
        m, n = self.shape
        if form == "factored":
            return [Stage(self.kind, self.rank, n, self.rows), Stage(f"{self.kind} up", m, self.rank, self.rows)]
        whole = Stage(self.kind, m, n, self.rows)
        return [whole] if form == "dense" else [whole, Stage("linear", m, self.rank, n)]

    def multiplications(self, form: Form) -> float:
        """Return the multiplications of a forward pass; a backward pass takes twice as many in every form.

        Example:
            >>> work = Work("linear", (20, 30), rank=4, rows=100)
            >>> [work.multiplications(form) for form in FORMS]
            [60000, 20000, 62400]
        """
        return self.calls * sum(stage.outer * stage.inner * stage.rows for stage in self.stages(form))
