"""Commands as tyro reads them: dataclasses that check nothing, since messages about values are those of the library."""

import contextlib
import dataclasses
import inspect
import io
import itertools
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, final

READERS = {int: ("INT", "a whole number"), float: ("FLOAT", "a number"), str: ("TEXT", "text")}
SETTINGS = "settings"  # the field of a command that holds the settings of its configuration


@final
@dataclass(frozen=True)
class Spec:
    """A command, and how its options are shown.

    Args:
        kind: Dataclass of the command. Its docstring is the help; its field `SETTINGS` stands for a configuration.
        config: Dataclass of the configuration, whose fields are options too.
        positional: Fields that are given without a name.
        metavars: What the help shows in place of the values of some options.
        hints: What it shows in place of the defaults of some options.
        aliases: Further names of some options.
    """

    kind: Any
    config: Any = None
    positional: Sequence[str] = ()
    metavars: Mapping[str, str] = dataclasses.field(default_factory=dict)
    hints: Mapping[str, str] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    def twin(self, tyro: Any) -> Any:
        """Return the dataclass that tyro reads."""
        own = [field for field in dataclasses.fields(self.kind) if field.name != SETTINGS]
        taken = dataclasses.fields(self.config) if self.config is not None else ()
        fields = sorted((*taken, *own), key=lambda field: field.default is not dataclasses.MISSING)
        hints = typing.get_type_hints(self.kind) | (typing.get_type_hints(self.config) if self.config else {})
        specs = [self._field(tyro, field, hints[field.name]) for field in fields]
        text, _, arguments = (inspect.getdoc(self.kind) or "").partition("Args:\n")
        options = arguments_of(self.config) if self.config is not None else ""
        namespace = {"__doc__": f"{text}Args:\n{options}\n{arguments}", "__module__": __name__}
        return dataclasses.make_dataclass(self.kind.__name__, specs, namespace=namespace, frozen=True)

    def command(self, read: Any) -> Any:
        """Return the command itself from what tyro has read."""
        values = dict(vars(read))
        if self.config is not None:
            values[SETTINGS] = {field.name: values.pop(field.name) for field in dataclasses.fields(self.config)}
        return self.kind(**values)

    def _field(self, tyro: Any, field: Any, kind: Any) -> Any:
        name = field.name
        if name in self.positional:
            hint = {"help_behavior_hint": self.hints[name]} if name in self.hints else {}
            shown = Annotated[tyro.conf.Positional[kind], tyro.conf.arg(metavar=self.metavars[name], **hint)]
            return (name, shown) if field.default is dataclasses.MISSING else (name, shown, field.default)
        if kind is bool and not (self.config and name in self.config.__dataclass_fields__):
            return name, tyro.conf.FlagCreatePairsOff[bool], field.default
        shown = _shown(tyro, kind, self.metavars.get(name), self.hints.get(name, ""))
        if name in self.aliases:
            shown = Annotated[shown, tyro.conf.arg(aliases=self.aliases[name])]
        return (name, shown) if field.default is dataclasses.MISSING else (name, shown, field.default)


def arguments_of(kind: Any) -> str:
    """Return the section of a docstring that describes the fields."""
    return (inspect.getdoc(kind) or "").split("Args:\n", 1)[1].split("\n\n", 1)[0]


def read(tyro: Any, specs: Mapping[str, Spec], words: list[str], *, description: str) -> Any:
    """Return the command that the words ask for; what tyro says about wrong ones in a box is told in one line.

    Raises:
        ValueError: The words cannot be read.
        SystemExit: After help was asked for.
    """
    told = io.StringIO()
    twins = {name: spec.twin(tyro) for name, spec in specs.items()}
    try:
        with contextlib.redirect_stderr(told):
            found = tyro.extras.subcommand_cli_from_dict(twins, prog="dynarank", description=description, args=words)
    except SystemExit as stop:
        if not stop.code:
            raise
        text = _unboxed(told.getvalue())
        command = f" {words[0]}" if words[0] in specs else ""
        text = text.removeprefix("Error parsing ")
        raise ValueError(f"{text}. See dynarank{command} --help.") from None
    return next(specs[name].command(found) for name, twin in twins.items() if type(found) is twin)


def _unboxed(text: str) -> str:
    """Return the first paragraph inside a box drawn with lines.

    Example:
        >>> _unboxed("╭─ Wrong ──╮\\n│ No such  │\\n│ option   │\\n│ ──────── │\\n│ See help │\\n╰──────────╯")
        'No such option'
    """
    inside = [line.strip("│ ") for line in text.splitlines() if line.startswith("│")]
    paragraph = list(itertools.takewhile(lambda line: line.strip("─"), inside))
    return " ".join(paragraph or text.split()).rstrip(".")


def _shown(tyro: Any, kind: Any, name: str | None, hint: str) -> Any:
    """Return the type of an option with what the help shows for its value and its default."""
    if typing.get_origin(kind) is typing.Literal or kind is bool:
        return kind
    optional = type(None) in typing.get_args(kind)
    member = next((part for part in typing.get_args(kind) if part is not type(None)), kind) if optional else kind
    shown = tyro.conf.arg(help_behavior_hint=hint)
    if member in READERS:
        reader = _reader(tyro, member, name)
        return Annotated[kind, reader, shown] if optional else Annotated[kind, reader]
    word = name or f"{READERS[typing.get_args(member)[0]][0]} ..."
    return Annotated[kind, tyro.conf.arg(metavar=word), shown]


def _reader(tyro: Any, kind: type, name: str | None) -> Any:
    """Return how tyro reads one value; by itself it would offer the word None for an option that may be left out."""
    metavar, words = READERS[kind]

    def read_one(given: list[str]) -> Any:
        try:
            return kind(given[0])
        except ValueError:
            raise ValueError(f"must be {words}, got {given[0]!r}") from None

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=name or metavar,
        instance_from_str=read_one,
        is_instance=lambda value: value is None or isinstance(value, kind),
        str_from_instance=lambda value: [str(value)],
    )
