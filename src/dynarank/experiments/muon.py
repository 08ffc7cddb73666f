"""Muon for whole dense networks: the strongest plain training that a low-rank network has to face here."""

from collections.abc import Iterable
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
