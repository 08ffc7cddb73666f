"""Small messages between the processes, in a group of their own beside the gradients."""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(minutes=30)  # where the user's group does not tell its own

OWN = "Processes that train models of their own build each optimizer inside dynarank.distributed.independent()."

_independent: ContextVar[bool] = ContextVar("independent", default=False)
_message_groups: "weakref.WeakKeyDictionary[Any, Any]" = weakref.WeakKeyDictionary()


def initialised() -> bool:
    """Whether ``torch.distributed`` is in use."""
    return dist.is_available() and dist.is_initialized()


def world(group: Any = None) -> int:
    """Return the number of processes; 1 where ``torch.distributed`` is not in use.

    Example:
        >>> world(), is_main_process()
        (1, True)
    """
    return dist.get_world_size(group) if initialised() else 1


def is_main_process(group: Any = None) -> bool:
    """Whether this is process 0, which plans ranks and should be the one to write files."""
    return world(group) == 1 or dist.get_rank(group) == 0


@contextmanager
def independent() -> Iterator[None]:
    """Build optimizers in here where every process trains a model of its own: they will not talk to each other.

    Example:
        >>> from dynarank.distributed import broadcast_factors
        >>> with independent():
        ...     broadcast_factors(torch.nn.Linear(2, 2))  # nothing
    """
    token = _independent.set(True)
    try:
        yield
    finally:
        _independent.reset(token)


class Channel:
    """What the processes of one group tell each other.

    Messages do not share the group of the gradients: where a process fails to answer, the others get an error after
    the timeout of their group instead of a message mixed up with a gradient.

    Args:
        data: The group that averages the gradients; large tensors on a GPU go through it.
    """

    def __init__(self, data: Any) -> None:
        self._data = data
        self._messages = _message_group(data)
        self._source = dist.get_process_group_ranks(data)[0]
        self.processes = world(data)
        self.is_main = is_main_process(data)

    def gather(self, where: str, values: Sequence[float], *, dtype: torch.dtype = torch.int64) -> Tensor:
        """Return the values of every process, ``(processes, len(values))``; ``where`` begins the message of an error.

        Raises:
            RuntimeError: Some process does not answer.
        """
        mine = torch.tensor(values, dtype=dtype)
        rows = [torch.empty_like(mine) for _ in range(self.processes)]
        with _answered(where):
            dist.all_gather(rows, mine, group=self._messages)
        return torch.stack(rows)

    def gather_objects(self, where: str, value: object) -> list[Any]:
        """Return the value of every process. Slower than ``gather``: for reports and refusals."""
        values: list[Any] = [None] * self.processes
        with _answered(where):
            dist.all_gather_object(values, value, group=self._messages)
        return values

    @torch.no_grad()
    def copy_from_main(self, where: str, tensors: Iterable[Tensor]) -> None:
        """Overwrite the tensors of all other processes with those of process 0, of the same shapes."""
        for tensor in tensors:
            buffer = tensor.detach().clone(memory_format=torch.contiguous_format)
            group = self._messages if buffer.device.type == "cpu" else self._data
            with _answered(where):
                dist.broadcast(buffer, self._source, group=group)
            if not self.is_main:
                tensor.detach().copy_(buffer)  # not broadcast in place: this is seen by the version counter


def open_channel(group: Any = None) -> Channel | None:
    """Return the channel of a group, by default of all processes; None where there is nobody to talk to."""
    if not initialised() or _independent.get() or world(group) == 1:
        return None
    return Channel(dist.group.WORLD if group is None else group)


def _message_group(data: Any) -> Any:
    if data not in _message_groups:
        _message_groups[data] = dist.new_group(
            dist.get_process_group_ranks(data), timeout=_timeout(data), backend="gloo", use_local_synchronization=True
        )
    return _message_groups[data]


def _timeout(group: Any) -> timedelta:
    """Return the timeout that the user gave to a group; torch has no public way to ask for it."""
    try:
        return min(group._get_backend(device).options._timeout for device in group._device_types)
    except (AttributeError, RuntimeError, ValueError):
        return TIMEOUT


@contextmanager
def _answered(where: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{where}: no answer from the other processes. One of them has stopped or is not at the same step: every "
            "process must build the optimizer, take or skip each step, and freeze ranks when all others do."
        ) from error
