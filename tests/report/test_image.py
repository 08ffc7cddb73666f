import re
from itertools import pairwise

import matplotlib.image
import pytest

from dynarank.events import RankEvent
from dynarank.history import History
from dynarank.report import plot_ranks
from dynarank.report.css import STYLE
from dynarank.report.image import _apart
from dynarank.report.svg import MID_TONES


def record_ranks(layers: list[str]) -> History:
    history = History()
    for index, layer in enumerate(layers):
        history.record(RankEvent(25, layer, 8, 3 + index, 2, 0.01, "tail"))
        history.record(RankEvent(50, layer, 5 + index, 2 + index, 0, 0.01, "tail"))
    return history


def luminance(color: str) -> float:
    parts = [int(color[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def schemes() -> list[dict[str, str]]:
    """Return the colours of the light and of the dark page by variable."""
    blocks = re.findall(r":root \{(.*?)\}", STYLE, flags=re.DOTALL)
    return [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in blocks]


@pytest.mark.parametrize("count", [1, 4, 6, 7, 13])
@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_picture_is_written_for_any_number_of_layers(tmp_path, count, ending):
    path = tmp_path / "new" / f"ranks.{ending}"
    assert plot_ranks(record_ranks([f"layer{index}" for index in range(count)]), path) == path
    assert path.stat().st_size > 1000


def test_the_background_is_transparent(tmp_path):
    image = matplotlib.image.imread(plot_ranks(record_ranks(["fc1"]), tmp_path / "ranks.png"))
    assert image.shape[2] == 4
    assert image[0, 0, 3] == 0


def test_equal_runs_give_equal_pictures_and_names_stay_text(tmp_path):
    history = record_ranks(["<script>alert(1)</script>", "$x$", "_hidden"])
    first, second = (plot_ranks(history, tmp_path / name).read_bytes() for name in ("1.svg", "2.svg"))
    assert first == second
    assert b"<script" not in first
    assert b"&lt;script&gt;alert(1)" in first and b"$x$: 3" in first and b"_hidden: 4" in first


def test_a_history_without_ranks_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no ranks"):
        plot_ranks(History(), tmp_path / "ranks.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("background", ["#ffffff", "#0d1117"])
def test_the_picture_is_legible_on_white_and_on_dark(background):
    assert all(contrast(color, background) >= 3 for color in (*MID_TONES.series, MID_TONES.ink, MID_TONES.muted))


@pytest.mark.parametrize("scheme", schemes(), ids=["light", "dark"])
def test_the_page_is_legible_in_light_and_in_dark(scheme):
    assert all(contrast(scheme[f"c{index}"], scheme["card"]) >= 3 for index in range(6))
    for text in ("ink", "muted", "accent"):
        assert contrast(scheme[text], scheme["back"]) >= 4.5 and contrast(scheme[text], scheme["card"]) >= 4.5
    assert contrast(scheme["warn"], scheme["warn-back"]) >= 4.5


@pytest.mark.parametrize("values", [[0.5] * 6, [0.1, 0.12, 0.9], [0.3]])
def test_labels_keep_their_order_and_their_distance(values):
    heights = _apart(values, gap=0.1)
    assert sorted(range(len(values)), key=lambda index: heights[index]) == sorted(
        range(len(values)), key=lambda index: values[index]
    )
    assert all(high - low >= 0.1 - 1e-12 for low, high in pairwise(sorted(heights)))
