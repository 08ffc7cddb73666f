"""Where the result of a compression is kept: the model, its table, and the record of everything."""

import contextlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dynarank._files import replacing
from dynarank.experiments.plain import standard
from dynarank.experiments.proof import Proof
from dynarank.experiments.run_folder import next_free
from dynarank.export import save_compressed

REPORT, TABLE = "report.json", "table.md"


@contextmanager
def new_folder(out: str | None, *, name: str) -> Iterator[Path]:
    """Yield an empty folder: the one that is asked for, or the next free number below ``runs``.

    It is removed again where nothing was put into it.

    Raises:
        ValueError: The folder that is asked for is not empty, or is a file.
        OSError: It cannot be made.
    """
    folder = next_free(name).path if out is None else Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"out must be a new or an empty folder, got {out}, which holds something. Name another one.")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):  # not empty: that is what it is for
            folder.rmdir()


def save_proof(folder: Path, proof: Proof) -> None:
    """Save the compressed network for `load_compressed`, the table as Markdown, and at the very end the record.

    Raises:
        OSError: Writing fails. No file is there in part.
    """
    scores = standard(proof.rows[-1].scores)
    save_compressed(folder, proof.model, subject=proof.subject, scores=scores, settings=standard(proof.settings))
    texts = {TABLE: proof.markdown(), REPORT: json.dumps(proof.as_dict(), indent=1, allow_nan=False) + "\n"}
    for name, text in texts.items():
        with replacing(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")
