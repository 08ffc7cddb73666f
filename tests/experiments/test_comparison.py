"""The dense networks get a fair chance, and the sentences say what the numbers say."""

from collections.abc import Callable
from typing import Any

import pytest

from dynarank.experiments import Progress, TrainConfig, train
from dynarank.experiments.defaults import DEFAULTS
from dynarank.experiments.verdict import judge, noise
from dynarank.models import MLP

MakeConfig = Callable[..., TrainConfig]


def test_the_table_has_three_networks_of_the_sizes_it_states(tiny: MakeConfig):
    outcome = train(tiny(compare=True))
    own, dense, narrower = outcome["comparison"]
    assert [row["name"] for row in outcome["comparison"]] == ["low rank", "dense", "narrower dense"]
    assert own["test_accuracy"] == outcome["test_accuracy"]
    assert own["parameters"] == outcome["parameters"]
    assert dense["parameters"] == outcome["dense_parameters"]
    model = MLP(64, (16, 12), 10).narrower(outcome["parameters"])
    assert narrower["parameters"] == sum(p.numel() for p in model.parameters()) <= own["parameters"]
    for row in outcome["comparison"]:
        assert row["percent_of_dense"] == round(100 * row["parameters"] / outcome["dense_parameters"], 2)
        assert row["ms_per_step"] == pytest.approx(1000 * row["seconds"] / 36, abs=0.2)


def test_dense_networks_train_as_long_with_every_learning_rate_and_validation_chooses(tiny: MakeConfig):
    seen: list[Progress] = []
    outcome = train(tiny(compare=True), seen.append)
    ends = [p for p in seen if p.event == "epoch" and p.epoch == 4 and p.network != "low rank"]
    notes = [f"learning rate {lr:g}" for lr in DEFAULTS["digits"].dense_lrs]
    assert [(p.network, p.note) for p in ends] == [(n, note) for n in ("dense", "narrower dense") for note in notes]
    assert {p.step for p in ends} == {36}
    for row in outcome["comparison"][1:]:
        scores = {p.note: p.validation for p in ends if p.network == row["name"]}
        assert scores[f"learning rate {row['lr']:g}"] == max(scores.values())


def test_the_comparison_does_not_change_the_low_rank_network(tiny: MakeConfig, tmp_path: Any):
    with_it = train(tiny(compare=True, out=str(tmp_path / "a")))
    without = train(tiny(out=str(tmp_path / "b")))
    assert with_it["test_loss"] == without["test_loss"]
    assert with_it["ranks"] == without["ranks"]


def test_a_single_matrix_has_no_narrower_network(tmp_path: Any):
    outcome = train(TrainConfig("synthetic", planted_rank=2, epochs=2, out=str(tmp_path)))
    assert [row["name"] for row in outcome["comparison"]] == ["low rank", "dense"]
    assert all("test_loss" in row for row in outcome["comparison"])
    assert any("linear has no width" in sentence for sentence in outcome["verdict"])


def row(name: str, accuracy: float, ms_per_step: float = 1.0) -> dict[str, Any]:
    return {"name": name, "test_accuracy": accuracy, "ms_per_step": ms_per_step}


def test_a_narrower_network_that_wins_is_called_the_winner():
    (sentence,) = judge(row("low rank", 0.95), row("narrower dense", 0.99), samples=10_000)
    assert sentence == (
        "The narrower dense network is better than low rank by 4.00 points; "
        "on 10,000 test samples chance alone makes about 0.48."
    )


def test_low_rank_that_wins_is_told_with_the_same_reserve():
    (sentence,) = judge(row("low rank", 0.98), row("dense", 0.97), samples=300)
    assert sentence.startswith("Low rank is better than the dense network by 1.00 points; on 300 test samples chance")


def test_equal_accuracies_are_equal():
    assert judge(row("low rank", 0.9), row("dense", 0.9), samples=10) == [
        "The dense network and low rank are equally good."
    ]


def test_slower_steps_than_dense_are_told():
    _, sentence = judge(row("low rank", 0.9, 3.0), row("dense", 0.9, 1.5), samples=10)
    assert sentence == "At this size a step of low-rank training takes 2.0 times as long as a dense one."
    assert len(judge(row("low rank", 0.9, 1.6), row("dense", 0.9, 1.5), samples=10)) == 1
    assert len(judge(row("low rank", 0.9, 9.0), row("narrower dense", 0.9, 1.0), samples=10)) == 1


def test_smaller_losses_are_better():
    (sentence,) = judge({"test_loss": 0.3}, {"name": "dense", "test_loss": 0.2}, samples=10)
    assert sentence == "The dense network is better than low rank: a test loss of 0.2 against 0.3."


def test_chance_shrinks_with_the_square_root_of_the_samples():
    assert noise(0.9, 100) == pytest.approx(10 * noise(0.9, 10_000))
    assert noise(1.0, 5) == 0
