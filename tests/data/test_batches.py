"""Laws of Batches: every sample once per epoch, exact resume, process slices that add up."""

import itertools
from pathlib import Path

import pytest
import torch

from dynarank.data.batches import Batches

SAMPLES = 23


def make_batches(batch_size: int = 4, *, seed: int = 0, samples: int = SAMPLES, **options) -> Batches:
    targets = torch.arange(samples)
    inputs = torch.stack([targets.double(), -targets.double()], dim=1)
    return Batches(inputs, targets, batch_size, torch.Generator().manual_seed(seed), **options)


def take(batches: Batches, steps: int) -> list[list[int]]:
    return [batches.next_batch()[1].tolist() for _ in range(steps)]


@pytest.mark.parametrize(("drop_last", "steps"), [(True, 5), (False, 6)])
def test_an_epoch_hands_out_every_sample_at_most_once(drop_last: bool, steps: int):
    batches = make_batches(drop_last=drop_last)
    assert batches.steps_per_epoch == steps
    for epoch in range(3):
        rows = list(itertools.chain(*take(batches, steps)))
        assert batches.epoch == epoch
        assert len(set(rows)) == len(rows) == (20 if drop_last else SAMPLES)


def test_epochs_are_shuffled_differently():
    batches = make_batches()
    assert take(batches, 5) != take(batches, 5)


def test_inputs_and_targets_stay_together():
    for inputs, targets in itertools.islice(make_batches(), 12):
        torch.testing.assert_close(inputs[:, 0], targets.double(), atol=0, rtol=0)


def test_the_order_is_the_permutation_of_the_generator():
    expected = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(3))[:20]
    assert list(itertools.chain(*take(make_batches(seed=3), 5))) == expected.tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_same_batches():
    batches = make_batches()
    inputs, targets = batches.inputs.cuda(), batches.targets.cuda()
    on_gpu = Batches(inputs, targets, 4, torch.Generator().manual_seed(0))
    assert on_gpu.next_batch()[0].is_cuda
    take(batches, 1)
    on_gpu.load_state_dict(on_gpu.state_dict())
    assert take(on_gpu, 9) == take(batches, 9)


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    take(make_batches(), 7)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("stop", [0, 1, 3, 5, 6, 8])  # at the start, within, and at the end of an epoch
def test_a_resumed_run_is_the_uninterrupted_run(stop: int, drop_last: bool, tmp_path: Path):
    batches = make_batches(drop_last=drop_last)
    take(batches, stop)
    torch.save(batches.state_dict(), tmp_path / "state.pt")
    expected, epoch = take(batches, 13), batches.epoch

    resumed = make_batches(seed=99, drop_last=drop_last)
    take(resumed, 2)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert take(resumed, 13) == expected
    assert resumed.epoch == epoch


def test_a_state_is_a_copy():
    batches = make_batches()
    state = batches.state_dict()
    expected = take(batches, 9)
    for _ in range(2):
        batches.load_state_dict(state)
        assert take(batches, 9) == expected


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_process_slices_in_order_are_the_global_batch(processes: int):
    single = make_batches()
    each = [make_batches(process=process, processes=processes) for process in range(processes)]
    for _ in range(11):
        slices = [take(batches, 1)[0] for batches in each]
        assert {len(rows) for rows in slices} == {4 // processes}
        assert [list(itertools.chain(*slices))] == take(single, 1)


def test_a_state_serves_another_number_of_processes():
    single = make_batches()
    take(single, 3)
    pair = [make_batches(seed=7, process=process, processes=2) for process in range(2)]
    for batches in pair:
        batches.load_state_dict(single.state_dict())
    for _ in range(6):
        assert [take(pair[0], 1)[0] + take(pair[1], 1)[0]] == take(single, 1)


def test_a_state_of_other_data_changes_nothing():
    batches = make_batches()
    expected = take(make_batches(), 5)
    with pytest.raises(ValueError, match="taken with 24 samples and batch size 4, but this run has 23 and 4"):
        batches.load_state_dict(make_batches(samples=24, seed=1).state_dict())
    with pytest.raises(ValueError, match="state must have the keys"):
        batches.load_state_dict({"epoch": 3})
    with pytest.raises(ValueError, match=r"position must be between 0 and 5, got 6. Set drop_last as it was"):
        batches.load_state_dict({**batches.state_dict(), "position": 6})
    assert take(batches, 5) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 5, "processes": 2}, "positive multiple of processes = 2, got 5"),
        ({"batch_size": 0}, "positive multiple of processes = 1, got 0"),
        ({"batch_size": 24}, "at most the number of samples = 23, got 24"),
        ({"process": 2, "processes": 2}, "process must be between 0 and processes - 1, got 2 of 2"),
        ({"processes": 2, "drop_last": False}, "last batch of 3 samples does not divide by processes = 2"),
    ],
)
def test_impossible_sizes_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make_batches(**options)


def test_inputs_and_targets_must_match():
    with pytest.raises(ValueError, match="must have one length and device, got 3 on cpu and 4 on cpu"):
        Batches(torch.zeros(3), torch.zeros(4), 1, torch.Generator())
