"""The HTML around a page that needs nothing else."""

from collections.abc import Iterable

from dynarank.report.css import STYLE
from dynarank.report.markup import Markup, element, join

# The page runs no script and loads nothing; with this line a browser would not even if it were told to.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(name: str, sections: Iterable[Markup | None], *, style: str = "") -> str:
    """Return a whole page.

    Args:
        name: Its title.
        sections: What it shows; None is left out.
        style: Rules of its own, after the common ones.

    Example:
        >>> page("digits", [element("p", "a < b")]).count("a &lt; b")
        1
    """
    footer = element("footer", "Written by dynarank. This page is complete in itself and loads nothing.")
    head = join(
        [
            Markup('<meta charset="utf-8">'),
            Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
            Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            element("title", f"{name} · dynarank"),
            element("style", Markup(STYLE + style)),
        ]
    )
    body = element("main", *sections, footer)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'
