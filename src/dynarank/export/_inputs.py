"""Example inputs: how they go into a model, which of their sizes is the batch, and how far two outputs are apart."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call of a model.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, model: nn.Module) -> list[Tensor]:
        """Return every tensor in the output of ``model``, which gets copies of the tensors."""
        copied = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (self.args, self.kwargs))
        with torch.no_grad():
            return tensors_of(model(*copied[0], **copied[1]))

    def tensors(self) -> list[Tensor]:
        """Return every tensor among the arguments, in order."""
        return tensors_of((self.args, self.kwargs))

    def doubled(self) -> "Inputs":
        """Return a batch of twice the size: every sample two times."""
        return Inputs(*self._map(lambda tensor: torch.cat([tensor, tensor]), lambda leaf: leaf))

    def dynamic_shapes(self) -> Any:
        """Return which dimensions ``torch.export`` is to leave open: the first one, where it is the batch."""
        args, kwargs = self._map(lambda tensor: {0: torch.export.Dim.DYNAMIC}, lambda leaf: None)
        return kwargs or args

    def batch_size(self) -> int:
        """Return the first size of the first tensor.

        Raises:
            ValueError: There is no tensor with a dimension.
        """
        size = next((tensor.shape[0] for tensor in self.tensors() if tensor.dim()), None)
        if size is None:
            raise ValueError("dynamic_batch: example_inputs hold no tensor with a batch dimension.")
        return size

    def _map(self, batched: Callable[[Tensor], Any], other: Callable[[Any], Any]) -> Any:
        """Return the arguments with one change for tensors with a batch, and another for all else."""
        size = self.batch_size()

        def change(leaf: Any) -> Any:
            return batched(leaf) if isinstance(leaf, Tensor) and leaf.shape[:1] == (size,) else other(leaf)

        return tree_map(change, (self.args, self.kwargs))


def as_inputs(example_inputs: Any) -> Inputs:
    """Return example inputs as arguments: a tensor, a sequence of positional or a mapping of keyword arguments."""
    if isinstance(example_inputs, Mapping):
        return Inputs((), dict(example_inputs))
    if isinstance(example_inputs, Sequence):
        return Inputs(tuple(example_inputs), {})
    return Inputs((example_inputs,), {})


def tensors_of(tree: Any) -> list[Tensor]:
    """Return the tensors among the leaves of a nested structure."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def largest_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference between entries of two lists of tensors; equal infinities and NaNs do not differ.

    Raises:
        RuntimeError: There are not as many tensors, or not of the same shapes.

    Example:
        >>> largest_difference([torch.tensor([1.0, torch.nan])], [torch.tensor([3.0, torch.nan])])
        2.0
    """
    shapes, wanted = ([tuple(tensor.shape) for tensor in tensors] for tensors in (found, expected))
    if shapes != wanted:
        raise RuntimeError(f"the file computes outputs of shapes {shapes}, the model {wanted}. The file was not kept.")
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        one, other = one.detach().cpu().double(), other.detach().cpu().double()
        same = (one == other) | (one.isnan() & other.isnan())
        apart = torch.where(same, 0.0, (one - other).abs())
        worst = max(worst, float(apart.max())) if apart.numel() else worst
    return worst
