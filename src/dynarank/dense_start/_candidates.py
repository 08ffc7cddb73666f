"""The dense layers that may become low-rank while they train."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dynarank import cost, linalg
from dynarank.factorize import factorize_


@dataclass(frozen=True)
class Candidate:
    """A dense layer.

    Args:
        name: Its qualified name.
        shape: Shape ``(m, n)`` of its weight as a matrix.
        twin: A low-rank layer of rank 1 in its place, which knows how the weight becomes a matrix.
    """

    name: str
    shape: tuple[int, int]
    twin: Any

    @property
    def full(self) -> int:
        """Full rank."""
        return min(self.shape)

    def pays(self, rank: int) -> bool:
        """Whether two factors of this rank hold less than the dense weight."""
        return rank <= cost.break_even_rank(*self.shape)

    def matrix(self, weight: Tensor) -> Tensor:
        """Return a weight, or anything else of its shape, as ``(m, n)``, detached, in at least float32."""
        return linalg.widen(self.twin.as_matrix(weight.detach()))


def find_candidates(model: nn.Module, choice: Mapping[str, Any]) -> dict[str, Candidate]:
    """Return the trainable dense layers for which some rank pays, in the order of the model.

    Args:
        model: The dense model; it is left as it is.
        choice: Options of `factorize_` that say which layers and in which form.

    Raises:
        ValueError: There is none, or convolutions would get ranks in several modes.
    """
    if str(choice.get("conv_form", "matrix")).startswith("tucker"):
        raise ValueError(
            f"conv_form must be 'matrix' or 'spatial' for a dense start, got {choice['conv_form']!r}: a core in "
            "several modes has no bases that could stay."
        )
    twins = copy.deepcopy(model)
    report = factorize_(twins, rank=1, **choice)
    found = {}
    for entry in report.factorized:
        if model.get_submodule(entry.name).weight.requires_grad:
            twin: Any = twins.get_submodule(entry.name)
            found[entry.name] = Candidate(entry.name, twin.matrix_shape, twin)
    if not found:
        raise ValueError("no layer could go low-rank: the weights of all that factorize_ would take are frozen.")
    return found
