"""Sharing out a budget, against every combination of small menus."""

from itertools import product

import pytest
import torch

from dynarank.compress._allocation import Menu, allocate


def random_menus(seed: int, *, layers: int = 4, options: int = 5, convex: bool = False) -> list[Menu]:
    """Menus with the layer as it is at the end: no error, the highest cost."""
    generator = torch.Generator().manual_seed(seed)
    menus = []
    for _ in range(layers):
        costs = torch.rand(options, generator=generator, dtype=torch.float64).cumsum(0) * 10
        falls = torch.rand(options - 1, generator=generator, dtype=torch.float64)
        if convex:  # error against cost bends one way: every further unit of cost is worth less
            slopes = falls.sort(descending=True).values
            falls = slopes * costs.diff()
        errors = torch.cat([falls.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
        menus.append(Menu(errors, costs))
    return menus


def cost_of(menus: list[Menu], chosen: list[int]) -> float:
    return sum(float(menu.costs[i]) for menu, i in zip(menus, chosen, strict=True))


def error_of(menus: list[Menu], chosen: list[int]) -> float:
    return sum(float(menu.errors[i]) for menu, i in zip(menus, chosen, strict=True))


def best_error(menus: list[Menu], room: float) -> float:
    """The smallest error of all combinations that fit."""
    every = product(*(range(len(menu.costs)) for menu in menus))
    return min(error_of(menus, list(one)) for one in every if cost_of(menus, list(one)) <= room)


def hull_error(menus: list[Menu], room: float) -> float:
    """The error at the price at which what fits is best: the largest of all lower bounds of Lagrange, and reachable.

    At the price of every pair of options of every menu, the best choice of each layer; the best that fits.
    """
    prices = {0.0}
    for menu in menus:
        for i, j in product(range(len(menu.costs)), repeat=2):
            if menu.costs[j] > menu.costs[i]:
                prices.add(float((menu.errors[i] - menu.errors[j]) / (menu.costs[j] - menu.costs[i])))
    found = []
    for price in prices:
        for nudge in (1 - 1e-9, 1 + 1e-9):
            chosen = [int((menu.errors + nudge * price * menu.costs).argmin()) for menu in menus]
            if cost_of(menus, chosen) <= room:
                found.append(error_of(menus, chosen))
    return min(found)


def greedy_error(menus: list[Menu], room: float) -> float:
    """Start at the cheapest and buy the option that lowers the error most for its cost, as long as one fits."""
    chosen = [int(menu.costs.argmin()) for menu in menus]
    while True:
        buys = []
        for layer, menu in enumerate(menus):
            for option in range(len(menu.costs)):
                extra = float(menu.costs[option] - menu.costs[chosen[layer]])
                gain = float(menu.errors[chosen[layer]] - menu.errors[option])
                if gain > 0 and extra <= room - cost_of(menus, chosen):
                    buys.append((gain / max(extra, 1e-12), layer, option))
        if not buys:
            return error_of(menus, chosen)
        _, layer, option = max(buys)
        chosen[layer] = option


def rooms(menus: list[Menu]) -> list[float]:
    """Budgets from the least possible to everything."""
    least = sum(float(menu.costs.min()) for menu in menus)
    most = sum(float(menu.costs.max()) for menu in menus)
    return [least + share * (most - least) for share in (1e-9, 0.1, 0.25, 0.5, 0.75, 0.9, 0.999)]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("convex", [True, False])
def test_it_fits_and_is_no_worse_than_the_best_at_one_price(seed: int, convex: bool):
    menus = random_menus(seed, convex=convex)
    for room in rooms(menus):
        chosen = allocate(menus, room)
        assert cost_of(menus, chosen) <= room
        assert best_error(menus, room) - 1e-12 <= error_of(menus, chosen) <= hull_error(menus, room) + 1e-9


@pytest.mark.parametrize("seed", range(12))
def test_it_is_no_worse_than_buying_what_gains_most(seed: int):
    menus = random_menus(seed)
    found = [(error_of(menus, allocate(menus, room)), greedy_error(menus, room)) for room in rooms(menus)]
    assert all(error <= greedy + 1e-9 for error, greedy in found)


@pytest.mark.parametrize("seed", range(4))
def test_nothing_that_still_fits_would_lower_the_error(seed: int):
    menus = random_menus(seed)
    for room in rooms(menus):
        chosen = allocate(menus, room)
        for layer, menu in enumerate(menus):
            for option in range(len(menu.costs)):
                other = [*chosen[:layer], option, *chosen[layer + 1 :]]
                better = error_of(menus, other) < error_of(menus, chosen)
                assert not (better and cost_of(menus, other) <= room)


@pytest.mark.parametrize("scale", [1e-6, 1e9])
@pytest.mark.parametrize("size", [1e-12, 1e6])
def test_units_do_not_matter(scale: float, size: float):
    menus = random_menus(5)
    scaled = [Menu(menu.errors * size, menu.costs * scale) for menu in menus]
    for room in rooms(menus):
        assert allocate(scaled, room * scale) == allocate(menus, room)


def test_equal_layers_are_treated_alike_as_far_as_the_room_goes():
    menu = Menu(torch.tensor([0.9, 0.3, 0.0]), torch.tensor([1.0, 2.0, 8.0]))
    assert allocate([menu] * 4, 8.0) == [1, 1, 1, 1]
    assert sorted(allocate([menu] * 4, 7.0)) == [0, 1, 1, 1]
    assert allocate([menu] * 4, 7.0) == allocate([menu] * 4, 7.0)


def test_where_errors_are_equal_the_cheaper_option_is_taken_when_something_must_go():
    dead = Menu(torch.zeros(3), torch.tensor([1.0, 2.0, 8.0]))
    alive = Menu(torch.tensor([0.9, 0.3, 0.0]), torch.tensor([1.0, 2.0, 8.0]))
    assert allocate([alive, dead], 9.0) == [2, 0]
    assert allocate([dead, dead], 2.0) == [0, 0]


def test_what_fits_as_it_is_stays_as_it_is():
    dead = Menu(torch.zeros(2), torch.tensor([1.0, 8.0]))
    fixed = Menu(torch.zeros(1), torch.tensor([5.0]))
    assert allocate([dead, fixed], 13.0) == [1, 0]
    assert allocate([], 0.0) == []


def test_a_layer_without_options_takes_its_room():
    fixed = Menu(torch.zeros(1), torch.tensor([5.0]))
    menu = Menu(torch.tensor([0.9, 0.3, 0.0]), torch.tensor([1.0, 2.0, 8.0]))
    assert allocate([fixed, menu, fixed], 12.5) == [0, 1, 0]


def test_an_option_that_is_worse_and_dearer_is_never_taken():
    menu = Menu(torch.tensor([0.2, 0.9, 0.0]), torch.tensor([1.0, 4.0, 8.0]))
    assert [allocate([menu], room) for room in (1.0, 5.0, 7.9, 8.0)] == [[0], [0], [0], [2]]


def test_the_cheapest_of_all_is_reached_exactly():
    menus = random_menus(3)
    least = sum(float(menu.costs.min()) for menu in menus)
    assert allocate(menus, least) == [0, 0, 0, 0]


@pytest.mark.parametrize("room", [2.9, 0.0, -4.0])
def test_a_room_that_cannot_be_met_is_refused(room: float):
    menu = Menu(torch.tensor([0.9, 0.0]), torch.tensor([1.5, 3.0]))
    with pytest.raises(ValueError, match=f"the smallest options of all layers together take 3, .* room for {room:g}"):
        allocate([menu, menu], room)
