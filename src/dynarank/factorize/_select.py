"""Choosing layers in PEFT's vocabulary: exact names, suffixes, regular expressions, kinds and module classes."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from dynarank._discovery import discover
from dynarank.factorize._sites import Site
from dynarank.layers._factored import AbstractFactoredLayer

Choice = str | type[nn.Module]
Selector = Choice | Sequence[Choice] | None

KINDS = {"all": "", "all-linear": "linear", "conv": "conv"}  # how the kinds of layers that a word stands for begin
EXACT, SUFFIX, REGEX, KIND = range(4)  # from the most specific to the least
EVERY = (EXACT, SUFFIX, REGEX, KIND)


class Selection:
    """What ``target_modules``, ``exclude_modules`` or the keys of ``rank_pattern`` stand for.

    A string alone is a kind or a regular expression; in a list it is a name or a suffix, as in PEFT. Keys of a
    mapping may be any of these.

    Args:
        selector: What the caller wrote.
        argument: Name of the argument, for messages.

    Raises:
        TypeError: An entry is neither a string nor a module class.
        ValueError: A string is no regular expression.
    """

    def __init__(self, selector: Selector | Mapping[Any, Any], *, argument: str) -> None:
        self.argument = argument
        if selector is None:
            self.choices, self.ways = [], EVERY
        elif isinstance(selector, str):
            self.choices, self.ways = [selector], (KIND,) if selector in _kinds() else (REGEX,)
        elif isinstance(selector, type):
            self.choices, self.ways = [selector], (KIND,)
        else:
            self.choices = list(selector)
            self.ways = EVERY if isinstance(selector, Mapping) else (EXACT, SUFFIX)
        for choice in self.choices:
            self._check(choice)

    def _check(self, choice: object) -> None:
        if not isinstance(choice, str) and not (isinstance(choice, type) and issubclass(choice, nn.Module)):
            raise TypeError(f"{self.argument} takes names and module classes, got {choice!r}.")
        if self.ways == (REGEX,) and _compiled(choice) is None:
            raise ValueError(f"{self.argument}: {choice!r} is no regular expression. Pass a list for names.")

    def best(self, site: Site) -> tuple[Choice, int] | None:
        """Return the most specific choice for a layer and how it matches; of equal ones the longest, then the first."""
        found = [(choice, way) for choice in self.choices if (way := self.way(choice, site)) is not None]
        return min(found, key=lambda pair: (pair[1], -len(str(pair[0]))), default=None)

    def way(self, choice: Choice, site: Site) -> int | None:
        """Return the most specific way in which one choice stands for a layer, or None."""
        if isinstance(choice, type):
            return KIND if isinstance(site.module, choice) else None
        return next((way for way in self.ways if _matches(choice, way, site)), None)

    def unmatched(self, sites: Iterable[Site]) -> list[Choice]:
        """Return the choices that stand for none of the layers."""
        sites = list(sites)
        return [choice for choice in self.choices if all(self.way(choice, site) is None for site in sites)]


def _matches(choice: str, way: int, site: Site) -> bool:
    if way == EXACT:
        return choice in site.names
    if way == SUFFIX:
        return any(name.endswith("." + choice) for name in site.names)
    if way == REGEX:
        pattern = _compiled(choice)
        return pattern is not None and any(pattern.fullmatch(name) for name in site.names)
    return choice in _kinds() and site.kind.startswith(_kinds()[choice])


def _kinds() -> dict[str, str]:
    return KINDS | {kind: kind for kind in discover("dynarank.layers", AbstractFactoredLayer)}


def _compiled(choice: Any) -> re.Pattern[str] | None:
    try:
        return re.compile(choice)
    except re.error:
        return None


def unknown_choice(argument: str, choice: Choice, model: nn.Module, known: list[str]) -> ValueError:
    """Return the error for a choice that stands for no layer, with what may have been meant.

    Args:
        argument: Name of the argument.
        choice: What the caller wrote.
        model: The model, to tell a container from a misspelling.
        known: Names of the layers that could have been chosen.
    """
    text = choice if isinstance(choice, str) else choice.__name__
    modules = dict(model.named_modules())
    inside = [name for name in known if name.startswith(f"{text}.")]
    if inside:
        pattern = text + r"\..*"
        hint = f"It holds {len(inside)} layers; the regular expression {pattern!r} stands for all of them."
    elif text in modules:
        hint = f"It is a {type(modules[text]).__name__}, which has no low-rank twin."
    elif close := _close_names(text, known):
        hint = f"Did you mean {' or '.join(repr(name) for name in close)}?"
    else:
        hint = f"Layers with a low-rank twin: {shortened(known)}."
    return ValueError(f"{argument}: {text!r} matches no layer. {hint}")


def _close_names(text: str, known: list[str]) -> list[str]:
    last = {name.rpartition(".")[2] for name in known}
    return difflib.get_close_matches(text, [*known, *sorted(last - set(known))], n=3, cutoff=0.6)


def shortened(names: Sequence[str], most: int = 10) -> str:
    """Return names as a list in words, at most ``most`` of them.

    Example:
        >>> shortened(["a", "b", "c"], most=2)
        'a, b and 1 more'
    """
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "") if names else "none"
