"""From times of single layers to costs: the fit, what it says of itself, and the file it is kept in."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dynarank.calibration import (
    Calibration,
    Machine,
    MeasuredCosts,
    calibrate,
    load_calibration,
    this_machine,
)
from dynarank.calibration._fit import fit_times
from dynarank.calibration._samples import Sample, measure, settings
from dynarank.calibration.calibrate import fit
from dynarank.cost_model.work import KINDS, OPERATORS, PURPOSES

MACHINE = Machine("A processor", "cpu", 2, "2.0", "float32")


def made(costs: MeasuredCosts, *, noise: float = 0.0) -> list[Sample]:
    """Return samples of every setting as a machine with these costs would give them."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for setting in (setting for kind in KINDS for setting in settings(kind)):
        for form, work in setting.works:
            for purpose in PURPOSES:
                factor = 1 + noise * float(torch.randn((), generator=generator).clamp(-2, 2))
                seconds = costs.of_form(work, purpose, form) * factor
                found.append(Sample(purpose, form, work, seconds, setting.held_out))
    return found


# --- the fit ---------------------------------------------------------------------------------------------------------


def test_times_are_found_again_in_spite_of_outliers():
    counts = torch.rand(60, 4, dtype=torch.float64) + 0.1
    exact = torch.tensor([3.0, 0.0, 0.5, 7.0], dtype=torch.float64)
    seconds = counts @ exact
    torch.testing.assert_close(fit_times(counts, seconds), exact, atol=1e-9, rtol=1e-9)
    seconds[::10] *= 4
    torch.testing.assert_close(fit_times(counts, seconds), exact, atol=0.3, rtol=0.1)


def test_no_time_is_negative():
    counts = torch.tensor([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0], [1.0, 4.0]]).double()
    assert bool((fit_times(counts, torch.tensor([4.0, 3.0, 2.0, 1.0]).double()) >= 0).all())
    unused = torch.cat([counts, torch.zeros(4, 1).double()], dim=1)
    assert fit_times(unused, counts.sum(1)).tolist() == pytest.approx([1.0, 1.0, 0.0])


def test_held_out_layers_are_predicted_and_decided(costs: MeasuredCosts):
    fitted, checks = fit(made(costs, noise=0.03))
    assert fitted.operators.keys() == costs.operators.keys()
    assert len(checks) == len(KINDS) * len(PURPOSES)
    for check in checks:
        assert check.layers >= 12
        assert check.median_error < 0.05 and check.worst_error < 0.2
        assert check.loss < 0.01
    assert max(check.rule_loss for check in checks) > 0.05


def test_checks_see_only_what_the_fit_has_not_seen(costs: MeasuredCosts):
    samples = made(costs)
    changed = [replace(s, seconds=3 * s.seconds) if s.held_out and s.form == "factored" else s for s in samples]
    (fitted, checks), (same, exact) = fit(changed), fit(samples)
    assert fitted == same
    assert all(check.median_error < 1e-6 for check in exact)
    assert all(check.median_error == pytest.approx(2 / 3, rel=1e-6) for check in checks)


def test_a_fit_that_decides_worse_than_the_rule_says_so(costs: MeasuredCosts):
    samples = made(costs)
    slow = [replace(s, seconds=9 * s.seconds) if s.form == "factored" and not s.held_out else s for s in samples]
    text, good = (str(Calibration(MACHINE, *fit(found))) for found in (slow, samples))
    assert "linear, training: the rule chooses better than the fit." in text
    assert "chooses better" not in good
    assert "A processor, 2 threads, float32, torch 2.0" in good


# --- measuring ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_of_a_setting_is_timed_for_both_purposes(kind):
    setting = settings(kind)[0]
    options = {"device": torch.device("cpu"), "dtype": torch.float64, "seconds": 0.0, "min_rounds": 1}
    before = torch.get_rng_state()
    found = measure([setting], **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert [(s.purpose, s.form, s.work) for s in found] == [
        (purpose, form, work) for form, work in setting.works for purpose in ("inference", "training")
    ]
    assert all(sample.seconds > 0 for sample in found)


@pytest.mark.parametrize("kind", KINDS)
def test_settings_go_from_small_to_large_and_no_shape_is_on_both_sides(kind):
    found = settings(kind)
    sizes = [setting.multiplications for setting in found]
    assert sizes == sorted(sizes)
    assert not {s.work.shape for s in found if s.held_out} & {s.work.shape for s in found if not s.held_out}


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan")])
def test_the_time_to_measure_must_be_positive(seconds: float):
    with pytest.raises(ValueError, match=rf"seconds must be above 0, got {seconds}\."):
        calibrate(seconds=seconds)


@pytest.mark.parametrize("device", ["gpu", "cpu:x", "xla"])
def test_a_device_that_is_not_there_is_named(device: str):
    with pytest.raises(ValueError, match=f"device must be one that torch can use here, such as cpu, got '{device}'"):
        calibrate(device=device)


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(costs: MeasuredCosts) -> tuple[Calibration, Path]:
    calibration = Calibration(MACHINE, *fit(made(costs, noise=0.03)))
    return calibration, calibration.save()


def test_what_is_saved_is_loaded(kept: tuple[Calibration, Path], cache: Path):
    calibration, file = kept
    assert load_calibration(MACHINE) == calibration
    assert list((cache / "calibration").iterdir()) == [file]
    assert calibration.save() == file


@pytest.mark.parametrize(
    "other", [{"threads": 1}, {"torch": "2.1"}, {"dtype": "float64"}, {"processor": "Another"}, {"device": "cuda"}]
)
def test_another_machine_has_no_calibration(kept: tuple[Calibration, Path], other: dict):
    assert load_calibration(replace(MACHINE, **other)) is None


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path):
    assert MACHINE.file().parent == cache / "calibration"
    monkeypatch.delenv("DYNARANK_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert MACHINE.file().parent == tmp_path / "dynarank" / "calibration"


def broken(text: str) -> list[str]:
    """Return contents of the file that must not be used."""
    data = json.loads(text)
    foreign = data | {"machine": data["machine"] | {"threads": 64}}
    negative = json.loads(text)
    negative["costs"]["operators"]["training"][OPERATORS[0]][1] = -1e-9
    lacking = json.loads(text)
    del lacking["costs"]["operators"]["inference"][OPERATORS[-1]]
    variants = [foreign, data | {"format": 0}, negative, lacking, data | {"checks": [{}]}, [], {}, 3]
    return ["", text[:-40], "\0", *map(json.dumps, variants)]


@pytest.mark.parametrize("index", range(11))
def test_a_file_that_is_no_good_is_told_and_not_used(
    kept: tuple[Calibration, Path], index: int, caplog: pytest.LogCaptureFixture
):
    calibration, file = kept
    file.write_text(broken(file.read_text())[index])
    with caplog.at_level(logging.WARNING, "dynarank"):
        assert load_calibration(MACHINE) is None
    (record,) = caplog.records
    assert str(file) in record.getMessage() and "dynarank calibrate replaces it" in record.getMessage()
    calibration.save()
    assert load_calibration(MACHINE) == calibration


def test_no_file_is_no_reason_for_a_warning(caplog: pytest.LogCaptureFixture):
    assert load_calibration(this_machine()) is None
    assert not caplog.records
