"""The record of one training run: kept in memory and appended to a file, one JSON object per line."""

import json
import logging
import math
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Self, final

from dynarank.events import RankEvent

HISTORY_FILE = "history.jsonl"

_logger = logging.getLogger(__name__)
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_EVENT_FIELDS = tuple(field.name for field in fields(RankEvent))
_REQUIRED_FIELDS = {
    "metrics": ("step",),
    "rank": _EVENT_FIELDS,
    "spectrum": ("step", "singular_values"),
    "look": ("step", "layers"),
}


@final
class History:
    """What happened in a training run, as a list of records: facts, metrics, rank events, spectra, looks, a summary.

    Every record is a plain dictionary with a ``kind``; the kinds are ``run``, ``metrics``, ``rank``, ``spectrum``,
    ``look`` and ``summary``. With a path, each record is written at once as one line of standard JSON, so an
    interrupted run leaves everything up to its last step. Writing never stops training: at the first ``OSError`` (a
    full disk, say) one warning is logged, the file stays as it is, and the record goes on in memory. No record holds
    the time of day, so two equal runs leave equal files.

    Args:
        path: File to append to; parent directories are made. None keeps the record in memory only.
        active: Whether this process writes the file. Give ``process == 0`` when training on several processes; the
            others keep their record in memory.
        resume_at: Last step of the checkpoint that the run resumes from. Records up to and including that step stay,
            later ones and any summary are removed from the file, and new ones follow: the file of a resumed run
            equals that of a run that was never interrupted.

    Raises:
        FileExistsError: If the file already holds records and ``resume_at`` is not given.
        ValueError: If ``resume_at`` is given without a path, or a line before the last one is broken.
        OSError: If the file cannot be created. Only here, before training; never later.

    Example:
        >>> history = History()
        >>> history.describe(dense_parameters=430_500, command="python train.py")
        >>> history.log(step=10, loss=0.5)
        >>> history.log(step=20, loss=0.25, accuracy=0.9)
        >>> history.series("loss")
        [(10, 0.5), (20, 0.25)]
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, *, active: bool = True, resume_at: int | None = None
    ) -> None:
        self.path = None if path is None else Path(path)
        self.records: list[dict[str, Any]] = []
        self._writing = active and self.path is not None
        if resume_at is not None:
            self._resume(_checked_step(resume_at, name="resume_at"))
        if self.path is not None and self._writing:
            _create(self.path, must_be_empty=resume_at is None)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Return the record in a file; it stays in memory and does not write to that file.

        A last line cut short by an interruption is left out. Records of unknown kinds are kept in ``records``.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If a line other than the last is not a record; the message names file and line.
        """
        history = cls()
        history.records = _read_records(Path(path))
        return history

    def describe(self, **facts: Any) -> None:
        """Record facts of the run, such as config, shapes, dense_parameters, ranks, seeds, versions and command.

        Facts may be nested; what JSON cannot hold is recorded as its ``str``. Facts that are already recorded are not
        repeated, so a resumed run may call this again.
        """
        record = {"kind": "run", **_facts(facts)}
        if record not in self.records:
            self._append(record)

    def log(self, *, step: int, **numbers: Any) -> None:
        """Record numbers measured after ``step`` optimizer steps.

        Args:
            step: Number of optimizer steps taken.
            numbers: Numbers or tensors of one element, under any name: loss, accuracy (between 0 and 1),
                validation_loss, validation_accuracy, seconds, deployed_parameters, trainable_parameters,
                flops_per_sample, weight_bytes, gradient_bytes, optimizer_bytes. None means not measured.

        Raises:
            TypeError: If a value is not a number.
            ValueError: If a tensor holds more than one number, or a number is called ``kind``.
        """
        _refuse_reserved(numbers)
        values = {name: _number(name, value) for name, value in numbers.items()}
        self._append({"kind": "metrics", "step": _checked_step(step), **values})

    def record(self, event: RankEvent) -> None:
        """Record one layer's part in a rank event."""
        self._append({"kind": "rank", **_plain(event.as_dict())})

    def spectrum(self, *, step: int, singular_values: Mapping[str, Sequence[float]]) -> None:
        """Record singular values by layer, descending, to six significant digits.

        Args:
            step: Number of optimizer steps taken.
            singular_values: For each layer a sequence or a tensor of shape ``(rank,)``.
        """
        values = {str(layer): [_rounded(sigma) for sigma in _plain(row)] for layer, row in singular_values.items()}
        self._append({"kind": "spectrum", "step": _checked_step(step), "singular_values": values})

    def look(self, *, step: int, layers: Mapping[str, Any], lr: float | None = None) -> None:
        """Record a look at the weights, as `dynarank.stability.WeightWatch` takes it.

        Args:
            step: Number of optimizer steps taken.
            layers: For each layer its measures by name, or as a dataclass.
            lr: Learning rate.
        """
        values = {"lr": _number("lr", lr), "layers": {str(layer): _plain(found) for layer, found in layers.items()}}
        self._append({"kind": "look", "step": _checked_step(step), **values})

    def summarise(self, **facts: Any) -> None:
        """Record the outcome of a finished run, such as test_accuracy, deployed_parameters, seconds and comparison.

        ``comparison`` is a list of dictionaries, one for each network, with a ``name`` and its numbers.
        """
        self._append({"kind": "summary", **_facts(facts)})

    @property
    def run(self) -> dict[str, Any]:
        """Facts of the run; where a fact was recorded twice, the later one."""
        return self._merged("run")

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The logged numbers, one dictionary with ``step`` for each call of ``log``."""
        return [_without_kind(record) for record in self._of_kind("metrics")]

    @property
    def events(self) -> list[RankEvent]:
        """The rank events in the order in which they happened."""
        return [_event(record) for record in self._of_kind("rank")]

    @property
    def looks(self) -> list[dict[str, Any]]:
        """The looks at the weights, dictionaries with ``step``, ``lr`` and, by layer and name, ``layers``."""
        return [_without_kind(record) for record in self._of_kind("look")]

    @property
    def summary(self) -> dict[str, Any] | None:
        """The outcome of the run, or None when the run did not finish."""
        return self._merged("summary") if self._of_kind("summary") else None

    def series(self, key: str) -> list[tuple[int, float]]:
        """Return one logged number over time as ``(step, value)`` pairs; steps without it are left out."""
        metrics = self.metrics
        return [(record["step"], float(record[key])) for record in metrics if _is_number(record.get(key))]

    def ranks(self) -> dict[str, list[tuple[int, int]]]:
        """Return the rank of each layer over time as ``(step, rank)`` pairs, candidates not counted.

        The first pair is the rank at step 0: from ``describe(ranks={layer: rank})`` where given, otherwise the rank
        before the layer's first event.

        Example:
            >>> history = History()
            >>> history.record(RankEvent(25, "fc1", old_rank=8, new_rank=5, candidates=2, tail=0.01, reason="budget"))
            >>> history.ranks()
            {'fc1': [(0, 8), (25, 5)]}
        """
        start = self.run.get("ranks")
        known = start.items() if isinstance(start, dict) else ()
        ranks = {layer: [(0, rank)] for layer, rank in known if isinstance(rank, int)}
        for event in self.events:
            ranks.setdefault(event.layer, [(0, event.old_rank)]).append((event.step, event.new_rank))
        return ranks

    def spectra(self) -> dict[str, list[tuple[int, list[float]]]]:
        """Return the singular values of each layer over time as ``(step, values)`` pairs."""
        spectra: dict[str, list[tuple[int, list[float]]]] = {}
        for record in map(_without_kind, self._of_kind("spectrum")):
            for layer, values in record["singular_values"].items():
                spectra.setdefault(layer, []).append((record["step"], values))
        return spectra

    def _of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]

    def _merged(self, kind: str) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for record in self._of_kind(kind):
            merged |= _without_kind(record)
        return merged

    def _append(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if self.path is None or not self._writing:
            return
        try:
            # Opened for each line: nothing to close or to flush, and the history can be copied and pickled.
            with self.path.open("ab") as file:
                file.write(_encode(record))
        except OSError as error:
            self._stop_writing(error)

    def _resume(self, step: int) -> None:
        if self.path is None:
            raise ValueError("History: resume_at needs a path, got none. Give the path of the run that is resumed.")
        if not self.path.exists():
            if self._writing and step > 0:
                _logger.warning("History: %s does not exist; its record starts after step %d.", self.path, step)
            return
        self.records = [record for record in _read_records(self.path) if _belongs_before(record, step)]
        if self._writing:
            try:
                _rewrite(self.path, self.records)
            except OSError as error:
                self._stop_writing(error)

    def _stop_writing(self, error: OSError) -> None:
        self._writing = False
        _logger.warning(
            "History: cannot write %s (%s). The file stops here; training goes on and the record stays in memory. "
            "Make room, then resume from a checkpoint with History(path, resume_at=step).",
            self.path,
            error.strerror or error,
        )


def _create(path: Path, *, must_be_empty: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if must_be_empty and path.exists() and path.stat().st_size > 0:
        raise FileExistsError(
            f"History: {path} already holds the record of a run. Pass resume_at=step to go on with that run, "
            "choose another path, or pass active=False on all processes but the first."
        )
    with path.open("ab"):
        pass


def _rewrite(path: Path, records: list[dict[str, Any]]) -> None:
    """Replace the file at once, so that an interruption leaves either the old or the new record."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.writelines(_encode(record) for record in records)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _read_records(path: Path) -> list[dict[str, Any]]:
    lines = [(number, line) for number, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
    records = []
    for number, line in lines:
        try:
            records.append(_parse(line))
        except ValueError as error:
            if number == lines[-1][0]:
                _logger.info("History: %s ends in a line that was cut short; it is left out.", path)
                break
            raise ValueError(
                f"{path}, line {number}: not a record ({error}). Only the last line may be cut short; "
                "repair or remove this line."
            ) from error
    return records


def _parse(line: bytes) -> dict[str, Any]:
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise ValueError("expected a JSON object with a kind")
    required = _REQUIRED_FIELDS.get(record["kind"], ())
    missing = [name for name in required if name not in record]
    if missing:
        raise ValueError(f"{record['kind']} record without {', '.join(missing)}")
    if "step" in required and not isinstance(record["step"], int):
        raise ValueError(f"step must be an integer, got {record['step']!r}")
    if record["kind"] == "look" and not _by_name(record["layers"]):
        raise ValueError("layers of a look must be objects by name")
    return record


def _by_name(layers: Any) -> bool:
    return isinstance(layers, dict) and all(isinstance(found, dict) for found in layers.values())


def _encode(record: dict[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode("ascii") + b"\n"


def _belongs_before(record: dict[str, Any], step: int) -> bool:
    if record["kind"] == "run":
        return True
    if record["kind"] == "summary":
        return False
    at = record.get("step")
    return not isinstance(at, int) or at <= step


def _without_kind(record: dict[str, Any]) -> dict[str, Any]:
    return {name: _from_plain(value) for name, value in record.items() if name != "kind"}


def _event(record: dict[str, Any]) -> RankEvent:
    known = {name: record[name] for name in _EVENT_FIELDS}
    return RankEvent(**(known | {"tail": _from_plain(known["tail"])}))


def _refuse_reserved(names: Mapping[str, Any]) -> None:
    if "kind" in names:
        raise ValueError("History: 'kind' names the kind of a record, got it as a fact. Choose another name.")


def _facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    _refuse_reserved(facts)
    return _plain(facts)


def _checked_step(step: Any, *, name: str = "step") -> int:
    try:
        number = operator.index(step)
    except TypeError:
        raise TypeError(f"History: {name} must be an integer, got {type(step).__name__} {step!r}.") from None
    if number < 0:
        raise ValueError(f"History: {name} must be at least 0, got {number}.")
    return number


def _number(name: str, value: Any) -> Any:
    if hasattr(value, "item"):
        try:
            value = value.item()
        except (RuntimeError, ValueError):
            shape = tuple(getattr(value, "shape", ()))
            raise ValueError(
                f"History: {name} must hold one number, got shape {shape}. Log its mean or its norm."
            ) from None
    if value is not None and not isinstance(value, int | float):
        raise TypeError(
            f"History: {name} must be a number or a tensor of one element, got {type(value).__name__}. "
            "Text and lists belong into describe or summarise."
        )
    return _plain(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if _is_number(value) else value


def _plain(value: Any) -> Any:
    """Return what standard JSON can hold; NaN and infinities become the strings of ``_NON_FINITE``."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else json.dumps(float(value))
    if value is None or isinstance(value, bool | int | str):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(str(item) for item in value)
    to_list = getattr(value, "tolist", None)
    return str(value) if to_list is None else _plain(to_list())


def _from_plain(value: Any) -> Any:
    """Return the value with NaN and infinities as floats again."""
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {name: _from_plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_from_plain(item) for item in value]
    return value
