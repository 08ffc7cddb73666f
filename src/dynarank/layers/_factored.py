"""What the optimizer asks of a layer whose weight is a product of factors, whatever they are."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dynarank import cost
from dynarank.factors import FactorPair, LowRankFactors
from dynarank.layers._weight import ReadOnlyWeight

Point = FactorPair | LowRankFactors


@dataclass(frozen=True)
class ModeSpectrum:
    """A rank of a layer besides that of its matrix.

    Args:
        sigma: Singular values of the unfolding along the mode, descending.
        shape: Shape of that unfolding of the whole weight.
    """

    sigma: Tensor
    shape: tuple[int, int]


@dataclass(frozen=True)
class ModeChange:
    """What a rank event does to such a rank: how many directions stay and how many are tried on top of them."""

    rank: int
    candidates: int


class AbstractFactoredLayer(nn.Module, ABC):
    """A layer whose weight is a matrix ``W (m, n)`` of rank at most ``rank``, and moves as such along a manifold.

    A point on the way is a ``FactorPair`` of ``W`` with the gradients of both factors. A layer may hold the right
    factor itself in a structured form, with ranks of its own in other modes: then the gradients are projected on what
    it can hold, and a point that it is moved to is brought there by a retraction.
    """

    dense_type: type[nn.Module]  # class of the dense twin
    factor_names: ClassVar[tuple[str, ...]]  # parameters that hold the weight, whichever are there
    basis_names: ClassVar[tuple[str, ...]] = ()  # and buffers

    @property
    def weight(self) -> Tensor:
        """``W`` in the shape of the dense twin's weight: differentiable, built at each access, read-only."""
        return self._dense_weight().as_subclass(ReadOnlyWeight)

    @weight.setter
    def weight(self, value: object) -> None:
        raise AttributeError(
            "weight of a low-rank layer is read-only: it is the product of the factors. "
            "Use layer.set_weight_(tensor) to start from another dense weight."
        )

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse a parameter called ``weight``; otherwise as in ``nn.Module``."""
        if name == "weight":
            type(self).weight.fset(self, param)  # type: ignore[attr-defined]
        super().register_parameter(name, param)

    @abstractmethod
    def _dense_weight(self) -> Tensor:
        """Return ``W`` in the shape of the dense twin's weight, differentiable."""

    @property
    @abstractmethod
    def matrix_shape(self) -> tuple[int, int]:
        """Shape ``(m, n)`` of the weight as a matrix."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """Number of directions in use."""

    @property
    @abstractmethod
    def capacity(self) -> int:
        """Number of directions stored."""

    @property
    @abstractmethod
    def all_ranks(self) -> tuple[int, ...]:
        """Rank of the matrix, and those of the other modes, if there are any."""

    @property
    @abstractmethod
    def all_capacities(self) -> tuple[int, ...]:
        """Directions stored along each of these."""

    @property
    @abstractmethod
    def form(self) -> Literal["pair", "core"]:
        """Which form the points of the layer have."""

    @property
    @abstractmethod
    def max_rank(self) -> int:
        """Largest possible rank."""

    @abstractmethod
    def point(self) -> Point:
        """Return the factors in use."""

    @abstractmethod
    def point_gradient(self) -> FactorPair | Tensor | None:
        """Return the gradients of the point, or None where the layer took no part in the backward pass."""

    @abstractmethod
    def move_to(self, point: Point) -> Point:
        """Go to a point near by, without a change of shape; return where the layer stands then."""

    @abstractmethod
    def change_ranks_to(self, point: Point, modes: Mapping[str, ModeChange], *, resize: bool, towards: Any) -> Point:
        """Go to a point of another rank, with other ranks in other modes; return where the layer stands then."""

    @abstractmethod
    def fits(self, rank: int, modes: Mapping[str, ModeChange] | None = None) -> bool:
        """Whether the layer can take these ranks without a change of shape."""

    @abstractmethod
    def deployed_parameters(self) -> int:
        """Return how many numbers the weight takes as deployed, without spare rows."""

    @property
    @abstractmethod
    def mode_names(self) -> tuple[str, ...]:
        """Names of the ranks besides that of the matrix."""

    @abstractmethod
    def modes(self) -> dict[str, ModeSpectrum]:
        """Return what a rank policy sees of these, by name."""

    def ranks_by_name(self, name: str) -> dict[str, int]:
        """Return the ranks of a layer called ``name``: its own, or ``name[out]``, ``name[in]``, one for each mode."""
        names = [f"{name}[{mode}]" for mode in ("out", *self.mode_names)] if self.mode_names else [name]
        return dict(zip(names, self.all_ranks, strict=True))

    @abstractmethod
    def randomise_(self, ranks: Sequence[int]) -> None:
        """Take random factors with these ranks, in the order of ``all_ranks``, of about the size of a fresh weight."""

    @abstractmethod
    def to_dense(self) -> nn.Module:
        """Return the dense layer."""

    @abstractmethod
    def to_plain(self) -> nn.Sequential:
        """Return plain torch layers that compute the same function."""

    @classmethod
    @abstractmethod
    def dense_options(cls, dense: Any) -> dict[str, Any]:
        """Return the options that this layer shares with its dense twin."""

    @abstractmethod
    def dense_twin(self, device: Any = None) -> nn.Module:
        """Return a freshly initialised dense layer with the same options, on the same device unless one is given."""

    @classmethod
    @abstractmethod
    def smallest_of(cls, dense: Any) -> "AbstractFactoredLayer":
        """Return the twin of a dense layer with every rank 1."""

    def smallest(self) -> "AbstractFactoredLayer":
        """Return a fresh layer with the same options and every rank 1, on the meta device."""
        return type(self).smallest_of(self.dense_twin("meta"))

    @abstractmethod
    def prices(self, ranks: Sequence[int]) -> tuple[float | None, ...]:
        """Return the numbers that a direction takes were these the ranks, in the order of ``all_ranks``.

        Each has its share of what all modes have in common; None where it is a row of each of two factors.
        """

    @property
    def dense_parameters(self) -> int:
        """Entries of the dense weight."""
        return prod(self.matrix_shape)


class AbstractMatrixLayer(AbstractFactoredLayer, ABC):
    """A layer with one rank only, which holds any pair exactly."""

    @abstractmethod
    def set_factors(self, point: Point, *, form: Literal["pair", "core"] | None = None, resize: bool = True) -> None:
        """Set the weight."""

    def move_to(self, point: Point) -> Point:
        """Set the factors, without a change of capacity."""
        self.set_factors(point, resize=False)
        return point

    def change_ranks_to(self, point: Point, modes: Mapping[str, ModeChange], *, resize: bool, towards: Any) -> Point:
        """Set the factors; there are no other modes."""
        self.set_factors(point, resize=resize)
        return point

    @torch.no_grad()
    def randomise_(self, ranks: Sequence[int]) -> None:
        """Take random factors of the one rank."""
        like, (m, n), (rank,) = next(self.parameters()), self.matrix_shape, ranks
        A, B = (torch.randn(rank, size, dtype=like.dtype, device=like.device) for size in (m, n))
        self.set_factors(FactorPair(A / m**0.5, B / n**0.5))

    @property
    def all_ranks(self) -> tuple[int]:
        """The one rank."""
        return (self.rank,)

    @property
    def all_capacities(self) -> tuple[int]:
        """The one capacity."""
        return (self.capacity,)

    @property
    def mode_names(self) -> tuple[str, ...]:
        """None: a matrix has one rank."""
        return ()

    def modes(self) -> dict[str, ModeSpectrum]:
        """None."""
        return {}

    def prices(self, ranks: Sequence[int]) -> tuple[None]:
        """A row of each of two factors."""
        return (None,)

    def deployed_parameters(self) -> int:
        """Return the entries of two factors at the rank, or of the dense weight where that is smaller or equal."""
        return cost.deployed_parameters(*self.matrix_shape, self.rank)


def factored_layers(model: nn.Module) -> dict[str, AbstractFactoredLayer]:
    """Return every layer of ``model`` that has factors once, under its first qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AbstractFactoredLayer)}


def own_name(name: str, layer: AbstractFactoredLayer) -> str:
    """Return what the matrix of a layer is called among its ranks."""
    return next(iter(layer.ranks_by_name(name)))


def ranks_held(layers: Mapping[str, AbstractFactoredLayer]) -> dict[str, int]:
    """Return the ranks that layers have, in all modes."""
    return {key: rank for name, layer in layers.items() for key, rank in layer.ranks_by_name(name).items()}
