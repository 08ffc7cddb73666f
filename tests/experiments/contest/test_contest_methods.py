"""Methods by name, by file, and dropped into a folder."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dynarank.integrators
from dynarank._discovery import discover
from dynarank.experiments import contestants
from dynarank.experiments.contest.config import ContestConfig
from dynarank.experiments.contest.contest import compare_methods
from dynarank.experiments.contest.methods import available, find_method
from dynarank.experiments.contest.run import train_step
from dynarank.experiments.contestants import Setting, Size
from dynarank.integrators.base import AbstractIntegrator
from dynarank.report.standings import Standing, Standings

Make = Callable[..., ContestConfig]
CONTESTANT = """
import torch
from dynarank.experiments.contestants import AbstractContestant


class Signs(AbstractContestant):
    '''The dense network, trained by the signs of its gradients.'''

    sized = False

    def lr(self, task):
        return 1e-3

    def network(self, task, setting):
        return task.model()

    def optimizers(self, task, model, setting):
        return [torch.optim.Rprop(model.parameters(), lr=setting.lr)]
"""

INTEGRATOR = """
from dynarank.integrators.plain_factors import PlainFactors
from dynarank.integrators.base import AbstractIntegrator


class Slow(AbstractIntegrator):
    '''Half a step of plain factors.'''

    keeps_gauge = False
    typical_lr = 0.3
    inner = PlainFactors()

    def init(self, point):
        return self.inner.init(point)

    def advance(self, point, gradient, state, *, lr, momentum, trusted):
        return self.inner.advance(point, gradient, state, lr=lr / 2, momentum=momentum, trusted=trusted)

    def transport(self, state, old, new):
        return self.inner.transport(state, old, new)

    def directions(self, state, point):
        return None
"""


def row_of(found: Standings, method: str) -> Standing:
    (row,) = (row for row in found.rows if row.method == method)
    return row


@pytest.fixture
def drop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Return a function that puts a file into a folder of methods; it is taken out again afterwards."""
    folder = tmp_path / "dropped"
    folder.mkdir()

    def put(text: str, name: str, package: Any = contestants) -> None:
        (folder / f"{name}.py").write_text(text)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
        monkeypatch.delitem(sys.modules, f"{package.__name__}.{name}", raising=False)
        discover.cache_clear()

    yield put
    monkeypatch.undo()
    discover.cache_clear()


def test_a_file_dropped_into_the_folder_takes_part(config: Make, tmp_path: Path, drop: Callable[..., None]):
    assert "signs" not in available()
    drop(CONTESTANT, "signs")
    assert available()["signs"] == "The dense network, trained by the signs of its gradients."
    found, _ = compare_methods(config("dense,signs"), tmp_path / "out")
    assert [row.method for row in found.rows] == ["dense", "signs"]
    assert len(row_of(found, "signs").scores) == 2
    assert row_of(found, "signs").tuning.keys() == {0.5e-3, 1e-3}


def test_an_integrator_dropped_into_its_folder_takes_part(config: Make, tmp_path: Path, drop: Callable[..., None]):
    drop(INTEGRATOR, "slow", dynarank.integrators)
    found, _ = compare_methods(config("slow"), tmp_path / "out")
    assert available()["slow"] == "Half a step of plain factors."
    assert row_of(found, "slow").ranks.keys() == {"0", "2"}
    assert row_of(found, "slow").tuning.keys() == {0.15, 0.3}


@pytest.mark.parametrize("text", [CONTESTANT, INTEGRATOR], ids=["contestant", "integrator"])
def test_a_file_anywhere_takes_part_by_its_path(
    config: Make, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text(text)
    found, _ = compare_methods(config(str(tmp_path / "mine.py"), factors=(1.0,)), tmp_path / "out")
    assert len(row_of(found, "mine").scores) == 2


@pytest.mark.parametrize("name", sorted(available()))
def test_every_method_that_is_listed_trains(config: Make, tmp_path: Path, name: str):
    found, _ = compare_methods(config(name, seeds=(0,), steps=6, factors=(0.01,)), tmp_path)
    (row,) = found.rows
    assert not row.failure
    assert row.scores.keys() == {0}
    assert row.step is not None
    assert row.memory is not None
    assert (row.parameters or 0) <= found.dense_parameters


def test_options_reach_the_method_and_its_optimizer(tiny: Any):
    method: Any = find_method("augmented_bug:coefficient_steps=3:weight_decay=0.1")
    assert (method.integrator.coefficient_steps, method.weight_decay) == (3, 0.1)
    task, setting = tiny(), Setting(0.07, 100, Size(fraction=0.5))
    (optimizer,) = method.optimizers(task, method.network(task, setting), setting)
    assert optimizer.param_groups[0]["lr"] == 0.07
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert optimizer.base.param_groups[0]["lr"] == task.adamw["lr"]
    assert optimizer.integrator.coefficient_steps == 3


def test_only_integrators_of_several_gradients_get_a_closure(tiny: Any):
    integrators: dict[str, Any] = discover("dynarank.integrators", AbstractIntegrator)
    for name, number in [("tangent_muon", 1), *((n, c.gradients) for n, c in integrators.items() if c.gradients > 1)]:
        task, setting, calls = tiny(), Setting(0.01, 100, Size(fraction=0.5)), []
        contestant = find_method(name)
        model = contestant.network(task, setting)
        model.register_forward_hook(lambda *given, calls=calls: calls.append(1))
        optimizers = contestant.optimizers(task, model, setting)
        batch = next(task.training_batches(0))
        expected = float(task.loss(model(batch[0]), batch).detach())
        calls.clear()
        loss = train_step(task, model, optimizers, batch)
        assert (len(calls), float(loss)) == (number, pytest.approx(expected))
