"""Training, validation and test tensors of one data set, held in memory."""

from dataclasses import dataclass, fields, replace
from typing import Self, final

import torch

PARTS = ("train", "validation", "test")


@final
@dataclass(frozen=True, eq=False, repr=False)
class DataSplits:
    """Three disjoint parts of a data set as plain tensors.

    There are no workers and no files behind it: everything is in memory, on one device. It does not shuffle;
    `Batches` does.

    Args:
        name: Name of the data set, for reports.
        train_inputs: What the network is trained on.
        train_targets: Class indices, or regression targets when ``classes`` is None.
        validation_inputs: For every choice (learning rate, rank, stopping).
        validation_targets: As ``train_targets``.
        test_inputs: Looked at once, at the end.
        test_targets: As ``train_targets``.
        classes: Number of classes, or None for regression.

    Shape:
        - inputs: ``(N, *)``, the same ``*`` in all parts, floating point. ``N`` of the validation part may be 0.
        - targets: ``(N,)`` of int64 for classification, ``(N, outputs)`` floating point for regression.

    Raises:
        ValueError: If inputs and targets of a part differ in length, if the sample shapes differ between parts, or if
            ``classes`` is below 2.

    Example:
        >>> inputs, targets = torch.zeros(6, 1, 8, 8), torch.zeros(6, dtype=torch.int64)
        >>> DataSplits("toy", inputs, targets, inputs[:2], targets[:2], inputs[:2], targets[:2], classes=10)
        DataSplits(toy: train (6, 1, 8, 8), validation (2, 1, 8, 8), test (2, 1, 8, 8), classes 10)
    """

    name: str
    train_inputs: torch.Tensor  # (N, *)
    train_targets: torch.Tensor  # (N,) or (N, outputs)
    validation_inputs: torch.Tensor
    validation_targets: torch.Tensor
    test_inputs: torch.Tensor
    test_targets: torch.Tensor
    classes: int | None

    def __post_init__(self) -> None:
        if self.classes is not None and self.classes < 2:
            raise ValueError(f"{self.name}: classes must be at least 2, or None for regression, got {self.classes}.")
        for part in PARTS:
            inputs, targets = self.part(part)
            if len(inputs) != len(targets):
                raise ValueError(f"{self.name}: {part} has {len(inputs)} inputs but {len(targets)} targets.")
            if tuple(inputs.shape[1:]) != self.input_shape:
                got = tuple(inputs.shape[1:])
                raise ValueError(f"{self.name}: {part} inputs must have sample shape {self.input_shape}, got {got}.")

    def part(self, part: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets of ``"train"``, ``"validation"`` or ``"test"``.

        Raises:
            ValueError: If the part has another name.
        """
        if part not in PARTS:
            raise ValueError(f"{self.name}: part must be one of {', '.join(PARTS)}, got {part!r}.")
        return getattr(self, f"{part}_inputs"), getattr(self, f"{part}_targets")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, without the batch dimension."""
        return tuple(self.train_inputs.shape[1:])

    @property
    def outputs(self) -> int:
        """How many outputs a network needs: the number of classes, or of regression targets per sample."""
        return self.train_targets.shape[1] if self.classes is None else self.classes

    def to(self, device: torch.device | str) -> Self:
        """Return the same splits with every tensor on ``device``; dtypes are kept."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})

    def __repr__(self) -> str:
        shapes = ", ".join(f"{part} {tuple(self.part(part)[0].shape)}" for part in PARTS)
        return f"DataSplits({self.name}: {shapes}, classes {self.classes})"
