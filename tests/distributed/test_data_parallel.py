"""A user's own DistributedDataParallel loop, on two real processes, beside the same loop on one."""

from pathlib import Path
from typing import Any

import pytest
import torch

EXACT = {"atol": 1e-10, "rtol": 1e-10}
ROUNDED = {"atol": 1e-5, "rtol": 1e-4}
INTEGRATORS = ("gauge_fixed_muon", "tangent_muon", "tangent_heavy_ball", "plain_factors", "augmented_bug")
slow = pytest.mark.slow


def check_copies(results: list[dict[str, Any]]) -> None:
    """All processes hold the same bits after every step."""
    first, *others = results
    for other in others:
        assert other["ranks"] == first["ranks"] and other["events"] == first["events"]
        for mine, theirs in zip(first["trace"], other["trace"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def check_equal(
    pair: Any, scenarios: Any, *, tolerance: Any = EXACT, ddp: Any = None, **options: Any
) -> dict[str, Any]:
    """Two processes repeat what one does with the global batch."""
    results = pair.run("train", ddp=ddp, **options)
    check_copies(results)
    alone = scenarios.train(**options)
    assert results[0]["ranks"] == alone["ranks"] and results[0]["steps"] == alone["steps"]
    for mine, expected in zip(results[0]["weights"], alone["weights"], strict=True):
        torch.testing.assert_close(mine, expected, **tolerance)
    return results[0]


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_two_processes_repeat_one_through_growth_and_truncation(pair: Any, scenarios: Any, integrator: str):
    result = check_equal(pair, scenarios, integrator=integrator, freeze=integrator == "augmented_bug")
    ranks = [ranks[0] for ranks in result["ranks"]]
    assert len(set(ranks)) >= 3, "the script grows and truncates"
    assert result["layers"] == ["0", "2"], "no module. in the names"
    assert not any("stays for now" in reason for *_, reason in result["events"])


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_in_float32_they_agree_to_rounding(pair: Any, scenarios: Any, integrator: str):
    options = {"integrator": integrator, "dtype": torch.float32, "steps": 16}
    result = check_equal(pair, scenarios, tolerance=ROUNDED, **options)
    assert not result["heard"]


@pytest.mark.parametrize("options", [{}, {"rank_multiple": 8}], ids=["exact", "spare"])
def test_convolutions_in_tucker_form_repeat_too(pair: Any, scenarios: Any, options: dict[str, Any]):
    result = check_equal(pair, scenarios, tucker=True, integrator="tangent_heavy_ball", **options)
    assert len({tuple(ranks[:2]) for ranks in result["ranks"]}) >= 3, "both modes of the tensor change"
    assert {layer for _, layer, *_ in result["events"]} == {"1[out]", "1[in]"}
    assert not any("stays for now" in reason for *_, reason in result["events"])


def test_a_spare_capacity_needs_no_rebuilding(pair: Any, scenarios: Any):
    result = check_equal(pair, scenarios, rank_multiple=8)
    assert result["capacities"] == [8, 8]


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_as_bucket_view": True},
        {"find_unused_parameters": True},
        {"static_graph": True},
        pytest.param({"find_unused_parameters": True, "gradient_as_bucket_view": True}, marks=slow),
        pytest.param({"static_graph": True, "gradient_as_bucket_view": True}, marks=slow),
        pytest.param({"bucket_cap_mb": 0.0005}, marks=slow),
    ],
    ids=str,
)
def test_the_options_of_the_wrapper_survive_rebuilding(pair: Any, scenarios: Any, options: dict[str, Any]):
    unused = "find_unused_parameters" in options or "static_graph" in options
    check_equal(pair, scenarios, ddp=options, unused=unused)


@slow
@pytest.mark.filterwarnings("ignore:`broadcast_buffers`:FutureWarning")
@pytest.mark.parametrize("integrator", ["gauge_fixed_muon", "tangent_muon", "augmented_bug"])
def test_buffers_need_not_be_broadcast(pair: Any, scenarios: Any, integrator: str):
    check_equal(pair, scenarios, integrator=integrator, ddp={"broadcast_buffers": False})


@pytest.mark.parametrize(
    ("integrator", "ddp"),
    [
        ("augmented_bug", {"find_unused_parameters": True}),
        ("augmented_bug", {"static_graph": True}),
        pytest.param("augmented_bug", {"gradient_as_bucket_view": True}, marks=slow),
    ],
    ids=str,
)
def test_a_change_of_form_rebuilds_too(pair: Any, scenarios: Any, integrator: str, ddp: dict[str, Any]):
    unused = "gradient_as_bucket_view" not in ddp
    check_equal(pair, scenarios, integrator=integrator, ddp=ddp, unused=unused)


def test_a_communication_hook_stays(pair: Any):
    results = pair.run("hooked")
    check_copies(results)
    assert results[0]["calls"] == 2 * results[0]["before"] > 0


def test_unequal_plans_follow_process_0(pair: Any, scenarios: Any):
    first, second = pair.run("train", unequal=True)
    assert first["ranks"] == second["ranks"] == scenarios.train()["ranks"]
    assert {reason for *_, reason in first["events"]} == {"as told"}
    assert {reason for *_, reason in second["events"]} == {"as on process 0"}


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_one_process_alone_overflows(pair: Any, scenarios: Any, micro_batches: int):
    options = {"scaler": True, "clip": 0.5, "overflow": 7, "micro_batches": micro_batches}
    result = check_equal(pair, scenarios, **options)
    assert result["steps"] == 21 and result["scale"] == 512.0


@slow
@pytest.mark.parametrize("ddp", [{"gradient_as_bucket_view": True}, {"find_unused_parameters": True}], ids=str)
@pytest.mark.parametrize("overflow", [4, 5, 9])
def test_an_overflow_beside_a_rank_event(pair: Any, scenarios: Any, overflow: int, ddp: dict[str, Any]):
    unused = "find_unused_parameters" in ddp
    check_equal(pair, scenarios, ddp=ddp, unused=unused, scaler=True, overflow=overflow, micro_batches=2)


@pytest.mark.parametrize(
    "options",
    [
        {"micro_batches": 2, "one_cycle": 30},
        pytest.param({"clip": 0.3}, marks=slow),
        pytest.param({"clip": 0.3, "micro_batches": 4, "integrator": "augmented_bug"}, marks=slow),
        pytest.param({"one_cycle": 30, "integrator": "tangent_heavy_ball"}, marks=slow),
    ],
    ids=str,
)
def test_clipping_accumulation_and_schedulers(pair: Any, scenarios: Any, options: dict[str, Any]):
    check_equal(pair, scenarios, **options)


def test_an_output_kept_on_one_process_postpones_the_change_on_all(pair: Any):
    first, second = pair.run("train", keep=4, steps=8)
    check_copies([first, second])
    reasons = {reason for step, *_, reason in first["events"] if step == 5}
    assert len(reasons) == 1 and "was kept and not run backward on process 0" in reasons.pop()
    assert first["ranks"][5] == [3, 3], "there was no room for candidates"


def test_a_bare_model_gets_postponed_events_and_the_hint(pair: Any):
    results = pair.run("train", wrapped=False, every=4, steps=30)
    check_copies(results)
    reasons = [reason for *_, reason in results[0]["events"]]
    assert all("pass the DistributedDataParallel wrapper to LowRankOptimizer" in reason for reason in reasons[:2])
    assert any("pass the DistributedDataParallel wrapper" in text for text in results[0]["heard"])
    assert results[0]["capacities"] == [3, 3]


def test_a_wrapper_may_be_told_later(pair: Any, scenarios: Any):
    check_equal(pair, scenarios, wrapped="later")


def test_process_0_may_look_at_the_model_alone(pair: Any, scenarios: Any):
    check_equal(pair, scenarios, peek=True, steps=13)


def test_half_precision_stays_equal(pair: Any):
    results = pair.run("train", dtype=torch.bfloat16)
    check_copies(results)
    assert not results[0]["heard"]


def test_a_bare_model_cannot_change_its_form(pair: Any):
    answers = pair.run("train", wrapped=False, integrator="augmented_bug", fails=True)
    assert all("pass the DistributedDataParallel wrapper to LowRankOptimizer" in text for text in answers)


@pytest.mark.parametrize(
    ("integrator", "broadcast"),
    [("tangent_muon", False), ("tangent_muon", True), pytest.param("augmented_bug", True, marks=slow)],
)
def test_a_resumed_run_repeats_the_uninterrupted_one(pair: Any, tmp_path: Path, integrator: str, broadcast: bool):
    results = pair.run("resume", folder=str(tmp_path), integrator=integrator, broadcast=broadcast)
    for result in results:
        for resumed, whole, first in zip(result["resumed"], result["whole"], results[0]["whole"], strict=True):
            assert torch.equal(resumed, whole) and torch.equal(whole, first)
