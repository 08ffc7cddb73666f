"""What every switch obeys, whatever its test: run on all that discovery finds."""

import dataclasses
import io
from typing import Any

import pytest
import torch
from torch import Tensor

from dynarank._discovery import discover
from dynarank.switches.base import AbstractSwitch, State

SWITCHES = discover("dynarank.switches", AbstractSwitch)
SHAPES = {"fc": (7, 5), "fc.basis": (5, 7), "row": (1, 4), "square": (6, 6), "": (3, 8)}  # names may look like keys
LOOKS = 40


def build(name: str) -> AbstractSwitch:
    """Build a switch from its defaults; what has none is a number of steps, and 2 is in range."""
    fields = dataclasses.fields(SWITCHES[name])  # type: ignore[arg-type]
    return SWITCHES[name](**{f.name: 2 for f in fields if f.default is dataclasses.MISSING})


def settling(look: int, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights that start at random and come to rest, each at its own pace."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for pace, (name, shape) in enumerate(SHAPES.items()):
        start, end = torch.randn((2, *shape), generator=generator, dtype=torch.float64)
        found[name] = (end + start * 0.6 ** (look / (1 + 0.2 * pace))).to(dtype)
    return found


@pytest.fixture(params=sorted(SWITCHES))
def switch(request: pytest.FixtureRequest) -> AbstractSwitch:
    return build(request.param)


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one
    )


def saved(state: State) -> State:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def run(switch: AbstractSwitch, looks: range, state: State, **options: Any) -> tuple[list[frozenset[str]], State]:
    """Return what is ready at every look, and the state after the last."""
    found = []
    for look in looks:
        ready, state = switch.look(2 * look, settling(look, **options), state)
        found.append(ready)
    return found, state


def test_it_is_a_frozen_dataclass_and_starts_with_no_layer(switch):
    assert dataclasses.is_dataclass(switch)
    with pytest.raises(dataclasses.FrozenInstanceError):
        switch.delay = 3  # type: ignore[attr-defined]
    assert switch.look(2, {}, switch.init()) == (frozenset(), switch.init())


def test_weights_that_come_to_rest_are_ready_in_the_end(switch):
    found, _ = run(switch, range(LOOKS), switch.init())
    assert found[-1] == frozenset(SHAPES)


def test_it_looks_in_every_run_and_again_after_every_look(switch):
    looks = [step for step in range(100) if switch.looks(step)]
    assert looks and looks == [step for step in range(100) if switch.looks(step)]
    assert len(looks) > 30


def test_a_look_is_a_pure_function(switch):
    _, state = run(switch, range(5), switch.init())
    before = torch.get_rng_state()
    for look in range(5, LOOKS):
        weights = settling(look)
        given = {key: value.clone() for key, value in state.items()}
        ready, after = switch.look(2 * look, weights, state)
        again, other = switch.look(2 * look, weights, state)
        assert ready == again and same(after, other)
        assert same(state, given) and same(weights, settling(look)), "an argument was changed"
        state = after
    assert torch.equal(before, torch.get_rng_state()), "the global generator was used"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_state_survives_saving_bit_for_bit(switch, dtype):
    whole, end = run(switch, range(LOOKS), switch.init(), dtype=dtype)
    for stop in (1, 8, 20):
        first, state = run(switch, range(stop), switch.init(), dtype=dtype)
        assert isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values())
        rest, resumed = run(switch, range(stop, LOOKS), saved(state), dtype=dtype)
        assert first + rest == whole and same(resumed, end)


def test_the_state_does_not_grow_with_the_run(switch):
    _, state = run(switch, range(LOOKS), switch.init())
    _, later = run(switch, range(LOOKS, 2 * LOOKS), state)
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in later.items()}


def test_the_state_shares_no_memory_with_the_weights(switch):
    """Weights change in place between looks, and what is remembered must not change with them."""
    weights, states = settling(0), [switch.init(), switch.init()]
    answers = []
    for look in range(LOOKS):
        for name, W in settling(look).items():
            weights[name].copy_(W)
        results = [switch.look(2 * look, given, s) for given, s in zip((weights, settling(look)), states, strict=True)]
        answers.append([ready for ready, _ in results])
        states = [state for _, state in results]
    assert all(one == other for one, other in answers) and same(*states)


def test_only_layers_that_were_shown_are_ready_whichever_disappear(switch):
    state = switch.init()
    names = list(SHAPES)
    for look in range(LOOKS):
        shown = {name: W for name, W in settling(look).items() if name in names}
        ready, state = switch.look(2 * look, shown, state)
        assert isinstance(ready, frozenset) and ready <= shown.keys()
        owners = {key.rpartition(".")[0] for key in state}
        assert owners <= shown.keys(), "layers that have gone are forgotten"
        if look % 7 == 6 and len(names) > 1:
            names.pop(0)
    assert len(names) == 1


def test_a_zero_weight_is_no_mistake(switch):
    state = switch.init()
    for look in range(LOOKS):
        _, state = switch.look(2 * look, {"fc": torch.zeros(4, 3)}, state)
    assert all(bool(torch.isfinite(value).all()) for value in state.values())
