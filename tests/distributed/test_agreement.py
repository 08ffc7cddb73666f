"""What the processes agree on, and what they say when they do not."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dynarank import factors
from dynarank.distributed import Replicas, is_main_process, rebuilding, unwrap, world
from dynarank.distributed._equality import checksum, relative_distance
from dynarank.distributed._reducer import PRIVATE, check_wrapper
from dynarank.layers.linear import LowRankLinear
from dynarank.ranks.base import Decision


def test_one_process_agrees_with_itself():
    model = nn.Sequential(LowRankLinear(5, 4, rank=2))
    replicas = Replicas(model)
    plan = {"0": Decision(2, 0, "as is")}
    assert world() == 1 and is_main_process() and unwrap(model) == (model, None)
    assert replicas.agree(plan, step=1) == plan
    with rebuilding(None), replicas.resizing({"0": model[0]}) as refusal:
        assert refusal is None


def test_a_compiled_model_is_unwrapped():
    model = nn.Linear(2, 2)
    compiled = nn.Sequential()
    compiled._orig_mod = model
    assert unwrap(compiled) == (model, None)


def test_a_bare_model_is_no_wrapper():
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"must be a DistributedDataParallel, got Linear\."):
        Replicas(model).set_wrapper(model)  # type: ignore[arg-type]


def test_a_wrapper_around_one_process_is_rebuilt_too(scenarios: Any, tmp_path: Path):
    expected = scenarios.train()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        result = scenarios.train()
        replicas = Replicas(nn.Linear(2, 2))
        with pytest.raises(ValueError, match="another model"):
            replicas.set_wrapper(scenarios.DistributedDataParallel(nn.Linear(2, 2)))
    finally:
        dist.destroy_process_group()
    assert result["ranks"] == expected["ranks"] and result["layers"] == ["0", "2"]
    for mine, theirs in zip(result["weights"], expected["weights"], strict=True):
        assert torch.equal(mine, theirs)


def test_a_kept_graph_is_named_by_its_layer():
    model = nn.Sequential(nn.Linear(5, 5), LowRankLinear(5, 4, rank=2))
    kept = model(torch.ones(1, 5))
    with Replicas(model).resizing({"1": model[1]}) as refusal:
        assert refusal is not None and refusal.startswith("1: ") and "wrapper to LowRankOptimizer" not in refusal
    del kept


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_checksum_sees_one_entry_and_the_order(dtype: torch.dtype):
    tensor = torch.tensor([0, 1, 0, 1, 1]).to(dtype)
    other = tensor.clone()
    other[2] = 1
    assert checksum([tensor]) == checksum([tensor.clone()]) != checksum([other])
    assert checksum([tensor]) != checksum([tensor.flip(0)])
    assert checksum([tensor.reshape(5, 1).mT]) == checksum([tensor])
    assert checksum([torch.tensor(3)]) != checksum([torch.tensor(4)])


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_relative_distance_is_that_of_the_weights(shape: tuple[int, int]):
    one, other = (factors.from_dense(torch.randn(shape, dtype=torch.float64), rank=3) for _ in range(2))
    expected = (one.to_dense() - other.to_dense()).norm() / other.to_dense().norm()
    assert relative_distance(one, other) == pytest.approx(float(expected), rel=1e-12)
    assert relative_distance(factors.to_pair(one), other) == pytest.approx(float(expected), rel=1e-7)
    assert relative_distance(factors.to_pair(other), other) < 1e-7


@pytest.mark.parametrize("option", ["mixed_precision", "delay_all_reduce_named_params"])
def test_options_that_hold_on_to_parameters_are_refused(option: str):
    wrapper: Any = SimpleNamespace(**dict.fromkeys(PRIVATE), mixed_precision=None, _delay_all_reduce_params=[])
    check_wrapper(wrapper)
    setattr(wrapper, {"mixed_precision": option}.get(option, "_delay_all_reduce_params"), [object()])
    with pytest.raises(RuntimeError, match=option):
        check_wrapper(wrapper)


def test_the_private_parts_of_the_wrapper_are_there(pair: Any):
    """The canary: a torch that changes them must not be met in the middle of a run."""
    for result in pair.run("private_parts"):
        assert all(result["present"].values())
        assert result["counts"] == 1, "the reducer refers to all parameters equally often"
        assert "has no DistributedDataParallel._comm_hooks" in result["error"]


def test_ranks_and_forms_of_process_0_are_broadcast(pair: Any):
    first, second = pair.run("different_ranks")
    assert first["ranks"] == second["ranks"] == [3, 3]
    assert first["forms"] == second["forms"] == ["pair", "core"]
    assert all(torch.equal(a, b) for a, b in zip(first["bits"], second["bits"], strict=True))


def test_different_layers_are_named(pair: Any):
    assert all("[['2'], []]" in text and "Factorise the same model" in text for text in pair.run("different_layers"))


def test_independent_models_are_left_alone(pair: Any):
    first, second = pair.run("own_models")
    assert first["ranks"][-1] != second["ranks"][-1] == [3, 3]


def test_different_step_counts_are_told(pair: Any):
    assert all("different numbers of optimizer steps: [3, 4]" in text for text in pair.run("different_steps"))


def test_different_checkpoints_stop_the_run(pair: Any):
    assert all("which rounding does not explain" in text for text in pair.run("different_checkpoints"))


def test_different_rounding_is_repaired_and_told_once(pair: Any):
    first, second = pair.run("rounding")
    assert first["ranks"] == second["ranks"]
    for mine, theirs in zip(first["seen"], second["seen"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    (message,) = second["heard"]
    assert "round differently" in message and "at step 1:" in message


def test_copies_of_model_and_optimizer_talk_to_nobody(pair: Any):
    assert pair.run("copies") == [True, True]


def test_a_pending_backward_pass_forbids_a_change_of_form(pair: Any):
    assert all("a forward pass was kept and not run backward" in text for text in pair.run("pending_backward"))


@pytest.mark.slow
def test_a_process_alone_at_an_event_gets_a_message(impatient_pair: Any):
    first, second = impatient_pair.run("lone_step", fails=True)
    assert "no answer from the other processes" in first
    assert "Error" in second
