"""A run from start to end: its outcome, its files, and what it leaves alone."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dynarank import checkpoint
from dynarank._discovery import discover
from dynarank.experiments import Progress, TrainConfig, train, training
from dynarank.experiments.defaults import complete
from dynarank.experiments.networks import factorise_
from dynarank.experiments.problem import Problem
from dynarank.factorize import deployed_parameters
from dynarank.history import History
from dynarank.integrators.base import AbstractIntegrator
from dynarank.layers.base import low_rank_layers
from dynarank.report import write_report

MakeConfig = Callable[..., TrainConfig]


def rebuilt(config: TrainConfig) -> tuple[Problem, torch.nn.Module]:
    """Return the problem of a configuration and its factorised network, before training."""
    problem = Problem.load(complete(config))
    model = problem.build()
    factorise_(model, problem.config)
    return problem, model


def test_the_outcome_describes_the_saved_network(tiny: MakeConfig, tmp_path: Path):
    config = tiny(start_rank=3)
    outcome = train(config)
    problem, model = rebuilt(config)
    checkpoint.load_model(tmp_path / "run" / "model", model)
    test = problem.evaluate(model, "test")
    assert outcome["test_accuracy"] == test.accuracy
    assert outcome["test_loss"] == test.loss
    assert outcome["ranks"] == {name: layer.rank for name, layer in low_rank_layers(model).items()}
    assert outcome["parameters"] == deployed_parameters(model) <= 0.5 * outcome["dense_parameters"]
    assert outcome["removed"] == 1 - outcome["parameters"] / outcome["dense_parameters"]
    assert outcome["first_ranks"] == {"fc1": 3, "fc2": 3}
    assert outcome["full_ranks"] == {"fc1": 16, "fc2": 12}
    assert list(outcome["kept_dense"]) == ["head"]
    assert (outcome["steps"], outcome["seed"], outcome["comparison"]) == (36, 0, None)
    assert outcome["loss"] < 2.3


def test_no_candidates_are_left_even_if_ranks_freeze_with_the_last_step(tiny: MakeConfig, tmp_path: Path):
    config = tiny(freeze=1.0)
    outcome = train(config)
    _, model = rebuilt(config)
    checkpoint.load_model(tmp_path / "run" / "model", model)
    assert all(layer.capacity == outcome["ranks"][name] for name, layer in low_rank_layers(model).items())


def test_the_history_tells_the_whole_run(tiny: MakeConfig, tmp_path: Path):
    outcome = train(tiny())
    history = History.read(tmp_path / "run" / "history.jsonl")
    steps = [step for step, _ in history.series("validation_accuracy")]
    assert steps == [9, 18, 27, 36]
    for name in ("accuracy", "validation_loss", "seconds", "flops_per_sample", "weight_bytes", "gradient_bytes"):
        assert [step for step, _ in history.series(name)] == steps
    assert [step for step, _ in history.series("loss")] == list(range(1, 37))
    assert sorted({event.step for event in history.events}) == [4, 8, 12, 16, 18]
    assert {name: ranks[-1][1] for name, ranks in history.ranks().items()} == outcome["ranks"]
    assert {name: ranks[0] for name, ranks in history.ranks().items()} == {"fc1": (0, 2), "fc2": (0, 2)}
    assert history.series("deployed_parameters")[-1] == (36, outcome["parameters"])
    assert history.series("trainable_parameters")[-1][1] >= outcome["parameters"]
    assert {spectra[0][0] for spectra in history.spectra().values()} == {0}
    assert [len(spectra[-1][1]) for spectra in history.spectra().values()] == list(outcome["ranks"].values())
    assert "dynarank train --model mlp --hidden 16 12 --rank-policy budget --budget 0.5" in history.run["command"]
    assert str(tmp_path) not in (tmp_path / "run" / "history.jsonl").read_text()
    assert history.summary is not None
    assert history.summary["test_accuracy"] == outcome["test_accuracy"]
    json.dumps(outcome, allow_nan=False)


@pytest.mark.parametrize("start", [{}, {"start": "dense", "warmup_steps": 10}])
def test_all_weights_are_looked_at_while_they_train(tiny: MakeConfig, tmp_path: Path, start: dict[str, Any]):
    outcome = train(tiny(**start))
    looks = History.read(tmp_path / "run" / "history.jsonl").looks
    assert len(looks) == 21 and (looks[0]["step"], looks[-1]["step"]) == (0, 36)
    assert all(list(look["layers"]) == ["fc1", "fc2", "head"] for look in looks)
    assert all(found["stability"] is not None for look in looks[1:] for found in look["layers"].values())
    assert all(looks[-1]["layers"][name]["rank"] <= rank for name, rank in outcome["ranks"].items())
    assert looks[0]["layers"]["fc1"]["rank"] == (16 if start else 2)
    assert looks[0]["lr"] > 0


def test_optimizer_state_of_the_low_rank_network_is_smaller_than_it_was_at_the_peak(tiny: MakeConfig, tmp_path: Path):
    train(tiny(every=3))
    trained = History.read(tmp_path / "run" / "history.jsonl").series("trainable_parameters")
    assert max(value for _, value in trained) > trained[-1][1]


def test_a_planted_rank_is_found(tmp_path: Path):
    outcome = train(TrainConfig("synthetic", planted_rank=5, epochs=12, compare=False, out=str(tmp_path)))
    assert outcome["ranks"] == {"fc": 5}
    assert outcome["test_accuracy"] is None
    assert outcome["test_loss"] == pytest.approx(0.01, rel=0.05)
    assert outcome["planted_rank"] == 5


def test_a_dense_start_warms_up_factorises_at_full_rank_and_shrinks(tiny: MakeConfig, tmp_path: Path):
    seen: list[Progress] = []
    outcome = train(tiny(start="dense", warmup_steps=10), seen.append)
    assert [p.step for p in seen if p.note == "dense warm-up"] == list(range(1, 11))
    assert all(not p.ranks for p in seen if p.step <= 10)
    history = History.read(tmp_path / "run" / "history.jsonl")
    assert {name: ranks[0] for name, ranks in history.ranks().items()} == {"fc1": (0, 16), "fc2": (0, 12)}
    assert sorted({event.step for event in history.events}) == [10, 14, 18]
    assert outcome["parameters"] <= 0.5 * outcome["dense_parameters"]
    deployed = dict(history.series("deployed_parameters"))
    assert (deployed[0], deployed[36]) == (outcome["dense_parameters"], outcome["parameters"])


def test_oialr_trains_the_dense_network_and_then_cores_whose_ranks_fall(tiny: MakeConfig, tmp_path: Path):
    seen: list[Progress] = []
    outcome = train(tiny(method="oialr", warmup_steps=10), seen.append)
    assert all(not p.ranks for p in seen if p.step < 10)
    history = History.read(tmp_path / "run" / "history.jsonl")
    assert min(event.step for event in history.events) >= 10
    assert all(event.new_rank < event.old_rank for event in history.events)
    assert outcome["ranks"].keys() == {"fc1", "fc2"}
    assert outcome["parameters"] <= 0.5 * outcome["dense_parameters"]
    assert outcome["loss"] < 2.4


@pytest.mark.parametrize("integrator", sorted(discover("dynarank.integrators", AbstractIntegrator)))
def test_every_integrator_takes_part(tiny: MakeConfig, integrator: str):
    outcome = train(tiny(integrator=integrator, lr=0.1, epochs=3))
    assert outcome["parameters"] <= 0.5 * outcome["dense_parameters"]
    assert outcome["loss"] < 2.4


def test_the_head_is_factorised_on_request(tiny: MakeConfig):
    outcome = train(tiny(include_head=True, epochs=3))
    assert "head" in outcome["ranks"]
    assert outcome["kept_dense"] == {}


def test_two_equal_runs_are_equal(tiny: MakeConfig, tmp_path: Path):
    outcomes = [train(tiny(out=str(tmp_path / name))) for name in "ab"]
    for outcome in outcomes:
        del outcome["seconds"], outcome["out"], outcome["report"]
    assert outcomes[0] == outcomes[1]
    assert train(tiny(out=str(tmp_path / "c"), seed=1))["loss"] != outcomes[0]["loss"]


def test_global_generators_and_threads_are_left_alone(tiny: MakeConfig):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    train(tiny(threads=threads + 1, epochs=3))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_progress_is_told(tiny: MakeConfig):
    seen: list[Progress] = []
    outcome = train(tiny(), seen.append)
    ends = [p for p in seen if p.event == "epoch"]
    assert [(p.step, p.epoch) for p in ends] == [(9, 1), (18, 2), (27, 3), (36, 4)]
    assert {(p.network, p.steps, p.epochs, p.measure) for p in seen} == {("low rank", 36, 4, "accuracy")}
    assert (ends[-1].ranks, ends[-1].parameters) == (outcome["ranks"], outcome["parameters"])
    assert ends[-1].validation == outcome["validation_accuracy"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"integrator": "bug"}, "unknown integrator 'bug'"),
        ({"integrator": "bug", "start": "dense", "warmup_steps": 5}, "unknown integrator 'bug'"),
        ({"rank_policy": "noise_edge"}, "takes no budget"),
        ({"budget": 0.2}, "Budget: .* leave .* for the factors"),
        ({"every": 18}, "every must be below the 18 steps in which ranks may change, got 18"),
        ({"start": "dense"}, "freeze = 0.5 ends rank changes at step 18 of 36, but they begin only after step 100"),
        ({"batch_size": 5000}, "batch_size must be at most the number of samples"),
        ({"model": "lenet5", "hidden": None}, "image must be at least 16, got 8"),
        ({"device": "cuda:99"}, "device must be"),
        ({"start_rank": 40}, "rank 40 is above"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    tiny: MakeConfig, tmp_path: Path, changes: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        train(tiny(**changes))
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_run_is_refused(tiny: MakeConfig, tmp_path: Path):
    train(tiny(epochs=3))
    before = (tmp_path / "run" / "history.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"already holds a run. Go on with it by --resume"):
        train(tiny(epochs=3))
    assert (tmp_path / "run" / "history.jsonl").read_bytes() == before


def test_a_file_in_place_of_the_folder_is_refused(tiny: MakeConfig, tmp_path: Path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ValueError, match="out must be a folder, got the file"):
        train(tiny())


def test_runs_without_a_folder_are_numbered(tiny: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "digits-mlp-7").mkdir(parents=True)
    (tmp_path / "runs" / "digits-mlp-old").mkdir()
    assert train(tiny(out=None, epochs=3))["out"] == str(Path("runs", "digits-mlp-8"))
    assert train(tiny(out=None, epochs=3))["out"] == str(Path("runs", "digits-mlp-9"))


def test_the_report_is_written(tiny: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training, "write_report", write_report)
    report = train(tiny(epochs=3))["report"]
    assert report == str(tmp_path / "run" / "report.html")
    assert "mlp on digits" in Path(report).read_text()


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (ImportError('this needs matplotlib. Run: pip install "dynarank[viz]"'), 'pip install "dynarank[viz]"'),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_a_report_that_cannot_be_written_is_a_warning(
    tiny: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    failure: Exception,
    reason: str,
):
    def fail(folder: Path) -> Path:
        raise failure

    monkeypatch.setattr(training, "write_report", fail)
    with caplog.at_level(logging.WARNING):
        assert train(tiny(epochs=3))["report"] is None
    assert reason in caplog.text
