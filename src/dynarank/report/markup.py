"""HTML that is escaped by construction: text becomes markup only through ``element``."""

import html
from collections.abc import Iterable, Sequence
from typing import Any


class Markup(str):
    """Text that is HTML already and is not escaped again."""

    __slots__ = ()


def element(name: str, *children: Any, **attributes: Any) -> Markup:
    """Return ``<name attributes>children</name>``, with everything escaped that is not Markup.

    Args:
        name: Name of the element; written by us, never by a run.
        children: Markup or text; None is left out.
        attributes: Values by name. A trailing underscore is dropped (``class_``), others become hyphens; None is left
            out and True is written without a value.

    Example:
        >>> element("p", "a < b", element("b", "!"), class_="note")
        '<p class="note">a &lt; b<b>!</b></p>'
    """
    head = "".join([name, *(_attribute(key, value) for key, value in attributes.items() if value is not None)])
    return Markup(f"<{head}>{join(children)}</{name}>")


def join(parts: Iterable[Any]) -> Markup:
    """Return the parts one after the other, escaped where they are not Markup; None is left out."""
    return Markup("".join(_escaped(part) for part in parts if part is not None))


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], *, numeric: Iterable[int] = ()) -> Markup:
    """Return a table that scrolls sideways by itself on a narrow screen.

    Args:
        head: Names of the columns.
        rows: Text or Markup; the first cell names its row.
        numeric: Indices of the columns that are set flush right.
    """
    classes = ["n" if index in set(numeric) else None for index in range(len(head))]
    cells = [element("th", name, scope="col", class_=kind) for name, kind in zip(head, classes, strict=True)]
    body = [_row(row, classes) for row in rows]
    return element(
        "div",
        element("table", element("thead", element("tr", *cells)), element("tbody", *body)),
        class_="scroll",
        # A region that scrolls must be reachable from the keyboard.
        tabindex="0",
    )


def details(title: str, *children: Any) -> Markup:
    """Return a part of the page that opens on a click."""
    return element("details", element("summary", title), *children)


def keyed(index: int, name: str) -> Markup:
    """Return a name behind a small square in the colour of series ``index``."""
    square = element("span", class_="swatch", style=f"background: var(--c{index})")
    return element("span", square, name, class_="keyed")


def breakable(name: str) -> Markup:
    """Return a dotted name that may go on in the next line after each dot.

    Example:
        >>> breakable("model.layers.0")
        'model.<wbr>layers.<wbr>0'
    """
    return Markup("<wbr>".join(html.escape(part) for part in name.replace(".", ".\0").split("\0")))


def _row(cells: Sequence[Any], classes: Sequence[str | None]) -> Markup:
    first, *others = zip(cells, classes, strict=True)
    head = element("th", first[0], scope="row", class_=first[1])
    return element("tr", head, *(element("td", cell, class_=kind) for cell, kind in others))


def _attribute(name: str, value: Any) -> str:
    name = name.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{html.escape(str(value))}"'


def _escaped(part: Any) -> str:
    return part if isinstance(part, Markup) else html.escape(str(part))
