"""Muon for whole networks: the strongest plain training that a low-rank network has to face here."""

from collections.abc import Iterable, Mapping
from typing import Any, final

import torch
from torch import Tensor

from dynarank import linalg


@final
class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum for matrices and convolutions, at the scale of ``tangent_muon``.

    ``torch.optim.Muon`` takes matrices only; here a convolution is its matrix of outputs by everything else.

    Args:
        params: Weights of two or more dimensions.
        lr: Step size, per unit of spectral norm and with the factor ``sqrt(out / in)``.
        momentum: Weight of the past.
        weight_decay: Decoupled decay.

    Reference:
        Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024,
        https://kellerjordan.github.io/posts/muon.
    """

    def __init__(
        self, params: Iterable[Tensor], *, lr: float, momentum: float = 0.9, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """Step along the polar factor of Nesterov's momentum."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, group)

    def _move(self, p: Tensor, group: dict[str, Any]) -> None:
        momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
        momentum.mul_(group["momentum"]).add_(p.grad)  # type: ignore[arg-type]
        ahead = (p.grad + group["momentum"] * momentum).flatten(1)  # type: ignore[operator]
        scale = (ahead.shape[0] / ahead.shape[1]) ** 0.5
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_((group["lr"] * scale * linalg.newton_schulz(ahead)).reshape(p.shape))


@final
class MuonAdamW(torch.optim.Optimizer):
    """Muon for some matrices and AdamW for everything else, as one optimizer.

    What takes the place of a matrix in its group, such as a core between frozen bases, is moved by Muon too; groups
    that are added later by AdamW.

    Args:
        params: All parameters.
        matrices: Those of them that Muon moves.
        muon: Options of `Muon`.
        adamw: Options of ``torch.optim.AdamW``.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        matrices: Iterable[Tensor],
        muon: Mapping[str, Any],
        adamw: Mapping[str, Any],
    ) -> None:
        params, chosen = list(params), {id(p) for p in matrices}
        split = [p for p in params if id(p) in chosen], [p for p in params if id(p) not in chosen]
        kinds = ((Muon, muon), (torch.optim.AdamW, adamw))
        parts = [kind(part, **options) for part, (kind, options) in zip(split, kinds, strict=True) if part]
        defaults = {name: value for part in parts for name, value in part.defaults.items()}
        super().__init__([{**part.param_groups[0], "kind": type(part).__name__} for part in parts], defaults)
        self._parts = {type(part).__name__: part for part in parts}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """Let each take its step with its own groups."""
        for name, part in self._parts.items():
            part.param_groups = [group for group in self.param_groups if group.get("kind", "AdamW") == name]
            part.state = self.state
            part.step()
