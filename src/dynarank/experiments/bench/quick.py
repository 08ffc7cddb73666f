"""The quick benchmark: a few series at one rank each, beside the ratios that were found before."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from dynarank._files import replacing
from dynarank.experiments.bench.bench import News, Tell, describe_machine, line_up, measure_row, pinned
from dynarank.experiments.bench.config import AGAIN, DENSE, PLAIN, PLAIN_AGAIN, BenchConfig, find_case
from dynarank.experiments.bench.results import margins

COMMITTED = Path("experiments/results/bench/quick.json")
SLACK = 1.15  # a ratio may be worse by this factor, beyond what equal networks differ by
SECONDS = 5.0  # for each series, at most
SUBSET = (("tiny", "batch 32", "8"), ("layers", "512 x 512, 256 rows", "64"), ("layers", "1024 x 1024, 256 rows", "32"))


@final
@dataclass(frozen=True)
class Check:
    """A ratio beside the committed one.

    Args:
        name: Of what.
        ratio: What was found now.
        committed: What was found before, or None.
        limit: What it may be at most, or None.
    """

    name: str
    ratio: float
    committed: float | None
    limit: float | None

    @property
    def is_worse(self) -> bool:
        """Whether the ratio is beyond its limit."""
        return self.limit is not None and self.ratio > self.limit

    def __str__(self) -> str:
        if self.committed is None:
            return f"{self.name}: {self.ratio:.3f}, no committed figure"
        verdict = "WORSE" if self.is_worse else "ok"
        return f"{self.name}: {self.ratio:.3f}, committed {self.committed:.3f}, at most {self.limit:.3f}: {verdict}"


def check_quickly(config: BenchConfig, *, tell: Tell, committed: Path = COMMITTED) -> list[Check]:
    """Measure the subset and return every ratio beside the committed one.

    Raises:
        ValueError: There are no committed figures, or the cases are named, which are fixed here.
    """
    figures = read_figures(committed)
    rows = measure_quickly(config, tell=tell)
    return [check for row in rows for check in _checks(row, figures)]


def save_quickly(config: BenchConfig, *, tell: Tell, committed: Path = COMMITTED) -> dict[str, float]:
    """Measure the subset, write its ratios as the figures to compare with, and return them."""
    ratios = {name: ratio for row in measure_quickly(config, tell=tell) for name, ratio in _ratios(row).items()}
    rounded = {name: round(ratio, 4) for name, ratio in ratios.items()}
    text = json.dumps({"machine": describe_machine(config), "ratios": rounded}, indent=1) + "\n"
    with replacing(committed) as partial:
        partial.write_text(text, encoding="utf-8")
    return rounded


def measure_quickly(config: BenchConfig, *, tell: Tell) -> list[dict[str, Any]]:
    """Return the rows of the subset.

    Raises:
        ValueError: Cases are named.
    """
    if config.cases:
        raise ValueError(f"--quick has cases of its own, got {' '.join(config.cases)}. Leave them or --quick away.")
    _, integrators = line_up(replace(config, cases=tuple(dict.fromkeys(case for case, _, _ in SUBSET))))
    brief, rows = replace(config, seconds=min(config.seconds, SECONDS)), []
    with pinned(config.threads):
        for done, (case, name, rank) in enumerate(SUBSET):
            (series,) = [series for series in find_case(case).series() if series.name == name]
            few = [ranks for ranks in series.ranks if str(next(iter(ranks.values()))) == rank]
            tell(News(case, name, done, len(SUBSET)))
            rows.append(measure_row(brief, case, replace(series, ranks=few, inference=()), integrators))
    return rows


def read_figures(path: Path) -> dict[str, float]:
    """Return the committed ratios by name.

    Raises:
        ValueError: There are none.
    """
    if not path.exists():
        raise ValueError(
            f"there are no figures to compare with: {path} is missing. Run this in the root of the repository, or "
            "write them first with `dynarank bench --quick --save`."
        )
    return json.loads(path.read_text(encoding="utf-8"))["ratios"]


def _ratios(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: ratio for name, (ratio, _) in _with_margins(row).items()}


def _checks(row: Mapping[str, Any], figures: Mapping[str, float]) -> list[Check]:
    """Return the ratios of a series; a limit is the committed ratio, times the noise of now, times the slack."""
    checks = []
    for name, (ratio, margin) in _with_margins(row).items():
        committed = figures.get(name)
        limit = committed * margin * SLACK if committed is not None else None
        checks.append(Check(name, ratio, committed, limit))
    return checks


def _with_margins(row: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Return every ratio that is looked at, by name, with the factor that equal networks differ by."""
    noise, found = margins(row), {}
    for entry in row["entries"]:
        if "failed" in entry or entry["method"] in (DENSE, AGAIN, PLAIN_AGAIN):
            continue
        label = f"{row['case']}, {row['series']}, rank {entry['rank']}, {entry['method']}"
        found[f"{label}, beside dense"] = (entry["to_dense"]["median"], noise[""])
        if entry["method"] != PLAIN:
            found[f"{label}, beside plain"] = (entry["to_plain"]["median"], noise[entry["rank"]])
    return found
