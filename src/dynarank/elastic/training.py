"""Training one network for many ranks at once, and switching between them at run time."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dynarank.compress.statistics import renew_statistics_, tracking_layers
from dynarank.elastic._active import (
    Ranks,
    activate,
    active_ranks,
    computing_with,
    elastic_layers,
    shielding_statistics,
    wanted_ranks,
)
from dynarank.elastic.widths import AbstractWidths, Fractions
from dynarank.measure import Forward, call

Distance = Callable[[Any, Any], Tensor]  # outputs of a smaller rank, outputs of the full one -> a loss


class Elastic:
    """Trains a low-rank network so that it works with the leading part of its directions as well as with all of them.

    Each step computes the loss with all directions and with a random part of them, and takes one gradient of the mean.
    So directions come to stand in the order of what they are worth. ``LowRankOptimizer`` keeps factors diagonalised,
    so that a part is the truncated SVD of the whole; with any other optimizer the order is found by training alone.

    It changes no parameter and owns none: the model is trained, saved and loaded as ever, and `set_rank_` cuts it to
    any rank afterwards.

    Args:
        model: A model with low-rank layers. Ranks may change on the way.
        widths: What is drawn in each step: a fraction for all layers, or one layer at a time.
        full: Whether each step also computes the loss with all directions. Without it a step takes one forward pass,
            and the widths should include everything once in a while.
        imitate: Loss that draws the outputs of a part to those of the whole, such as
            ``dynarank.compress.SoftTargets(1.0)``: it counts half, and the loss of the part the other half.

    Raises:
        ValueError: The model has no low-rank layer, or one in Tucker form; or a part has nothing to imitate.

    Example:
        >>> from dynarank.layers.linear import LowRankLinear
        >>> model = LowRankLinear(8, 6, rank=4)
        >>> elastic, generator = Elastic(model), torch.Generator().manual_seed(0)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> inputs, targets = torch.ones(5, 8), torch.zeros(5, 6)
        >>> loss = elastic.loss(lambda: model(inputs), lambda y: (y - targets).square().mean(), generator)
        >>> loss.backward()
        >>> optimizer.step()
        >>> with elastic.at(0.5):
        ...     model.active_rank
        2

    Reference:
        O. Rippel, M. Gelbart, R. Adams, "Learning ordered representations with nested dropout", ICML 2014,
        https://arxiv.org/abs/1402.0915; J. Yu, T. Huang, "Universally slimmable networks and improved training
        techniques", ICCV 2019, https://arxiv.org/abs/1903.05134, for the whole in every step and for imitation.
    """

    def __init__(
        self,
        model: nn.Module,
        widths: AbstractWidths = Fractions(),  # noqa: B008 - frozen
        *,
        full: bool = True,
        imitate: Distance | None = None,
    ) -> None:
        elastic_layers(model, owner="Elastic")
        if imitate is not None and not full:
            raise ValueError("Elastic: imitate needs the outputs of the full rank in every step. Use full=True.")
        self.model, self.widths, self.full, self.imitate = model, widths, full, imitate
        self._statistics: dict[frozenset[tuple[str, int]], list[dict[str, Tensor]]] = {}  # of batch normalisation

    def sample(self, generator: torch.Generator) -> list[Ranks]:
        """Return the ranks of one training step, each for `at`; the full ones first, as an empty mapping.

        Args:
            generator: Where chance comes from.
        """
        held = {name: layer.rank for name, layer in self._layers().items()}
        drawn = self.widths.draw(held, generator)
        whole = all(rank == held[name] for name, rank in drawn.items())
        if whole:
            return [{}]
        return [{}, drawn] if self.full else [drawn]

    def loss(
        self, forward: Callable[[], Any], criterion: Callable[[Any], Tensor], generator: torch.Generator
    ) -> Tensor:
        """Return the mean loss over the ranks of one step, for one backward.

        Args:
            forward: Computes the outputs of the model.
            criterion: Turns outputs into a loss.
            generator: Where chance comes from.
        """
        losses: list[Tensor] = []
        teacher: Any = None
        for ranks in self.sample(generator):
            with self.at(ranks):
                outputs = forward()
            loss = criterion(outputs)
            if losses and self.imitate is not None:
                loss = (loss + self.imitate(outputs, teacher)) / 2
            losses.append(loss)
            teacher = tree_map_only(Tensor, Tensor.detach, outputs)
        return torch.stack(losses).mean()

    @contextmanager
    def at(self, ranks: float | Ranks) -> Iterator[None]:
        """Let the model compute with its leading directions for the time of a block.

        A model in training mode keeps its running statistics of batch normalisation for the full rank. One in
        evaluation mode takes those that `switch_` knows. A checkpointed activation is computed anew in the backward
        pass, which then has to be in the block too.

        Args:
            ranks: A fraction for all layers, or a rank for each of some.

        Raises:
            ValueError: As `switch_`.
        """
        layers = self._layers()
        wanted = wanted_ranks(layers, ranks, owner="Elastic")
        if not self.model.training:
            before = active_ranks(layers)
            self.switch_(wanted)
            try:
                yield
            finally:
                self.switch_(before)
            return
        self._statistics.clear()  # the model is about to change
        whole = all(wanted[name] == layer.rank for name, layer in layers.items())
        with computing_with(layers, wanted), nullcontext() if whole else shielding_statistics(self.model):
            yield

    def switch_(
        self, ranks: float | Ranks, *, calibration: Iterable[Any] | None = None, forward: Forward = call
    ) -> None:
        """Let the model compute with its leading directions from now on; nothing is lost, 1.0 undoes it bit for bit.

        Args:
            ranks: A fraction for all layers, or a rank for each of some.
            calibration: Batches of training data, to estimate the statistics of batch normalisation at these ranks.
                Where the model has such layers, they are needed once for each choice of ranks, and again after
                training has gone on.
            forward: How a batch goes through the model.

        Raises:
            ValueError: The fraction or a rank is out of range, a name is unknown, or the model has batch
                normalisation, whose statistics at these ranks are not known. Nothing has changed.
        """
        layers, normalisation = self._layers(), tracking_layers(self.model)
        before, wanted = active_ranks(layers), wanted_ranks(layers, ranks, owner="Elastic")
        here, there = frozenset(before.items()), frozenset(wanted.items())
        if calibration is None and (here == there or not normalisation):
            activate(layers, wanted)
            return
        if calibration is None and there not in self._statistics:
            raise missing_statistics("Elastic", len(normalisation))
        self._statistics[here] = [{n: b.clone() for n, b in layer.named_buffers()} for layer in normalisation]
        activate(layers, wanted)
        try:
            if calibration is not None:
                renew_statistics_(self.model, calibration, forward=forward)
            else:
                _put_back(normalisation, self._statistics[there])
        except BaseException:
            activate(layers, before)
            raise

    def _layers(self) -> dict[str, Any]:
        return elastic_layers(self.model, owner="Elastic")


def missing_statistics(owner: str, count: int) -> ValueError:
    """Return the error for batch normalisation at ranks for which its statistics were never estimated."""
    return ValueError(
        f"{owner}: the model has batch normalisation ({count} layers), whose running means and variances belong to the "
        "ranks at which they were estimated. Pass calibration=batches of training data to estimate them anew."
    )


@torch.no_grad()
def _put_back(layers: list[Any], statistics: list[dict[str, Tensor]]) -> None:
    for layer, buffers in zip(layers, statistics, strict=True):
        for name, buffer in layer.named_buffers():
            buffer.copy_(buffers[name])
