"""ETTh1, two years of an electricity transformer by the hour, from a folder, the user's cache or its repository."""

import hashlib
import os
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import final

import torch

from dynarank.data.download import download as download_file
from dynarank.data.files import damaged, locate
from dynarank.data.splits import PARTS

FILE = "ETTh1.csv"
MONTH = 30 * 24  # hours


@final
@dataclass(frozen=True)
class CsvSource:
    """The SHA-256 of one CSV file, in hexadecimal, how many of its rows each part takes, and its addresses."""

    sha256: str
    rows: tuple[int, int, int]
    mirrors: tuple[str, ...]


ETTH1 = CsvSource(
    sha256="f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066",
    rows=(12 * MONTH, 4 * MONTH, 4 * MONTH),
    mirrors=("https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/ETTh1.csv",),
)


@final
@dataclass(frozen=True, eq=False, repr=False)
class HourlySeries:
    """Several series over the same hours, in three consecutive parts, for forecasting the next hours from the last.

    Args:
        names: Name of each series.
        values: All parts, one after the other.
        rows: Hours of the training, the validation and the test part.

    Shape:
        - values: ``(T, series)`` with ``T`` the sum of ``rows``, floating point.

    Example:
        >>> series = HourlySeries(("load",), torch.arange(12.0).unsqueeze(1), (6, 3, 3))
        >>> series
        HourlySeries(load: train 6, validation 3, test 3 hours)
        >>> inputs, targets = series.windows("test", lookback=4, horizon=2)
        >>> inputs.shape, targets[0]
        (torch.Size([2, 1, 4]), tensor([[ 9., 10.]]))
    """

    names: tuple[str, ...]
    values: torch.Tensor  # (T, series)
    rows: tuple[int, int, int]

    def windows(self, part: str, *, lookback: int, horizon: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return every stretch of hours within a part to forecast, and the hours before each of them.

        What is forecast lies in the part alone. What is known before it may lie in the parts before, so all hours of
        validation and test are forecast; in training the first ``lookback`` hours are not.

        Args:
            part: ``"train"``, ``"validation"`` or ``"test"``.
            lookback: Hours that are known.
            horizon: Hours to forecast.

        Shape:
            - inputs: ``(N, series, lookback)``; targets: ``(N, series, horizon)``, views of ``values``. ``N`` is
              ``hours - horizon + 1``, in training ``hours - lookback - horizon + 1``.

        Raises:
            ValueError: If the part has another name, or ``lookback`` or ``horizon`` is below 1 or too long.
        """
        if part not in PARTS:
            raise ValueError(f"windows: part must be one of {', '.join(PARTS)}, got {part!r}.")
        index = PARTS.index(part)
        hours, end = self.rows[index], list(accumulate(self.rows))[index]
        if lookback < 1 or not 1 <= horizon <= min(hours, end - lookback):
            raise ValueError(
                f"windows: lookback and horizon must be at least 1, horizon at most the {hours} hours of the {part} "
                f"part and both together at most {end}, got {lookback} and {horizon}."
            )
        start = max(0, end - hours - lookback)
        whole = self.values[start:end].unfold(0, lookback + horizon, 1)  # (N, series, lookback + horizon)
        return whole[..., :lookback], whole[..., lookback:]

    def __repr__(self) -> str:
        hours = ", ".join(f"{part} {rows}" for part, rows in zip(PARTS, self.rows, strict=True))
        return f"HourlySeries({', '.join(self.names)}: {hours} hours)"


def load_etth1(
    directory: str | os.PathLike[str] | None = None, *, download: bool = True, _source: CsvSource = ETTH1
) -> HourlySeries:
    """Load ETTh1: six loads and the oil temperature of a transformer, in months of 30 days split into 12 / 4 / 4.

    Each series is standardised by mean and standard deviation of its training part. The hours after the twenty months
    are left out, as in the literature.

    The file ``ETTh1.csv`` is looked for in this order, each time in the folder itself and in its subfolders ``etth1``,
    ``ett`` and ``ETT-small``: ``directory``, and nowhere else when it is given; the folder that the environment
    variable ``DYNARANK_DATA_DIR`` names; the user's cache, ``$XDG_CACHE_HOME/dynarank/etth1`` or
    ``~/.cache/dynarank/etth1``. Otherwise it is downloaded into the cache. It is checked by SHA-256 in every load.

    Args:
        directory: Folder with the file, or None to search.
        download: Whether the public repository may be asked when no folder has the file.

    Shape:
        - values: ``(14400, 7)``, float32.

    Raises:
        ValueError: If ``directory`` lacks the file, or the file is damaged.
        RuntimeError: If no folder has the file and it cannot be downloaded.

    Example:
        >>> load_etth1("no-such-folder")
        Traceback (most recent call last):
        ValueError: load_etth1: directory 'no-such-folder' has no ETTh1.csv, ...

    Reference:
        H. Zhou et al., Informer: beyond efficient transformer for long sequence time-series forecasting, AAAI 2021,
        https://arxiv.org/abs/2012.07436; data of https://github.com/zhouhaoyi/ETDataset, CC BY-ND 4.0.
    """

    def check(contents: bytes, where: str) -> str:
        sha256 = hashlib.sha256(contents).hexdigest()
        if sha256 != _source.sha256:
            raise damaged(where, "SHA-256 of the contents", sha256, _source.sha256)
        return contents.decode()

    def fetch(cache: Path) -> None:
        download_file(_source.mirrors, cache / FILE, check=check)

    folder = locate(
        "etth1",
        directory,
        missing=lambda folder: "" if (folder / FILE).is_file() else FILE,
        fetch=fetch if download else None,
        subfolders=("etth1", "ett", "ETT-small"),
    )
    path = folder / FILE
    return _parse(check(path.read_bytes(), str(path)), _source.rows)


def _parse(text: str, rows: tuple[int, int, int]) -> HourlySeries:
    """Return the columns after the first, which is the time, each standardised."""
    head, *lines = (line.split(",")[1:] for line in text.splitlines()[: 1 + sum(rows)])
    values = torch.tensor([[float(value) for value in line] for line in lines], dtype=torch.float64)  # (T, series)
    train = values[: rows[0]]
    values = (values - train.mean(0)) / train.std(0, correction=0)
    return HourlySeries(tuple(head), values.float(), rows)
