"""The times that were measured on a machine: their file in the user's cache, and the rule that stands in for them."""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dynarank._files import replacing
from dynarank.cost_model._table import texts
from dynarank.cost_model.costs import AbstractCosts, Check, MeasuredCosts, RuleOfThumb
from dynarank.cost_model.machine import Machine, this_machine
from dynarank.cost_model.work import OPERATORS, PURPOSES

FORMAT = 1

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """How long layers take on a machine. ``print(calibration)`` shows where they break even.

    Args:
        machine: Where, and with what, it was measured.
        costs: The fitted times.
        checks: How good they are.
    """

    machine: Machine
    costs: MeasuredCosts
    checks: tuple[Check, ...]

    def __str__(self) -> str:
        return "\n\n".join((str(self.machine), *texts(self.costs, self.checks)))

    def as_dict(self) -> dict[str, Any]:
        """Return the calibration as a plain dictionary that JSON can hold."""
        return {"format": FORMAT, **asdict(self)}

    def save(self) -> Path:
        """Write the calibration to the user's cache, where it is found by ``load_calibration``, and return the file."""
        with replacing(self.machine.file()) as partial:
            partial.write_text(json.dumps(self.as_dict(), indent=1, allow_nan=False), encoding="utf-8")
        return self.machine.file()


def load_calibration(machine: Machine) -> Calibration | None:
    """Return the calibration of a machine from the user's cache, or None, with a warning where the file is no good."""
    file = machine.file()
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["format"] != FORMAT or Machine(**found["machine"]) != machine:
            raise ValueError("it is of another version or of another machine")
        return Calibration(machine, _read_costs(found["costs"]), tuple(Check(**check) for check in found["checks"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        _logger.warning("%s is not used: %s: %s. dynarank calibrate replaces it.", file, type(fault).__name__, fault)
        return None


def _read_costs(found: Any) -> MeasuredCosts:
    def times(values: Any) -> Any:
        if len(values) != 5 or not all(0 <= float(value) < float("inf") for value in values):
            raise ValueError(f"times must be five numbers of at least 0, got {values}")
        return tuple(map(float, values))

    operators = found["operators"]
    return MeasuredCosts(
        {purpose: {name: times(operators[purpose][name]) for name in OPERATORS} for purpose in PURPOSES}
    )


def costs_here(weight: torch.Tensor) -> tuple[AbstractCosts, str]:
    """Return what was measured for the device and the type of a weight, or the rule, and in words where it is from."""
    machine = this_machine(weight.device, weight.dtype)
    calibration = load_calibration(machine)
    if calibration is None:
        return RuleOfThumb(), f"a rule of thumb: there is no calibration for {machine}"
    return calibration.costs, f"the calibration for {machine}"
