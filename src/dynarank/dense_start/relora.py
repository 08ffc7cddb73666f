"""ReLoRA: a dense weight trained by one low-rank update after another, each merged before the next begins."""

import zlib
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynarank import cost, linalg
from dynarank.dense_start._host import check_host, exchange, first_state, holder, leave
from dynarank.factorize.sites import Selector, Site, carry_attributes, choose_sites, put_in_place, refuse_wrapped
from dynarank.layers._weight import ReadOnlyWeight
from dynarank.layers.base import AbstractLowRankLayer
from dynarank.optim.low_rank_optimizer import LowRankOptimizer


@final
class UpdatedLayer(nn.Module):
    """A frozen dense layer and a low-rank one beside it: ``y = (W + A^T B) x + b``, never multiplied out in training.

    Args:
        dense: The dense layer, with the bias.
        update: The low-rank layer, without one.
    """

    def __init__(self, dense: nn.Module, update: AbstractLowRankLayer) -> None:
        super().__init__()
        self.dense, self.update = dense, update

    def forward(self, x: Tensor) -> Tensor:
        """Return what the dense layer with the sum of both weights would."""
        return self.dense(x) + self.update(x)

    @property
    def weight(self) -> Tensor:
        """``W + A^T B`` in the shape of the dense weight: differentiable, built at each access, read-only."""
        dense: Any = self.dense
        return (dense.weight + self.update.weight).as_subclass(ReadOnlyWeight)

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias of the dense layer."""
        return self.dense.bias  # type: ignore[return-value]

    @torch.no_grad()
    def restart(self, generator: torch.Generator) -> None:
        """Begin an update: ``A`` is zero, so that nothing jumps, and ``B`` is drawn as ``nn.Linear`` draws a weight.

        With both zero neither would have a gradient.
        """
        A, B = self._factors()
        bound = B.shape[1] ** -0.5
        A.zero_()
        B.copy_(bound * (2 * torch.rand(B.shape, generator=generator, dtype=torch.float64) - 1))

    @torch.no_grad()
    def absorb(self) -> None:
        """Add the update to the dense weight, in at least float32; the update itself is left as it is."""
        W: Any = self.dense.weight
        A, B = (linalg.widen(part) for part in self._factors())
        W.copy_(linalg.widen(W) + self.update.as_weight(A.mT @ B))

    def _factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        assert self.update.A is not None and self.update.B is not None
        return self.update.A, self.update.B


@final
class ReLoRA:
    """Trains weights by low-rank updates that are merged and begun anew: one line before the training loop.

    Each chosen weight is frozen, and two factors take its place in the optimizer. Every ``every`` optimizer steps their
    product is added to the weight and they start afresh, with fresh optimizer state, so that the sum of all updates
    is not of low rank. All else trains as ever, biases among it. Gradients and optimizer state are as small as the
    factors, and the weight stays: a way to train a large network in little memory, not to make it smaller.

    Published training starts with full rank: train the dense model for a while, then build this. It acts within
    ``optimizer.step()``. A learning rate about twice that of full rank is published; weight decay acts on the
    factors and not on the weight, and there is no factor ``alpha / rank`` on the update.

    Args:
        model: A dense model, changed in place; wrap it for distributed training afterwards.
        optimizer: Any torch optimizer of one gradient a step that holds the weights.
        rank: Rank of the updates. Layers whose factors would not be smaller than the weight stay as they are.
        every: Optimizer steps of a cycle.
        warmup: Optimizer steps at the begin of every cycle over which the learning rates of all parameters rise
            linearly to what they are; schedulers see none of it.
        target_modules: Layers to train so, as in `factorize_`.
        exclude_modules: Layers that stay as they are, as in `factorize_`.
        include_head: Whether the classifier head may.

    Raises:
        TypeError: The optimizer is a `LowRankOptimizer`.
        ValueError: No layer can be trained so, the optimizer does not hold one, or an option is out of range.
        RuntimeError: The model is wrapped for distributed training.

    Reference:
        Lialin, Shivagunde, Muckatira, Rumshisky, "ReLoRA: high-rank training through low-rank updates", ICLR 2024,
        https://arxiv.org/abs/2307.05695. There 99.9 % of the optimizer's state are set to zero and its step count
        stays; here the state is that of a new parameter. In the published code both factors are zero in the first
        cycle, which then trains nothing; here the first is like all others.

    Example:
        >>> model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> relora = ReLoRA(model, optimizer, rank=4, every=2)
        >>> for _ in range(5):
        ...     model(torch.ones(8, 40)).square().mean().backward()
        ...     optimizer.step()
        >>> relora.cycle, [name for name, _ in model.named_parameters()]
        (2, ['0.dense.weight', '0.dense.bias', '0.update.A', '0.update.B', '2.weight', '2.bias'])
        >>> relora.merge()
        >>> model[0]
        Linear(in_features=40, out_features=30, bias=True)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        rank: int,
        every: int,
        warmup: int = 0,
        target_modules: Selector = None,
        exclude_modules: Selector = None,
        include_head: bool = False,
    ) -> None:
        if rank < 1 or every < 1:
            raise ValueError(f"ReLoRA: rank and every must be at least 1, got {rank} and {every}.")
        if not 0 <= warmup <= every:
            raise ValueError(f"ReLoRA: warmup must be between 0 and every = {every}, got {warmup}.")
        check_host(optimizer)
        if isinstance(optimizer, LowRankOptimizer):
            raise TypeError("ReLoRA: LowRankOptimizer moves low-rank weights itself. Give a plain torch optimizer.")
        refuse_wrapped(model, "ReLoRA")
        self.model, self.optimizer = model, optimizer
        self.rank, self.every, self.warmup = rank, every, warmup
        self.steps = 0
        sites = choose_sites(
            model, target_modules=target_modules, exclude_modules=exclude_modules, include_head=include_head
        )
        chosen = [each.site for each in sites if not each.reason and each.site.is_candidate]
        self._dense = {site.name: site.module for site in chosen if site.module.weight.requires_grad}
        updates = {site.name: _update_of(site, rank) for site in chosen if site.name in self._dense}
        self.layers = {
            name: _updated(self._dense[name], update) for name, update in updates.items() if update is not None
        }
        self._check()
        put_in_place(model, {self._dense[name]: layer for name, layer in self.layers.items()}, verb="ReLoRA")
        for name, layer in self.layers.items():
            weight: Any = layer.dense.weight
            exchange(optimizer, weight, self._factors(name), [{}, {}])
            weight.requires_grad_(False)
            weight.grad = None
            self._begin(name)
        self._lrs: list[tuple[dict[str, Any], Any]] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    @property
    def cycle(self) -> int:
        """Number of updates that have been merged."""
        return self.steps // self.every

    # --- within the step -----------------------------------------------------------------------------------------

    def _before_step(self, *_: Any) -> None:
        self._restore()  # the last step may have failed on the way
        position = self.steps % self.every
        if position >= self.warmup:
            return
        for group in self.optimizer.param_groups:
            self._lrs.append((group, group["lr"]))
            group["lr"] = group["lr"] * (position + 1) / self.warmup

    def _after_step(self, *_: Any) -> None:
        self._restore()
        self.steps += 1
        if self.steps % self.every == 0:
            for name, layer in self.layers.items():
                layer.absorb()
                self._begin(name)

    def _restore(self) -> None:
        for group, lr in self._lrs:
            group["lr"] = lr
        self._lrs = []

    def _begin(self, name: str) -> None:
        """Begin an update, with fresh optimizer state; the draw depends on nothing but the name and the step."""
        self.layers[name].restart(torch.Generator().manual_seed(zlib.crc32(f"{name}@{self.steps}".encode())))
        for factor in self._factors(name).values():
            group = holder(self.optimizer, factor)
            assert group is not None
            self.optimizer.state.pop(factor, None)
            if state := first_state(self.optimizer, group, factor):
                self.optimizer.state[factor] = state

    def _factors(self, name: str) -> dict[str, nn.Parameter]:
        return {f"{name}.update.{key}": factor for key, factor in self.layers[name].update.named_parameters()}

    # --- the end, and interruption -------------------------------------------------------------------------------

    def merge(self) -> None:
        """Give the plain dense model back, in place: the same layers as before, trained from now on by the optimizer.

        The updates are added to the weights, which take the place of the factors in the optimizer, with fresh state.
        """
        for name, layer in self.layers.items():
            layer.absorb()
            dense, weight = self._dense[name], layer.dense.weight
            dense.weight, dense.bias = weight, layer.bias
            dense.train(layer.training)
            first, *others = self._factors(name).values()
            exchange(self.optimizer, first, {f"{name}.weight": weight.requires_grad_(True)}, [{}])  # type: ignore[operator, dict-item]
            for factor in others:
                leave(self.optimizer, factor)
        put_in_place(self.model, {layer: self._dense[name] for name, layer in self.layers.items()}, verb="merge")
        self.layers = {}
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return what is not in the state of the model and of the optimizer: the step and the names of the layers."""
        return {"steps": self.steps, "layers": list(self.layers)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state; those of the model and of the optimizer are loaded by their own methods.

        Raises:
            ValueError: The state is of other layers.
        """
        other = sorted({*state_dict["layers"]} ^ {*self.layers})
        if other:
            raise ValueError(
                f"the saved state does not fit: {', '.join(other)} are in one only. Build ReLoRA with the same options."
            )
        self.steps = state_dict["steps"]

    def _check(self) -> None:
        if not self.layers:
            raise ValueError(
                f"ReLoRA: no layer can be trained by updates of rank {self.rank}. Chosen were "
                f"{', '.join(self._dense) or 'none with a trainable weight'}; their factors would not be smaller than "
                "the weights. Lower rank, or choose others with target_modules and include_head."
            )
        loose = [name for name in self.layers if holder(self.optimizer, self._dense[name].weight) is None]
        if loose:
            raise ValueError(
                f"ReLoRA: the optimizer ({type(self.optimizer).__name__}) does not hold the weights of "
                f"{', '.join(loose)}. Give it all parameters of the model, or exclude these layers with "
                "exclude_modules."
            )


def _update_of(site: Site, rank: int) -> AbstractLowRankLayer | None:
    """Return a low-rank layer for the updates of a dense one, on the meta device; None if it would not be smaller."""
    twin: Any = site.twin
    bare = _empty_like(site.module, twin, bias=False)
    shape = twin.smallest_of(bare).matrix_shape
    return twin.from_dense(bare, rank=rank) if rank <= cost.break_even_rank(*shape) else None


def _updated(dense: Any, update: AbstractLowRankLayer) -> UpdatedLayer:
    """Return a dense layer with its update, not drawn yet; what belongs to the layer is shared."""
    twin = _empty_like(dense, type(update), bias=dense.bias is not None)
    twin.weight, twin.bias = dense.weight, dense.bias
    layer = UpdatedLayer(twin, update.to_empty(device=dense.weight.device))
    carry_attributes(dense, layer, fresh=nn.Module())  # in_features, kernel_size and whatever users have set
    return layer.train(dense.training)


def _empty_like(dense: Any, twin: Any, *, bias: bool) -> Any:
    return twin.dense_type(**twin.dense_options(dense), bias=bias, device="meta", dtype=dense.weight.dtype)
