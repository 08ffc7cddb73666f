"""Laws of events at equal distances."""

import pytest

from dynarank._discovery import discover
from dynarank.schedules.base import AbstractSchedule
from dynarank.schedules.periodic import Periodic


@pytest.mark.parametrize("every", [1, 3, 25])
@pytest.mark.parametrize("start", [0, 4, 50])
def test_events_come_at_equal_distances_after_the_start(every: int, start: int):
    schedule = Periodic(every=every, start=start)
    events = [step for step in range(1, 200) if schedule.moment(step) == "event"]
    assert events == list(range(start + every, 200, every))
    assert all(schedule.moment(step) in ("none", "event") for step in range(200))


@pytest.mark.parametrize("every", [1, 3, 25, 1000])
@pytest.mark.parametrize("freeze", [1, 24, 25, 30])
def test_the_last_event_comes_once_and_nothing_after_it(every: int, freeze: int):
    moments = [Periodic(every=every, freeze=freeze).moment(step) for step in range(200)]
    assert [step for step, moment in enumerate(moments) if moment == "last"] == [freeze]
    assert set(moments[freeze + 1 :]) == {"none"}
    assert moments[:freeze] == [Periodic(every=every).moment(step) for step in range(freeze)]


def test_nothing_happens_before_the_first_step():
    for schedule in (Periodic(), Periodic(every=1), Periodic(every=1, freeze=1)):
        assert schedule.moment(0) == "none"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "Periodic: every must be at least 1 .* got 0"),
        ({"start": -1}, "Periodic: .* start at least 0, got 25 and -1"),
        ({"freeze": 0}, "Periodic: freeze must come after start = 0, got 0"),
        ({"start": 50, "freeze": 50}, "Periodic: freeze must come after start = 50, got 50"),
    ],
)
def test_a_schedule_without_events_is_refused(options: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        Periodic(**options)


@pytest.mark.parametrize("name", discover("dynarank.schedules", AbstractSchedule))
def test_every_schedule_is_a_pure_function_of_the_step(name: str):
    schedule = discover("dynarank.schedules", AbstractSchedule)[name]()
    moments = [schedule.moment(step) for step in range(300)]
    assert moments == [schedule.moment(step) for step in range(300)]
    assert set(moments) <= {"none", "event", "last"} and moments.count("last") <= 1
    assert set(moments) != {"none"}, "no rank event could ever happen"
