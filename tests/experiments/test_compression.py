"""The proof from Python: its rows, its numbers, and the batches that times are measured on."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dynarank.experiments.compress_config import CompressConfig
from dynarank.experiments.compression import Stage, compare, prove
from dynarank.experiments.costs import Costs
from dynarank.experiments.proof import Proof, Row
from dynarank.experiments.result_folder import new_folder, save_proof
from dynarank.experiments.subject import Subject, batch_size, sized_batch
from dynarank.export import load_compressed
from dynarank.factorize import deployed_parameters
from dynarank.layers.base import low_rank_layers
from dynarank.measure import Timing, flops, stored_bytes
from dynarank.models import MLP

TEACHER = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))


def batches(seed: int) -> Iterator[Any]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        inputs = torch.randn(32, 20, generator=generator)
        yield inputs, (inputs @ TEACHER).argmax(1)


def loss(outputs: Any, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs, batch[1])


def score(model: nn.Module) -> float:
    inputs, targets = next(batches(99))
    return float((model(inputs).argmax(1) == targets).float().mean())


@pytest.fixture
def subject() -> Subject:
    return Subject(
        "toy",
        model=lambda: MLP(20, [30, 30], 3),
        evaluate=score,
        training_batches=batches,
        loss=loss,
        narrower=lambda parameters: MLP(20, [30, 30], 3).narrower(parameters),
    )


def quick(**options: Any) -> CompressConfig:
    return CompressConfig(**{"budget": 0.5, "batch_sizes": (2, 6), "seconds": 0.0, **options})


def test_rows_say_what_the_networks_are(subject: Subject):
    dense = subject.model()
    proof = prove(replace(subject, model=lambda: dense), quick())
    given, after = proof.rows
    example = next(batches(0))
    assert given.costs.parameters == deployed_parameters(dense)
    assert given.costs.bytes == stored_bytes(dense)
    assert given.costs.flops == flops(dense, sized_batch(example, 2))
    assert given.scores == {"accuracy": score(dense)}
    assert after.costs.parameters == deployed_parameters(proof.model)
    assert after.scores == {"accuracy": score(proof.model)}
    assert given.costs.latency.keys() == after.costs.latency.keys() == {2, 6}
    assert (given.costs.memory or 0) > (after.costs.memory or 0) > 0


def test_the_network_as_given_is_left_as_it_was(subject: Subject):
    dense = subject.model()
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    prove(replace(subject, model=lambda: dense), quick(recover=3, distil=True))
    assert not low_rank_layers(dense)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


def test_recovery_and_student_take_the_same_steps(subject: Subject):
    told: list[Stage] = []
    state = torch.get_rng_state()
    proof = prove(subject, quick(recover=100, distil=True, student=True), tell=told.append)
    assert not torch.equal(torch.get_rng_state(), state)  # the model was drawn from it, the student was not
    trained = [(stage.name, stage.step) for stage in told if stage.steps]
    assert trained == [("recovery", 50), ("recovery", 100), ("narrower dense", 50), ("narrower dense", 100)]
    assert proof.recovery is not None
    assert proof.recovery.last_loss < proof.recovery.first_loss
    recovered, student = proof.rows[2:]
    assert student.costs.parameters <= recovered.costs.parameters
    assert proof.rows[1].costs is recovered.costs  # the shapes are the same
    assert "trained and distilled for 100 steps" in proof.notes[-1]


def test_distillation_needs_no_loss(subject: Subject):
    proof = prove(replace(subject, loss=None), quick(recover=2, distil=True))
    assert [row.name for row in proof.rows][-1] == "after recovery"


def test_only_the_cores_are_trained(subject: Subject):
    proof = prove(subject, quick(recover=2, only=("core",)))
    assert proof.recovery is not None
    squares = sum(layer.rank**2 for layer in low_rank_layers(proof.model).values())
    assert proof.recovery.trained == squares + 30 + 30 + 3


def test_a_tolerance_is_judged_on_other_data(subject: Subject):
    seen = []
    proof = prove(
        replace(subject, validate=lambda model: seen.append(deployed_parameters(model)) or 1.0),
        quick(budget=None, tolerate=0.1),
    )
    assert len(seen) == len(proof.trials) > 2
    assert proof.rows[1].costs.parameters == min(seen)


def test_what_is_missing_is_noted(subject: Subject):
    proof = prove(Subject("bare", model=subject.model), quick())
    assert [note.partition(":")[0] for note in proof.notes] == [
        "No score",
        "Truncated by the weights alone",
        "No time, FLOPs or memory",
    ]
    assert proof.rows[0].costs.latency == {}
    shown = prove(Subject("bare", model=subject.model, example_batch=torch.zeros(1, 20)), quick())
    assert shown.rows[0].costs.latency.keys() == {2, 6}
    assert proof.table()[0] == ("network", "parameters", "of given", "bytes")


@pytest.mark.parametrize(
    ("lacking", "options", "message"),
    [
        ("training_batches", {"recover": 5}, r"recover needs training_batches\(seed\), which toy does not define."),
        ("loss", {"recover": 5}, r"recover without distil needs loss\(outputs, batch\)"),
        ("narrower", {"recover": 5, "student": True}, r"student needs narrower\(parameters\)"),
        ("evaluate", {"budget": None, "tolerate": 0.1}, r"tolerate needs evaluate\(model\)"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything(
    subject: Subject, lacking: str, options: dict[str, Any], message: str
):
    def never() -> nn.Module:
        raise AssertionError

    with pytest.raises(ValueError, match=message):
        prove(replace(subject, model=never, **{lacking: None}), quick(**options))


def test_a_result_is_loaded_as_it_was_saved(subject: Subject, tmp_path: Path):
    proof = prove(subject, quick(batch_sizes=()))
    with new_folder(str(tmp_path / "out"), name="x") as folder:
        save_proof(folder, proof)
    loaded = load_compressed(folder, subject.model())
    x = torch.randn(4, 20)
    assert torch.equal(loaded.eval()(x), proof.model(x))
    assert compare(subject, loaded, batch_sizes=()).rows[1].scores == proof.rows[1].scores
    assert json.loads((folder / "report.json").read_text()) == proof.as_dict()
    with pytest.raises(ValueError, match="must be a new or an empty folder"), new_folder(str(folder), name="x"):
        pass


def test_a_folder_is_removed_where_nothing_came_into_it(tmp_path: Path):
    with pytest.raises(RuntimeError), new_folder(str(tmp_path / "deep" / "out"), name="x"):
        raise RuntimeError
    assert not (tmp_path / "deep" / "out").exists()


# --- batches -----------------------------------------------------------------------------------------------------


def test_batches_are_cut_and_repeated_in_the_order_of_their_memory():
    images = torch.randn(3, 4, 5, 5).to(memory_format=torch.channels_last)
    for size in (1, 2, 3, 7):
        sized = sized_batch(images, size)
        assert torch.equal(sized, images[torch.arange(size) % 3])
        assert sized.is_contiguous(memory_format=torch.channels_last)


def test_only_what_has_a_row_for_every_sample_is_resized():
    batch = {"ids": torch.ones(4, 6), "mask": torch.ones(6, 6), "scale": torch.tensor(2.0), "name": "x", "y": [1, 2]}
    sized = sized_batch(batch, 2)
    assert (sized["ids"].shape, sized["mask"].shape, sized["name"], sized["y"]) == ((2, 6), (6, 6), "x", [1, 2])
    assert sized["scale"] is batch["scale"]


def test_a_batch_without_tensors_has_no_size():
    with pytest.raises(ValueError, match="a batch must hold a tensor"):
        batch_size(["a", 3])


# --- what is shown -----------------------------------------------------------------------------------------------


def rows(before: float, after: float) -> tuple[Row, ...]:
    times = (Timing(t, 0.9 * t, 1.1 * t, 5) for t in (before, after))
    return tuple(
        Row(name, {"accuracy": 0.9}, Costs(1000, 4000, 2000, 8000, {1: time}))
        for name, time in zip(("as given", "after truncation"), times, strict=True)
    )


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (2e-3, 1e-3, "Batch size 1: 2.00 times as fast as given."),
        (1e-3, 2e-3, "Batch size 1: takes 2.00 times as long as given."),
        (1e-3, 1.1e-3, "Batch size 1: no difference in time that stands out of its scatter."),
    ],
)
def test_the_verdict_is_of_the_measured_times(before: float, after: float, said: str):
    proof = Proof("x", "accuracy", True, rows(before, after), nn.Identity(), notes=("A note.",))
    assert proof.verdict() == [said, "A note."]
    assert proof.markdown().splitlines()[2:6] == [
        "| network | accuracy | parameters | of given | bytes | FLOPs at 1 | time at 1 | memory at 1 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        f"| as given | 90.00 % | 1,000 | 100.0 % | 4 kB | 2 k | {1e3 * before:.3g} ms ± 10 % | 8 kB |",
        f"| after truncation | 90.00 % | 1,000 | 100.0 % | 4 kB | 2 k | {1e3 * after:.3g} ms ± 10 % | 8 kB |",
    ]
