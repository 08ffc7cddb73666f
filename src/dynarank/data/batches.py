"""Shuffled minibatches that resume exactly in the middle of an epoch."""

from collections.abc import Mapping
from typing import Any, Self, final

import torch


@final
class Batches:
    """An endless iterator over shuffled minibatches, one permutation of the samples per epoch.

    It never ends: epochs follow one another, so ``for inputs, targets in batches`` needs a ``break`` or
    ``itertools.islice``. The first permutation is drawn on construction.

    For several processes, every process builds it with an equally seeded generator: all draw the same permutation and
    each takes its contiguous, equal slice of every global batch. The slices in process order are exactly the batch of a
    single process. The state does not depend on the process, so one saved state serves any number of processes.

    Args:
        inputs: All inputs; not copied.
        targets: All targets, on the device of ``inputs``; not copied.
        batch_size: Samples per optimizer step over all processes together.
        generator: Source of the permutations. Sharing it with other consumers is allowed, but `load_state_dict` then
            sets it back for them as well.
        drop_last: Whether the samples that do not fill a batch at the end of an epoch are left out of that epoch.
        process: Index of this process.
        processes: Number of processes.

    Shape:
        - inputs: ``(N, *)``; targets: ``(N, *)``.
        - a batch: ``(batch_size / processes, *)`` each; the last of an epoch is shorter when ``drop_last`` is False.

    Raises:
        ValueError: If lengths or devices differ, if there is no whole batch, or if a batch does not divide by
            ``processes``.

    Example:
        >>> batches = Batches(torch.arange(10.0), torch.arange(10), 4, torch.Generator().manual_seed(0))
        >>> batches.steps_per_epoch
        2
        >>> state = batches.state_dict()
        >>> inputs, targets = batches.next_batch()
        >>> inputs.shape
        torch.Size([4])
        >>> batches.load_state_dict(state)
        >>> torch.equal(batches.next_batch()[0], inputs)
        True
    """

    def __init__(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        batch_size: int,
        generator: torch.Generator,
        *,
        drop_last: bool = True,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        if len(inputs) != len(targets) or inputs.device != targets.device:
            got = f"{len(inputs)} on {inputs.device} and {len(targets)} on {targets.device}"
            raise ValueError(f"Batches: inputs and targets must have one length and device, got {got}.")
        _check_sizes(len(inputs), batch_size, drop_last=drop_last, process=process, processes=processes)
        self.inputs = inputs
        self.targets = targets
        self.batch_size = batch_size
        self.generator = generator
        self.drop_last = drop_last
        self.process = process
        self.processes = processes
        self.epoch = 0
        self._position = 0  # batches of this epoch already handed out
        self._permutation = self._shuffle()  # (N,)

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch, the same for every process."""
        whole, rest = divmod(len(self.inputs), self.batch_size)
        return whole if self.drop_last or rest == 0 else whole + 1

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets of the next batch, beginning a new epoch where the last one ended.

        Shape:
            ``(batch_size / processes, *)`` each.
        """
        if self._position == self.steps_per_epoch:
            self.epoch += 1
            self._position = 0
            self._permutation = self._shuffle()
        start = self._position * self.batch_size
        rows = self._permutation[start : start + self.batch_size]  # (batch_size,), shorter at the end of an epoch
        share = len(rows) // self.processes
        rows = rows[self.process * share : (self.process + 1) * share]  # (batch_size / processes,)
        self._position += 1
        return self.inputs[rows], self.targets[rows]

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.next_batch()

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the place in the data: two CPU tensors and plain numbers, for ``torch.save``."""
        return {
            "generator": self.generator.get_state(),
            "permutation": self._permutation.cpu().clone(),
            "epoch": self.epoch,
            "position": self._position,
            "batch_size": self.batch_size,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, bit for bit; the number of processes may differ.

        Raises:
            ValueError: If the state has other keys, or was taken with another number of samples or batch size. Nothing
                has changed then.
        """
        expected = {"generator", "permutation", "epoch", "position", "batch_size"}
        if set(state) != expected:
            raise ValueError(f"Batches: state must have the keys {sorted(expected)}, got {sorted(state)}.")
        got = (len(state["permutation"]), state["batch_size"])
        if got != (len(self.inputs), self.batch_size):
            raise ValueError(
                f"Batches: the state was taken with {got[0]} samples and batch size {got[1]}, but this run has "
                f"{len(self.inputs)} and {self.batch_size}. Resume with the same data and batch size."
            )
        if not 0 <= state["position"] <= self.steps_per_epoch:
            allowed = f"between 0 and {self.steps_per_epoch}"
            raise ValueError(f"Batches: position must be {allowed}, got {state['position']}. Set drop_last as it was.")
        self.generator.set_state(state["generator"].cpu())
        self._permutation = state["permutation"].to(self.inputs.device, copy=True)
        self.epoch = state["epoch"]
        self._position = state["position"]

    def _shuffle(self) -> torch.Tensor:
        rows = torch.randperm(len(self.inputs), generator=self.generator, device=self.generator.device)
        return rows.to(self.inputs.device)


def _check_sizes(samples: int, batch_size: int, *, drop_last: bool, process: int, processes: int) -> None:
    if processes < 1 or not 0 <= process < processes:
        raise ValueError(f"Batches: process must be between 0 and processes - 1, got {process} of {processes}.")
    if batch_size < 1 or batch_size % processes:
        raise ValueError(
            f"Batches: batch_size is the global batch and must be a positive multiple of processes = {processes}, "
            f"got {batch_size}."
        )
    if samples < (batch_size if drop_last else 1):
        raise ValueError(
            f"Batches: batch_size must be at most the number of samples = {samples}, got {batch_size}. "
            "Use a smaller batch_size, or drop_last=False if there are samples at all."
        )
    if not drop_last and samples % batch_size % processes:
        raise ValueError(
            f"Batches: the last batch of {samples % batch_size} samples does not divide by processes = {processes}. "
            "Use drop_last=True."
        )
