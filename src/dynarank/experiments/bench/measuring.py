"""The measurement of a series: steps of all contenders in turn, their memory and FLOPs, and inference."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import ceil
from statistics import fmean, median
from typing import Any, final

import torch
from torch import nn

from dynarank.experiments.bench import contenders
from dynarank.experiments.bench.cases.base import Series, rank_text
from dynarank.experiments.bench.config import AGAIN, DENSE, PLAIN, PLAIN_AGAIN
from dynarank.experiments.bench.contenders import Contender
from dynarank.experiments.bench.ratios import ratio
from dynarank.factorize import to_plain_
from dynarank.integrators.base import AbstractIntegrator
from dynarank.layers._factored import factored_layers
from dynarank.measure import evaluating
from dynarank.measure._timing import Sample, sampled

LEAST_ROUNDS = 6  # from here on the smallest and the largest of the rounds are a 95 % interval of the median
BLOCK = 0.1  # seconds a measurement of steps lasts, at least about
CYCLE, LONGEST = 25, 100  # steps of a measurement that holds what a method does now and then, and at most
PATIENCE = 0.2  # part of the time; where a cycle takes longer, a measurement holds few steps, and the table says so
WARM, TRIAL = 2, 1  # steps before anything is measured, and steps that tell how long one takes

Found = dict[str, Any]
Names = Mapping[str, AbstractIntegrator]


@final
@dataclass(frozen=True)
class _Place:
    """Who a contender is: a method at a rank, or a dense network."""

    method: str
    rank: str = ""

    def __str__(self) -> str:
        return f"{self.method} at {self.rank}" if self.rank else self.method


def measure_series(series: Series, integrators: Names, *, device: torch.device, seconds: float) -> Found:
    """Return what a series costs, as plain data.

    A method that cannot train the network is left out, with its reason.

    Args:
        series: What to measure.
        integrators: Methods by name, beside dense networks and plain training of the factors.
        device: Where to measure.
        seconds: About how long to measure steps.

    Returns:
        ``rounds``; ``entries``, one for each contender; ``inference``, one for each batch size and network.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        field, failed = _line_up(series, integrators, device)
        steps = {place: _steps(contender, PATIENCE * seconds) for place, contender in field.items()}
        samples = _timed(field, steps, seconds=seconds)
        counted = {place: field[place].operations() for place in field if place.method in (DENSE, PLAIN)}
        entries = {place: _entry(field, place, steps, samples, counted) for place in field}
        for place, entry in entries.items():  # last of all, since contenders are of no use afterwards
            entry["memory"] = field[place].memory(steps[place] if field[place].in_cycles else WARM)
        inference = _inference(series, field, device=device, seconds=seconds / 20)
    return {"rounds": len(samples[_Place(DENSE)]), "entries": [*entries.values(), *failed], "inference": inference}


def _line_up(series: Series, integrators: Names, device: torch.device) -> tuple[dict[_Place, Contender], list[Found]]:
    """Return all contenders, warm, and what was left out."""
    batch = contenders.make_batch(series, device)
    field, failed = {}, []
    for name in (DENSE, AGAIN):
        model = contenders.placed(series.network(), series, device)
        field[_Place(name)] = Contender(model, contenders.by_sgd, series, batch)
    like = field[_Place(DENSE)].model
    makers = dict.fromkeys((PLAIN, PLAIN_AGAIN), contenders.by_sgd)
    makers |= {name: contenders.by_integrator(integrator) for name, integrator in integrators.items()}
    for ranks in series.ranks:
        for name, make in makers.items():
            place, model = _Place(name, rank_text(ranks)), contenders.low_rank(series, ranks, like, device)
            try:
                field[place] = Contender(model, make, series, batch)
                field[place].block(WARM)
            except (RuntimeError, ValueError, TypeError) as error:
                field.pop(place, None)
                failed.append({**asdict(place), "failed": f"{type(error).__name__}: {error}"})
    return field, failed


def _steps(contender: Contender, patience: float) -> int:
    """Return how many steps a measurement takes: whole cycles, if one takes no longer than ``patience`` seconds."""
    trial = sampled({"step": partial(contender.block, TRIAL)}, rounds=1, warmup=1)["step"][0]
    step = max(_clock(trial), 1e-9)
    wanted = min(LONGEST, ceil(BLOCK / step))
    if contender.in_cycles and CYCLE * step <= patience:
        return CYCLE * ceil(wanted / CYCLE)
    return wanted


def _timed(
    field: Mapping[_Place, Contender], steps: Mapping[_Place, int], *, seconds: float
) -> dict[_Place, list[Sample]]:
    """Return the time of a step, round by round."""
    calls = {str(place): partial(contender.block, steps[place]) for place, contender in field.items()}
    found = sampled(calls, seconds=seconds, min_rounds=LEAST_ROUNDS, warmup=0)
    return {place: [_divided(sample, steps[place]) for sample in found[str(place)]] for place in field}


def _divided(sample: Sample, steps: int) -> Sample:
    gpu = sample.gpu / steps if sample.gpu is not None else None
    return Sample(sample.wall / steps, sample.cpu / steps, gpu)


def _clock(sample: Sample) -> float:
    """Return the seconds that ratios are made of: of this process's threads, or of the GPU where there is one."""
    return sample.cpu if sample.gpu is None else sample.gpu


def _entry(
    field: Mapping[_Place, Contender],
    place: _Place,
    steps: Mapping[_Place, int],
    samples: Mapping[_Place, Sequence[Sample]],
    operations: Mapping[_Place, int],
) -> Found:
    """Return the numbers of one contender."""
    contender, dense, plain = field[place], _Place(DENSE), _Place(PLAIN, place.rank)
    times = {at: [_clock(sample) for sample in samples[at]] for at in (place, dense, plain) if at in samples}
    layers = factored_layers(contender.model)
    found: Found = {**asdict(place), "ranks": {name: layer.rank for name, layer in layers.items()}}
    found |= {"steps": steps[place], "whole_cycles": not contender.in_cycles or steps[place] % CYCLE == 0}
    found["seconds"] = {"clock": median(times[place]), "wall": median(sample.wall for sample in samples[place])}
    found["to_dense"] = asdict(ratio(times[place], times[dense]))
    if place.rank:
        found["to_plain"] = asdict(ratio(times[place], times[plain]))
        found["operations"] = operations[plain] / operations[dense]
        found["rank_part"] = sum(found["ranks"].values()) / sum(layer.max_rank for layer in layers.values())
        if samples[place][0].gpu is None:
            found["upkeep"] = _upkeep(contender, field[plain], times[place])
    return found


def _upkeep(contender: Contender, plain: Contender, times: Sequence[float]) -> float:
    """Return the part of a step that its update takes beyond the update of plain factors; means over the rounds."""
    own, others = (fmean(which.updates[-len(times) :]) for which in (contender, plain))
    return (own - others) / fmean(times)


# --- inference -------------------------------------------------------------------------------------------------------


def _inference(series: Series, field: Mapping[_Place, Contender], *, device: torch.device, seconds: float) -> Any:
    """Return the times of a forward pass: dense, and at each rank as deployed, with two plain layers for each."""
    models = {place: contender.model for place, contender in field.items() if place.method in (DENSE, AGAIN, PLAIN)}
    for place, model in models.items():
        if place.rank:
            to_plain_(model)
    found = []
    with evaluating(*models.values()), torch.inference_mode(), contenders.half_precision(device):
        for size in series.inference:
            batch = contenders.laid_out(torch.randn(size, *series.inputs[1:]).to(device), series)
            calls = {str(place): _call(model, batch) for place, model in models.items()}
            samples = sampled(calls, seconds=seconds * len(calls), min_rounds=LEAST_ROUNDS)
            times = {place: [_clock(sample) for sample in samples[str(place)]] for place in models}
            for place in models:
                to_dense = asdict(ratio(times[place], times[_Place(DENSE)]))
                numbers = {"batch": size, "seconds": median(times[place]), "to_dense": to_dense}
                found.append({**asdict(place), **numbers})
    return found


def _call(model: nn.Module, batch: torch.Tensor) -> Callable[[], Any]:
    """Return a forward pass; on a GPU one that was captured as a graph, so that launching it costs nothing."""
    if batch.device.type != "cuda":
        return partial(model, batch)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # kernels choose their workspaces before they are captured
        for _ in range(WARM):
            model(batch)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(batch)
    return graph.replay
