"""Sharing out a budget: for each layer one of its options, so that the sum of the errors is as small as possible."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HALVINGS = 80


@dataclass(frozen=True)
class Menu:
    """What can become of one layer, the layer as it is among them.

    Args:
        errors: What each option does to the model's outputs; 0 for the layer as it is.
        costs: What each option takes of the budget.

    Shape:
        Both ``(k,)`` float64 with the layer as it is at the end.
    """

    errors: Tensor
    costs: Tensor


def allocate(menus: Sequence[Menu], room: float) -> list[int]:
    """Return the option of each layer with the smallest sum of errors whose costs fit into ``room``.

    Every layer takes the option that is best at one common price; the price is halved in until the budget is met.
    That is optimal among the options on the convex hull of error against cost. What is left is then spent on the
    upgrades that lower the error most for their cost. Where all layers fit as they are, they stay so.

    Raises:
        ValueError: Even the cheapest options do not fit.

    Example:
        >>> menu = Menu(torch.tensor([0.5, 0.1, 0.0]), torch.tensor([1.0, 4.0, 9.0]))
        >>> allocate([menu, menu], room=10.0)
        [1, 1]
    """
    whole = [len(menu.costs) - 1 for menu in menus]
    if _cost(menus, whole) <= room:
        return whole
    cheapest = [int(menu.costs.argmin()) for menu in menus]
    least = _cost(menus, cheapest)
    if least > room:
        raise ValueError(f"the smallest options of all layers together take {least:g}, but there is room for {room:g}.")
    low, high = 0.0, 1.0
    while _cost(menus, _at_price(menus, high)) > room:
        high *= 4
        if high > 1e30:  # options of equal error: price alone does not decide
            return _spend(menus, cheapest, room)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if _cost(menus, _at_price(menus, middle)) <= room else (middle, high)
    return _spend(menus, _at_price(menus, high), room)


def _at_price(menus: Sequence[Menu], price: float) -> list[int]:
    return [int((menu.errors + price * menu.costs).argmin()) for menu in menus]


def _cost(menus: Sequence[Menu], chosen: Sequence[int]) -> float:
    return sum(float(menu.costs[index]) for menu, index in zip(menus, chosen, strict=True))


def _spend(menus: Sequence[Menu], chosen: list[int], room: float) -> list[int]:
    """Take, as long as it fits, the upgrade of one layer that gains most per cost."""
    chosen, left = list(chosen), room - _cost(menus, chosen)
    while True:
        upgrades = [_upgrade(menu, now, left) for menu, now in zip(menus, chosen, strict=True)]
        layer = max(range(len(upgrades)), key=lambda i: upgrades[i][0], default=0)
        if not upgrades or upgrades[layer][0] <= 0:
            return chosen
        option = upgrades[layer][1]
        left -= float(menus[layer].costs[option] - menus[layer].costs[chosen[layer]])
        chosen[layer] = option


def _upgrade(menu: Menu, now: int, left: float) -> tuple[float, int]:
    """Return the largest gain per cost of any option that fits, and its index; 0 where there is none."""
    extra = menu.costs - menu.costs[now]
    gain = torch.where(extra <= left, menu.errors[now] - menu.errors, torch.zeros_like(menu.errors))
    worth = torch.where(gain > 0, gain / extra.clamp_min(1e-12), torch.zeros_like(gain))
    return float(worth.max()), int(worth.argmax())
