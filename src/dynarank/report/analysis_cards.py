"""A card for each weight of an analysis: two small drawings under its name."""

from collections.abc import Iterator
from functools import partial

from dynarank.analysis.findings import Analysis, LayerAnalysis
from dynarank.analysis.tables import WHOLE
from dynarank.compress.report import CompressedLayer
from dynarank.report.analysis_drawing import NOISE, PAYS, SIGMA, draw_errors, draw_singular_values
from dynarank.report.markup import Markup, breakable, element, keyed
from dynarank.report.svg import PAGE, inline

_SIZE = {"width": 220.0, "height": 160.0}


def card_keys(analysis: Analysis) -> Iterator[list[Markup | str]]:
    """Yield the legend of the drawings on the left and, where there are several forms, of those on the right."""
    left = {SIGMA: "singular values", NOISE: "edge of the noise", PAYS: "rank up to which two factors are smaller"}
    yield ["Left:", *(keyed(color, text) for color, text in left.items())]
    forms = _forms(analysis)
    if len(forms) > 1:
        yield ["Right:", *(keyed(index, form) for index, form in enumerate(forms))]


def layer_cards(analysis: Analysis) -> Iterator[Markup]:
    """Yield the card of each weight that was analysed."""
    forms = _forms(analysis)
    for index, layer in enumerate(analysis.layers):
        if layer.spectrum is None:
            continue
        paint = partial(draw_singular_values, layer=layer, spectrum=layer.spectrum, palette=PAGE)
        drawings = [inline(paint, key=f"sigma{index}", label=f"Singular values of {layer.name} by rank", **_SIZE)]
        if layer.curves:
            paint = partial(draw_errors, layer=layer, planned=_planned(analysis, layer), forms=forms, palette=PAGE)
            drawings.append(inline(paint, key=f"error{index}", label=f"Error of {layer.name} by size", **_SIZE))
        yield element(
            "figure",
            element("h3", breakable(layer.name or WHOLE)),
            element("p", _summary(layer), class_="note"),
            element("div", *drawings, class_="pair"),
            class_="card",
        )


def _summary(layer: LayerAnalysis) -> str:
    assert layer.spectrum is not None
    shape = " x ".join(map(str, layer.shape))
    parts = [
        f"{layer.kind} {shape}",
        f"rank {layer.spectrum.rank_90} for 90 %",
        f"{layer.spectrum.noise.above} above noise",
    ]
    return " · ".join([*parts, layer.reason] if layer.reason else parts)


def _planned(analysis: Analysis, layer: LayerAnalysis) -> list[CompressedLayer]:
    plans = [outlook.plan for outlook in analysis.outlooks if outlook.plan is not None]
    return [one for plan in plans for one in plan.compressed if one.name == layer.name]


def _forms(analysis: Analysis) -> list[str]:
    """Return all forms, the matrix first."""
    names = {curve.form for layer in analysis.layers for curve in layer.curves}
    return sorted(names, key=lambda name: (name != "matrix", name))
