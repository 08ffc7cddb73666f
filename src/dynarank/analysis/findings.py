"""What an analysis found: every weight, and what the model comes to at a few budgets. Data that prints itself."""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dynarank._files import replacing
from dynarank.analysis.spectra import Spectrum
from dynarank.analysis.tables import as_text
from dynarank.compress.report import CompressionReport


@dataclass(frozen=True)
class ErrorCurve:
    """What one form makes of a layer, from the smallest option to the largest; of many, ever sparser ones.

    Args:
        form: Name of the form, such as ``"matrix"``.
        ranks: The rank of each option; a tuple, since some forms have two.
        parameters: Numbers in the weight.
        errors: Relative squared error of the layer's outputs on the calibration data, or of its weight without them.
        damages: Divergence of the model's outputs that these errors should cause; the errors where it was not measured.
        seconds: Seconds of a forward pass; empty where layers were not timed.
    """

    form: str
    ranks: tuple[tuple[int, ...], ...]
    parameters: tuple[int, ...]
    errors: tuple[float, ...]
    damages: tuple[float, ...]
    seconds: tuple[float, ...] = ()


@dataclass(frozen=True)
class LayerAnalysis:
    """What is known of one weight.

    Args:
        name: Name of the layer, or of the tensor where a layer holds several or a file was analysed.
        kind: ``"linear"``, ``"conv2d"``, ... or the name of the layer's class.
        shape: Shape of the weight.
        matrix_shape: ``(m, n)`` of it as the matrix that is factored, by default outputs by everything else.
        parameters: Numbers in it, as deployed where it is low-rank already.
        dtype: Their type as torch calls it.
        break_even: Largest rank at which two factors hold fewer numbers than the dense weight.
        reason: Why it cannot be replaced; empty where it can.
        rank: Its rank where it is low-rank already, else None.
        spectrum: Its singular values; None where the weight cannot be analysed.
        curves: Error against size, one curve for each form that it could take.
        sensitivity: Divergence of the model's outputs per unit of the layer's relative squared output error, at an
            error of 0.1; None where it was not measured.
        rows: Vectors that it is multiplied by in the first calibration batch, or None without calibration.
        flops: Operations that this takes.
        seconds: Measured seconds, or None where layers were not timed.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    matrix_shape: tuple[int, int]
    parameters: int
    dtype: str
    break_even: int = 0
    reason: str = ""
    rank: int | None = None
    spectrum: Spectrum | None = None
    curves: tuple[ErrorCurve, ...] = ()
    sensitivity: float | None = None
    rows: int | None = None
    flops: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Outlook:
    """What the model comes to at one budget of parameters.

    Args:
        budget: What was asked for: up to 1 a fraction, above 1 a number of parameters.
        plan: What would become of each layer; None where the budget cannot be met.
        bytes: Bytes of the model then.
        problem: Why the budget cannot be met; empty where it can.
    """

    budget: float
    plan: CompressionReport | None
    bytes: int | None = None
    problem: str = ""

    @property
    def damage(self) -> float | None:
        """Divergence of the outputs that the errors of all layers together should cause: the sum of the layers'."""
        return None if self.plan is None else sum(layer.damage for layer in self.plan.layers)

    @property
    def speed_up(self) -> float | None:
        """Seconds of a forward pass before, divided by those predicted; None where layers were not timed."""
        if self.plan is None or not self.plan.seconds_before or not self.plan.seconds_after:
            return None
        return self.plan.seconds_before / self.plan.seconds_after


@dataclass(frozen=True)
class Analysis:
    """What the weights of a model look like and what they could become. ``print(analysis)`` shows two tables.

    Args:
        source: Class of the model, or name of the file.
        layers: One entry for each weight of two or more dimensions.
        outlooks: What the model comes to, one for each budget.
        parameters: Numbers in the model, as deployed.
        bytes: Bytes of all that it stores.
        calibrated: Whether there were calibration data: errors are those of outputs then, else those of weights.
        flops: Operations of a forward pass of the first calibration batch, or None without calibration.
        seconds: Measured seconds of the same, or None where layers were not timed.
    """

    source: str
    layers: tuple[LayerAnalysis, ...]
    outlooks: tuple[Outlook, ...]
    parameters: int
    bytes: int
    calibrated: bool = False
    flops: int | None = None
    seconds: float | None = None

    @property
    def replaceable(self) -> tuple[LayerAnalysis, ...]:
        """Weights for which a smaller form exists."""
        return tuple(layer for layer in self.layers if not layer.reason)

    def __getitem__(self, name: str) -> LayerAnalysis:
        """Return the entry of a layer.

        Raises:
            KeyError: There is none of that name.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no weight is called {name!r}; the analysis has {len(self.layers)}, see analysis.layers.")

    def __str__(self) -> str:
        return as_text(self)

    def as_dict(self) -> dict[str, Any]:
        """Return the analysis as a plain dictionary that JSON can hold; what is not finite is None."""
        outlooks = [asdict(one) | {"damage": one.damage, "speed_up": one.speed_up} for one in self.outlooks]
        return _plain(asdict(self) | {"outlooks": outlooks})

    def save_json(self, path: str | os.PathLike[str]) -> Path:
        """Write the analysis as one JSON object and return the path of the file."""
        target = Path(path)
        with replacing(target) as partial:
            partial.write_text(json.dumps(self.as_dict(), allow_nan=False) + "\n", encoding="utf-8")
        return target


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
