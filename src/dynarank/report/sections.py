"""The parts of the page: headings, captions that explain, plots and tables."""

import shlex
from collections.abc import Sequence

from dynarank.history import History
from dynarank.report.curve_drawing import MAX_EVENT_LINES
from dynarank.report.facts import headline, last_step
from dynarank.report.formats import count
from dynarank.report.markup import Markup, breakable, details, element, join, keyed, table
from dynarank.report.plots import (
    Plot,
    event_steps,
    other_plots,
    quality_plots,
    rank_plots,
    size_plots,
    spectrum_plots,
)
from dynarank.report.stability_plots import bulk_plots, legend, measure_plots, stability_plot
from dynarank.report.stability_table import LEGEND, look_table, look_title
from dynarank.report.tables import comparison_table, event_table, facts, layer_table

_LONG = 12  # characters of a headline number
_MAX_OPEN_PANELS = 12
_ONE_COLUMN = "grid-template-columns: minmax(0, 1fr); margin-bottom: .9rem"
_SHOWN_ELSEWHERE = ("name", "command", "ranks", "shapes", "dense_parameters")


def top(history: History, *, name: str) -> Markup:
    """Return the title, the state of the run and the headline numbers."""
    step = count(last_step(history))
    state = None
    if history.summary is None:
        state = element(
            "p",
            f"This run has no summary: it was interrupted or has not finished. All numbers are as of step {step}.",
            class_="warn",
            role="note",
        )
    tiles = [
        element(
            "div",
            element("dt", fact.label),
            element("dd", fact.value, class_="value" if len(fact.value) <= _LONG else "value long"),
            element("dd", fact.note, class_="note") if fact.note else None,
            class_="tile",
        )
        for fact in headline(history)
    ]
    sub = element("p", f"Record of a low-rank training run, {step} {'step' if step == '1' else 'steps'}.", class_="sub")
    return join(
        [element("header", element("h1", name), sub), state, element("dl", *tiles, class_="tiles") if tiles else None]
    )


def comparison(history: History) -> Markup | None:
    """Return the table of this network against others, if the summary holds one."""
    table = comparison_table(history)
    if table is None:
        return None
    return _section(
        "Compared with other networks",
        "Low rank has earned its place where it does better than a narrower dense network with about as many "
        "parameters; being close to the full dense network is not enough.",
        table,
    )


def ranks(history: History) -> Markup:
    """Return the plots of the ranks and the table of the layers."""
    plots = rank_plots(history)
    if not plots:
        return _section("Ranks", "No ranks were recorded: the run had no rank event and did not note its first ranks.")
    caption = (
        "The rank of a layer is the number of directions that its weight matrix uses; the fewer, the smaller and "
        "faster the layer. The line is the rank, which changes only at rank events. The light band above it shows "
        "candidates: new directions that train for a while and must then prove worth their place. Where the ranks "
        "differ much, each mark of the scale is twice the one below."
    )
    layers = layer_table(history)
    if len(plots) == 1:
        beside = element("div", element("h3", "From the first rank to the last"), layers, class_="card")
        return _section("Ranks over time", caption, element("div", _card(plots[0]), beside, class_="grid"))
    return _section("Ranks over time", caption, _panels(plots, what="layers"), layers)


def spectra(history: History) -> Markup | None:
    """Return the plots of the singular values."""
    plots = spectrum_plots(history)
    if not plots:
        return None
    return _section(
        "Singular values over time",
        "Each line is one singular value: how strongly the layer uses one direction, on a scale whose marks are a "
        "fixed factor apart. Directions far below the top contribute little. A line that rises from the bottom is a "
        "new direction that learned something; a line that ends in an orange dot was cut at a rank event.",
        _panels(plots, what="layers"),
    )


def stability(history: History) -> Markup | None:
    """Return the plots of the looks at the weights: how far they turned, and how many directions they use."""
    plot, measures, bulks = stability_plot(history), measure_plots(history), bulk_plots(history)
    if plot is None and not measures:
        return None
    noise = (
        "Singular values at the last look and, faint, at the first. The dashed grey curve is what random entries of "
        "the same level would give; what stands above the orange line is more than noise. A low-rank layer shows none."
    )
    return _section(
        "Do the weights settle?",
        "S compares the directions of a weight at one look with those at the look before: 1 where none turned, 0 "
        "where they have nothing to do with each other. A layer whose directions rest is ready to go low-rank. But S "
        "goes to 1 wherever the learning rate goes to 0, and all directions count alike, also candidates on trial and "
        "those that carry next to nothing: see what the leading ones do, and how far the weight moved at all.",
        None if plot is None else element("div", _card(plot), class_="grid", style=_ONE_COLUMN),
        element("div", *map(_card, measures), class_="grid small"),
        _legend(legend(history)),
        _look_details(history),
        element("p", noise, class_="caption") if bulks else None,
        _panels(bulks, what="layers") if bulks else None,
    )


def _look_details(history: History) -> Markup:
    found = look_table(history)
    body = table(found.head, found.rows, numeric=found.right)
    meanings = element("ul", *(element("li", line) for line in LEGEND))
    return details("Table of the last look", element("p", look_title(history), class_="caption"), body, meanings)


def quality(history: History) -> Markup | None:
    """Return the plots of loss and accuracy and, folded, of all other numbers."""
    plots = quality_plots(history)
    others = other_plots(history)
    if not plots and not others:
        return None
    folded = details("Other logged numbers", element("div", *map(_card, others), class_="grid small"))
    return _section(
        "Loss and accuracy" if any(plot.title == "Accuracy" for plot in plots) else "Loss",
        f"{_event_marks(history)} Where values are many, they are faint and their mean is drawn on top.",
        element("div", *map(_card, plots), class_="grid"),
        folded if others else None,
    )


def size(history: History) -> Markup | None:
    """Return the plots of parameters and memory."""
    plots = size_plots(history)
    if not plots:
        return None
    return _section(
        "Size over time",
        "Deployed parameters are all numbers that the network needs to run once it is saved, biases and buffers "
        "included. The dashed line is the dense network: what lies below it is saved.",
        element("div", *map(_card, plots), class_="grid"),
    )


def events(history: History) -> Markup:
    """Return the table of rank events."""
    table = event_table(history)
    if table is None:
        return _section("Rank events", "No rank event was recorded: the ranks stayed as they were at the start.")
    return _section(
        "Rank events",
        "What changed, and why. Discarded is the part of the layer's spectrum that a cut threw away, measured as a "
        "norm: the smaller, the less the layer's weight changed.",
        table,
    )


def reproduce(history: History) -> Markup | None:
    """Return the command line and the other facts of the run."""
    run = history.run
    command = run.get("command")
    if isinstance(command, list):
        command = shlex.join(map(str, command))
    others = {key: value for key, value in run.items() if key not in _SHOWN_ELSEWHERE}
    if not command and not others:
        return None
    return _section(
        "How to reproduce",
        "The same command, with the same seeds, versions and number of threads on the same machine, repeats the run."
        if command
        else "The run did not note its command line. It noted this:",
        element("pre", element("code", command)) if command else None,
        facts(others, folded=bool(command)),
    )


def _section(heading: str, caption: str, *body: Markup | None) -> Markup:
    return element("section", element("h2", heading), element("p", caption, class_="caption"), *body)


def _card(plot: Plot) -> Markup:
    return element("figure", element("h3", breakable(plot.title)), plot.svg, _legend(plot.legend), class_="card")


def _legend(names: Sequence[str]) -> Markup | None:
    items = [element("li", keyed(index, name)) for index, name in enumerate(names)]
    return element("ul", *items, class_="legend") if items else None


def _panels(plots: Sequence[Plot], *, what: str) -> Markup:
    """Return small drawings side by side, those after the first dozen folded away."""
    cards = [_card(plot) for plot in plots]
    first = element("div", *cards[:_MAX_OPEN_PANELS], class_="grid small")
    rest = cards[_MAX_OPEN_PANELS:]
    if not rest:
        return first
    return join([first, details(f"Show {len(rest)} more {what}", element("div", *rest, class_="grid small"))])


def _event_marks(history: History) -> str:
    steps = event_steps(history)
    if not steps:
        return "No rank changed during this run."
    what = "Thin vertical lines mark" if len(steps) <= MAX_EVENT_LINES else "Short ticks at the bottom mark"
    return (
        f"{what} rank events. A cut should leave at most a small bump in the curves; if the bump stays, the cut took "
        "away something that the network needed."
    )
