"""Learning rates, the place in the run, and the numbers of an epoch."""

import pytest
import torch

from dynarank.experiments import TrainConfig
from dynarank.experiments.defaults import complete
from dynarank.experiments.loop import Loop, Trainee, learning_rate, make_batches, scheduled
from dynarank.experiments.moments import Moments
from dynarank.experiments.problem import Problem, Quality
from dynarank.experiments.processes import Processes

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.mark.parametrize(("steps", "rise"), [(5000, 100), (300, 30), (10, 1), (1, 1)])
def test_the_learning_rate_rises_for_100_steps_or_a_tenth_of_the_run_and_falls_to_zero(steps: int, rise: int):
    rates = [learning_rate(step, steps=steps) for step in range(steps + 1)]
    assert rates[:rise] == [(step + 1) / rise for step in range(rise)]
    assert all(before >= after for before, after in zip(rates[rise:], rates[rise + 1 :], strict=False))
    assert rates[-1] == pytest.approx(0.0, abs=1e-12) or steps == 1


def test_an_optimizer_that_takes_over_goes_on_with_the_learning_rate():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    scheduler = scheduled(optimizer, steps=50, offset=20)
    assert scheduler.get_last_lr() == [2.0 * learning_rate(20, steps=50)]
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [2.0 * learning_rate(21, steps=50)]


def test_a_rank_policy_that_keeps_ranks_needs_no_event():
    config = complete(TrainConfig(rank_policy="fixed", epochs=1))
    assert Moments.of(config, per_epoch=10).freeze == 5


def test_moments_spread_evenly_and_include_the_last_step():
    moments = Moments(steps=103, per_epoch=10, offset=0, freeze=50)
    chosen = [step for step in range(1, 104) if moments.among(step, number=10)]
    assert chosen == [*range(10, 101, 10), 103]


def test_the_accuracy_of_an_epoch_is_that_of_its_batches():
    problem = Problem.load(complete(TrainConfig(hidden=(8,), batch_size=512)))
    loop = Loop(problem, ALONE, make_batches(problem, ALONE))
    model = problem.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainee = Trainee(model, model, optimizer, scheduled(optimizer, steps=4))
    batches = make_batches(problem, ALONE)
    correct = 0
    for _ in range(2):
        loop.take_step(trainee)
        inputs, targets = batches.next_batch()
        correct += int((model(inputs).argmax(1) == targets).sum())
    assert loop.end_epoch() == correct / 1024
    assert loop.loss() == pytest.approx(problem.loss(model(inputs), targets).item())
    loop.take_step(trainee)
    assert loop.end_epoch() is not None
    assert loop.seconds > 0


def test_evaluation_is_the_mean_over_all_samples(monkeypatch: pytest.MonkeyPatch):
    problem = Problem.load(complete(TrainConfig(hidden=(8,))))
    model = problem.build()
    inputs, targets = problem.splits.part("test")
    whole = problem.evaluate(model, "test")
    monkeypatch.setattr("dynarank.experiments.problem.EVALUATION_BATCH", 77)
    parts = problem.evaluate(model, "test")
    assert whole.loss == pytest.approx(problem.loss(model(inputs), targets).item())
    assert parts.loss == pytest.approx(whole.loss)
    assert parts.accuracy == whole.accuracy == int((model(inputs).argmax(1) == targets).sum()) / len(targets)
    assert model.training


def test_regression_has_a_loss_and_no_accuracy():
    problem = Problem.load(complete(TrainConfig("synthetic")))
    quality = problem.evaluate(problem.build(), "validation")
    assert quality.accuracy is None
    assert problem.measure == "loss"
    assert problem.score(quality) == quality.loss
    assert problem.better(0.1, 0.2)
    assert problem.better(0.1, float("nan"))
    assert not problem.better(float("nan"), 0.1)


def test_more_accuracy_is_better():
    problem = Problem.load(complete(TrainConfig()))
    assert problem.better(0.9, 0.8)
    assert problem.score(Quality(loss=3.0, accuracy=0.7)) == 0.7


def test_the_weights_depend_on_the_seed_alone():
    def weights(seed: int) -> torch.Tensor:
        problem = Problem.load(complete(TrainConfig(hidden=(8,), seed=seed)))
        torch.rand(seed + 3)
        return next(problem.build().parameters()).detach()

    assert torch.equal(weights(4), weights(4))
    assert not torch.equal(weights(4), weights(5))
