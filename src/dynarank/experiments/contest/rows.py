"""What a comparison has found so far: one finished run per line of a file that is only ever appended to."""

import json
import os
from pathlib import Path
from typing import Any, final

from dynarank._files import replacing
from dynarank.experiments.plain import standard

ROWS, SETTINGS = "rows.jsonl", "contest.json"

Row = dict[str, Any]


@final
class Rows:
    """The finished runs of a folder by key; a run that is done again, since it failed, counts as the last time.

    Args:
        folder: Where they are kept.

    Raises:
        ValueError: A line before the last one is broken.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ROWS
        self._rows: dict[str, Row] = {}
        text = self.path.read_bytes() if self.path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):  # an interruption cut the last line short
            os.truncate(self.path, len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                row = json.loads(line)
                self._rows[row["key"]] = row
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f"{self.path}, line {number} is broken. Remove that line, or name another folder."
                ) from None

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: str) -> Row | None:
        """Return the row of that key, or None."""
        return self._rows.get(key)

    def add(self, key: str, outcome: Row) -> None:
        """Append a row, whole and brought down to the disk."""
        row = standard({"key": key, **outcome})
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(descriptor, line)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._rows[key] = row


def claim_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Make a folder for rows that share these settings, or check that those in it do.

    Raises:
        ValueError: The folder holds rows of other settings, or something else.
    """
    file = folder / SETTINGS
    if file.exists():
        there = json.loads(file.read_text(encoding="utf-8"))
        changed = [name for name in settings if there.get(name) != settings[name]]
        if changed:
            was = ", ".join(f"{name} {there.get(name)} instead of {settings[name]}" for name in changed)
            raise ValueError(
                f"{folder} holds a comparison with other settings: {was}. Give those, or name another folder; methods, "
                "sizes, seeds and learning rates may be added."
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"out must be a new or an empty folder or one of a comparison, got {folder}.")
    with replacing(file) as partial:
        partial.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
