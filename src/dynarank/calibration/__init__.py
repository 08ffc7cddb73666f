"""How long layers take on this machine, dense and low-rank, and which form each layer of a model should have."""

from dynarank.calibration.calibrate import calibrate
from dynarank.calibration.speed_plan import LayerChoice, SpeedPlan, speed_plan
from dynarank.cost_model.calibration import Calibration, load_calibration
from dynarank.cost_model.costs import AbstractCosts, Check, MeasuredCosts, RuleOfThumb
from dynarank.cost_model.machine import Machine, this_machine
from dynarank.cost_model.work import Form, Kind, Purpose, Work

__all__ = [
    "AbstractCosts",
    "Calibration",
    "Check",
    "Form",
    "Kind",
    "LayerChoice",
    "Machine",
    "MeasuredCosts",
    "Purpose",
    "RuleOfThumb",
    "SpeedPlan",
    "Work",
    "calibrate",
    "load_calibration",
    "speed_plan",
    "this_machine",
]
