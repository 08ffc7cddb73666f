import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynarank.report.formats import by_name, power, short
from dynarank.report.markup import Markup, element, join
from dynarank.report.points import smooth, spaced, thin

POINTS = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300).map(lambda values: list(enumerate(values)))


@given(POINTS, st.integers(2, 50))
def test_thinning_keeps_order_and_extremes(points, limit):
    kept = thin(points, limit=limit)
    assert len(kept) <= max(limit, 2)
    assert set(kept) <= set(points)
    assert [step for step, _ in kept] == sorted(step for step, _ in kept)
    for extreme in (min, max):
        assert extreme(value for _, value in kept) == extreme(value for _, value in points)


@given(POINTS)
def test_means_lie_between_the_extremes(points):
    values = [value for _, value in points]
    for step, mean in smooth(points):
        assert min(values) - 1e-6 <= mean <= max(values) + 1e-6
        assert 0 <= step < len(points)


@given(st.integers(1, 200), st.integers(2, 50))
def test_spacing_keeps_first_and_last(length, limit):
    kept = spaced(range(length), limit=limit)
    assert kept[0] == 0 and kept[-1] == length - 1
    assert len(kept) == len(set(kept)) == min(length, limit)


@given(st.text(), st.text())
def test_only_markup_is_left_as_it_is(text, attribute):
    made = element("p", text, element("b", text), title=attribute)
    assert made.count("<") == 4 and made.count(">") == 4
    assert join([Markup("<b>"), "<b>", None]) == "<b>&lt;b&gt;"


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_any_number_has_a_short_form(value):
    assert len(short(value)) <= 12
    assert len(by_name("loss", value)) <= 22
    assert math.isfinite(value) or short(value) == "not finite"


@pytest.mark.parametrize("exponent", range(-12, 13))
def test_powers_of_ten_are_labelled_exactly(exponent):
    label = power(10.0**exponent)
    plain = (
        label.replace("10", "1e").translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")) if "10⁻" in label else label
    )
    assert float(plain) == pytest.approx(10.0**exponent) if exponent < 4 else label.startswith("10")
