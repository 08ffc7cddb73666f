"""What a budget counts: parameters, bytes, FLOPs or seconds of a forward pass. One small class each."""

from abc import ABC, abstractmethod
from typing import Any, final

from torch import Tensor, nn

from dynarank.compress._survey import Survey
from dynarank.compress.forms.base import Options
from dynarank.compress.timing import LayerTimes
from dynarank.errors import unknown_name
from dynarank.factorize import deployed_parameters
from dynarank.measure import Forward, flops, latency, stored_bytes


class AbstractMeasure(ABC):
    """A cost of a model that is the sum of the costs of its layers and of the rest."""

    needs_batch = False  # whether a forward pass is looked at
    needs_times = False  # whether layers are timed

    @abstractmethod
    def total(self, model: nn.Module, batch: Any, forward: Forward) -> float:
        """Return the cost of the whole model."""

    @abstractmethod
    def present(self, layer: Any, known: Survey) -> float:
        """Return the cost of a layer as it is."""

    @abstractmethod
    def of(self, layer: Any, options: Options, times: LayerTimes | None) -> Tensor:
        """Return the cost of every option for a layer, ``(k,)`` float64."""

    @abstractmethod
    def text(self, value: float) -> str:
        """Return a cost with its unit."""


@final
class Parameters(AbstractMeasure):
    """Numbers in the deployed state dict."""

    def total(self, model: nn.Module, batch: Any, forward: Forward) -> float:
        return deployed_parameters(model)

    def present(self, layer: Any, known: Survey) -> float:
        return known.parameters

    def of(self, layer: Any, options: Options, times: LayerTimes | None) -> Tensor:
        return options.parameters.double()

    def text(self, value: float) -> str:
        return f"{value:,.0f} parameters"


@final
class Bytes(AbstractMeasure):
    """Bytes of the state dict, those of spare rows too."""

    def total(self, model: nn.Module, batch: Any, forward: Forward) -> float:
        return stored_bytes(model)

    def present(self, layer: Any, known: Survey) -> float:
        held = (layer._parameters | layer._buffers).items()
        return sum(t.numel() * t.element_size() for name, t in held if t is not None and name != "bias")

    def of(self, layer: Any, options: Options, times: LayerTimes | None) -> Tensor:
        return options.parameters.double() * next(layer.parameters()).element_size()

    def text(self, value: float) -> str:
        return f"{value / 1e6:,.2f} MB"


@final
class Flops(AbstractMeasure):
    """Floating-point operations of one forward pass; a multiplication with its addition counts as two."""

    needs_batch = True

    def total(self, model: nn.Module, batch: Any, forward: Forward) -> float:
        return flops(model, batch, forward=forward)

    def present(self, layer: Any, known: Survey) -> float:
        return 2 * known.multiplications

    def of(self, layer: Any, options: Options, times: LayerTimes | None) -> Tensor:
        return 2 * options.multiplications.double()

    def text(self, value: float) -> str:
        return f"{value / 1e6:,.2f} MFLOPs"


@final
class Latency(AbstractMeasure):
    """Seconds of one forward pass of the first calibration batch, measured on this machine."""

    needs_batch = needs_times = True

    def total(self, model: nn.Module, batch: Any, forward: Forward) -> float:
        return latency({"model": model}, batch, forward=forward)["model"].median

    def present(self, layer: Any, known: Survey) -> float:
        return known.times.present if known.times else 0.0

    def of(self, layer: Any, options: Options, times: LayerTimes | None) -> Tensor:
        return times.of(options) if times else options.errors * 0

    def text(self, value: float) -> str:
        return f"{1e3 * value:,.3f} ms"


MEASURES: dict[str, AbstractMeasure] = {
    "parameters": Parameters(),
    "bytes": Bytes(),
    "flops": Flops(),
    "latency": Latency(),
}


def choose_measure(name: str) -> AbstractMeasure:
    """Return the measure of a name.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in MEASURES:
        raise unknown_name("measure", name, MEASURES)
    return MEASURES[name]
