"""Methods are built from names and ``key=value`` options by discovery alone."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

import dynarank.ranks
from dynarank._discovery import discover
from dynarank.experiments import TrainConfig, methods
from dynarank.experiments.defaults import complete
from dynarank.experiments.methods import INTEGRATOR, RANK_POLICY, build
from dynarank.integrators.augmented_bug import AugmentedBUG
from dynarank.ranks.budget import Budget
from dynarank.ranks.fixed import Fixed
from dynarank.ranks.relative_tail import RelativeTail

NEW_POLICY = '''"""A policy that was dropped into the folder."""

from dataclasses import dataclass

from dynarank.ranks.base import AbstractRankPolicy, Decision


@dataclass(frozen=True)
class Halving(AbstractRankPolicy):
    """Keeps half of the directions."""

    least: int = 1
    gentle: bool = False

    def plan(self, spectra, context):
        return [Decision(max(self.least, len(s.sigma) // 2), 1, "half") for s in spectra]
'''


@pytest.fixture
def dropped_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Put a file into the folder of rank policies, as far as discovery can tell, and return its name."""
    (tmp_path / "halving.py").write_text(NEW_POLICY)
    monkeypatch.setattr(dynarank.ranks, "__path__", [*dynarank.ranks.__path__, str(tmp_path)])
    discover.cache_clear()
    yield "halving"
    discover.cache_clear()
    sys.modules.pop("dynarank.ranks.halving", None)


def test_options_are_read_by_the_type_of_their_field():
    assert build(INTEGRATOR, "augmented_bug", ["coefficient_steps=4"]) == AugmentedBUG(4)
    assert build(RANK_POLICY, "fixed", ["rank=3"]) == Fixed(3)
    assert build(RANK_POLICY, "fixed", ["rank=none"]) == Fixed(None)
    assert build(RANK_POLICY, "relative_tail", ["tolerance=2e-1", "min_rank=2"]) == RelativeTail(0.2, min_rank=2)


def test_a_method_without_options_needs_none():
    assert type(build(INTEGRATOR, "tangent_muon", [])).__name__ == "TangentMuon"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bugdet", [], "unknown rank policy 'bugdet'. Available: "),
        ("fixed", ["rank"], "rank_options must be given as key=value, got 'rank'."),
        ("fixed", ["rnk=3"], "rank policy 'fixed' has no option 'rnk'. Its options: rank."),
        ("fixed", ["rank=3.5"], "option 'rank' of rank policy 'fixed' must be a whole number or none, got '3.5'."),
        ("relative_tail", ["tolerance=x"], "option 'tolerance' of rank policy 'relative_tail' must be a number, got"),
        ("relative_tail", ["tolerance=2"], "RelativeTail: tolerance must be between 0 and 1, got 2.0."),
        ("budget", [], "rank policy 'budget' needs fraction. Give it as --rank-options fraction=VALUE."),
    ],
)
def test_wrong_options_are_refused(name: str, options: list[str], message: str):
    with pytest.raises(ValueError) as failure:
        build(RANK_POLICY, name, options)
    assert str(failure.value).startswith(message)


def test_a_method_without_options_says_so():
    with pytest.raises(ValueError, match=r"integrator 'tangent_muon' has no option 'a'. It has no options."):
        build(INTEGRATOR, "tangent_muon", ["a=1"])


@dataclass(frozen=True)
class Choosy:
    flag: bool
    word: Literal["one", "two"] = "one"


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [("yes", bool, True), ("0", bool, False), ("two", Choosy.__annotations__["word"], "two"), ("a=b", str, "a=b")],
)
def test_truth_choices_and_text_are_read(text: str, kind: type, value: object):
    assert methods._read(text, kind, where="here") == value


def test_a_word_that_is_no_choice_is_refused():
    with pytest.raises(ValueError, match="here must be one or two, got 'six'"):
        methods._read("six", Choosy.__annotations__["word"], where="here")


@pytest.mark.parametrize(
    ("settings", "policy"),
    [
        ({"budget": 0.1}, Budget(0.1, start=0.1 * 3.0, steps=50)),
        ({"budget": 0.1, "start": "dense"}, Budget(0.1, start=0.4, steps=50)),
        ({"budget": 0.5}, Budget(0.5, start=1.0, steps=50)),
        ({"budget": 0.1, "rank_options": ("start=0.2", "growth=0.5")}, Budget(0.1, start=0.2, steps=50, growth=0.5)),
        ({"data": "synthetic", "budget": 0.1}, Budget(0.1)),
        ({"tolerance": 0.2}, RelativeTail(0.2)),
    ],
)
def test_budget_and_tolerance_reach_the_policy(settings: dict, policy: object):
    assert methods.rank_policy(complete(TrainConfig(**settings)), freeze_step=50) == policy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_policy": "noise_edge", "budget": 0.1}, "rank policy 'noise_edge' takes no budget, got 0.1."),
        ({"rank_policy": "budget", "tolerance": 0.1}, "rank policy 'budget' takes no tolerance, got 0.1."),
    ],
)
def test_a_policy_without_budget_or_tolerance_refuses_them(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        methods.rank_policy(complete(TrainConfig(**settings)), freeze_step=50)


def test_a_file_dropped_into_the_folder_can_be_used(dropped_file: str):
    policy = build(RANK_POLICY, dropped_file, ["least=2", "gentle=true"])
    assert (policy.least, policy.gentle) == (2, True)
    with pytest.raises(ValueError, match="must be true or false, got 'perhaps'"):
        build(RANK_POLICY, dropped_file, ["gentle=perhaps"])
