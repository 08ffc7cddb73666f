"""From a drawing on matplotlib axes to an SVG that stands inside an HTML page and follows its colours."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from dynarank.errors import missing_extra
from dynarank.report.markup import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"


@dataclass(frozen=True)
class Palette:
    """Colours of a drawing.

    Args:
        ink: Text that matters.
        muted: Labels of axes.
        rule: Axes, grid and thin lines.
        series: Colours of data, told apart by colour-blind readers.
    """

    ink: str
    muted: str
    rule: str
    series: tuple[str, ...]


# Stand-ins: inside the page each becomes the CSS variable of its name, so that one SVG serves light and dark.
PAGE = Palette("#010101", "#020202", "#030303", tuple(f"#0a0a0{index}" for index in range(6)))
_VARIABLES = {PAGE.ink: "--ink", PAGE.muted: "--muted", PAGE.rule: "--rule"} | {
    color: f"--c{index}" for index, color in enumerate(PAGE.series)
}
# Between white and black, with a contrast of three to one or more against both.
MID_TONES = Palette("#767676", "#7d7d7d", "#9a9a9a", ("#3a8fe8", "#c8380c", "#2a7466", "#d970ab", "#978f20", "#7645d0"))


@contextmanager
def theme(palette: Palette) -> Iterator[None]:
    """Draw with our settings whatever the user's matplotlib settings are; they are back afterwards.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        import matplotlib.style
    except ImportError:
        raise missing_extra("matplotlib", "viz") from None
    with matplotlib.style.context(["default", _settings(palette)]):
        yield


def inline(paint: Callable[["Axes"], None], *, key: str, label: str, width: float = 420, height: float = 230) -> Markup:
    """Return what ``paint`` draws on its axes as an SVG element.

    Args:
        paint: Draws on the axes it is given, with the colours of PAGE.
        key: Prefix of the ids in the SVG; one that no other SVG of the page has.
        label: What the drawing shows, for readers who do not see it.
        width: Width of the drawing; text is 11 of these units high.
        height: Height of the drawing in the same unit.
    """
    with theme(PAGE):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        paint(figure.subplots())
        buffer = io.BytesIO()
        # No metadata: they hold the date and addresses.
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return Markup(_for_page(buffer.getvalue(), key=key, label=label))


def _settings(palette: Palette) -> dict[str, Any]:
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "dynarank",
        "text.parse_math": False,  # a layer may be called $x$
        "font.family": "DejaVu Sans",
        "font.size": 11,
        "axes.labelsize": 10,
        "xtick.labelsize": 10,
        "ytick.labelsize": 10,
        "text.color": palette.ink,
        "axes.titlecolor": palette.ink,
        "axes.labelcolor": palette.muted,
        "xtick.color": palette.rule,
        "ytick.color": palette.rule,
        "xtick.labelcolor": palette.muted,
        "ytick.labelcolor": palette.muted,
        "axes.edgecolor": palette.rule,
        "grid.color": palette.rule,
        "grid.alpha": 0.45,
        "grid.linewidth": 0.6,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "ytick.left": False,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "savefig.facecolor": "none",
        "lines.linewidth": 1.8,
    }


def _for_page(document: bytes, *, key: str, label: str) -> str:
    """Return the SVG without namespaces, metadata, fixed size, own styles, and ids that others may have."""
    root = ElementTree.fromstring(document)
    names = _new_ids(root, key)
    for node in list(root.iter()):
        for child in list(node):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                node.remove(child)
        node.tag = node.tag.removeprefix(_SVG)
        node.attrib = {_local(name): _renamed(value, names) for name, value in _kept(node.attrib, names)}
        node.tail = None
        if node.tag != "text" and node.tag != "tspan":
            node.text = None
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    return ElementTree.tostring(root, encoding="unicode")


def _new_ids(root: ElementTree.Element, key: str) -> dict[str, str]:
    """Return new names for the ids that something refers to."""
    values = " ".join(value for node in root.iter() for name, value in node.attrib.items() if name != "id")
    used = (node.attrib["id"] for node in root.iter() if "id" in node.attrib)
    return {old: f"{key}-{index}" for index, old in enumerate(dict.fromkeys(used)) if f"#{old}" in values}


def _kept(attributes: dict[str, str], names: dict[str, str]) -> Iterator[tuple[str, str]]:
    return ((name, value) for name, value in attributes.items() if name != "id" or value in names)


def _local(name: str) -> str:
    return "href" if name == _LINK else name


def _renamed(value: str, names: dict[str, str]) -> str:
    if value in names:
        return names[value]
    if "#" not in value:
        return value
    for color, variable in _VARIABLES.items():
        value = value.replace(color, f"var({variable})")
    for old, new in names.items():
        value = value.replace(f"url(#{old})", f"url(#{new})")
    return f"#{names[value[1:]]}" if value[1:] in names else value
