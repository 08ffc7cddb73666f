"""The proof on one's own data: a network before and after compression and recovery, and beside a narrower one."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from dynarank.compress.compress import compress_
from dynarank.compress.recovery import CORE, Recovery, recover_
from dynarank.compress.report import CompressionReport
from dynarank.compress.tolerance import Trial, compress_to_tolerance_
from dynarank.experiments.compress_config import CompressConfig
from dynarank.experiments.costs import measure_costs
from dynarank.experiments.proof import COMPRESSED, GIVEN, RECOVERED, STUDENT, TRUNCATED, Proof, Row
from dynarank.experiments.subject import Subject, batch_size
from dynarank.factorize import deployed_parameters
from dynarank.layers.base import low_rank_layers


@dataclass(frozen=True)
class Stage:
    """Where a proof stands.

    Args:
        name: What is being done.
        step: Steps of training taken, where it is training.
        steps: Steps of the training; 0 where it is none.
        loss: Mean loss of the last steps.
        said: What there is to say besides.
    """

    name: str
    step: int = 0
    steps: int = 0
    loss: float = 0.0
    said: str = ""


Tell = Callable[[Stage], None]
Count = Callable[[int, int, float], None]  # step, steps, loss


def quiet(stage: Stage) -> None:
    """Tell nobody."""


def prove(subject: Subject, config: CompressConfig, *, tell: Tell = quiet) -> Proof:
    """Compress a network, recover it, and measure everything next to the network as given.

    Args:
        subject: The network and its data.
        config: What to do.
        tell: Called with what is being done.

    Returns:
        Rows of scores and costs, what became of every layer, and the compressed network itself.

    Raises:
        ValueError: The subject lacks what an option needs, or the budget cannot be met.
        RuntimeError: A function of the subject failed.

    Example:
        >>> from dynarank.models import MLP
        >>> subject = Subject("mlp", model=lambda: MLP(64, [48, 48], 10))
        >>> proof = prove(subject, CompressConfig(budget=0.5))
        >>> [(row.name, row.costs.parameters <= 3000) for row in proof.rows]
        [('as given', False), ('after truncation', True)]
    """
    config.check(subject)
    calibration, bench = subject.calibration(), Bench(subject)
    given = bench.put(GIVEN, subject.model())
    model = copy.deepcopy(given)
    tell(Stage("looking at the layers"))
    report, trials = _compress_(model, subject, config, calibration, tell)
    bench.put(TRUNCATED, model)
    recovery = None
    if config.recover:
        recovery = _train_(model, given, subject, config, partial(_count, tell, "recovery"))
        bench.put(RECOVERED, model)
    if config.student:
        student = _student(subject, config, deployed_parameters(model))
        _train_(student, given, subject, config, partial(_count, tell, STUDENT))
        bench.put(STUDENT, student)
    tell(Stage("measuring"))
    size = batch_size(calibration[0]) if calibration and report.seconds_after is not None else None
    sizes = (*config.batch_sizes, size) if size is not None else config.batch_sizes
    return Proof(
        subject.name,
        subject.measure,
        subject.higher_is_better,
        bench.rows(sizes, seconds=config.seconds, predicted=report.seconds_after),
        model,
        settings=asdict(config),
        report=report,
        recovery=recovery,
        trials=trials,
        predicted_at=size,
        notes=tuple(_notes(subject, config, calibration)),
    )


def compare(
    subject: Subject, compressed: nn.Module, *, batch_sizes: Sequence[int] = (1, 32), seconds: float = 2.0
) -> Proof:
    """Measure a compressed network next to the network as given.

    Args:
        subject: The network as given and its data.
        compressed: The compressed network.
        batch_sizes: Batch sizes to measure times at.
        seconds: About how long to measure at each of them.
    """
    bench = Bench(subject)
    bench.put(GIVEN, subject.model())
    bench.put(COMPRESSED, compressed)
    rows = bench.rows(batch_sizes, seconds=seconds)
    return Proof(subject.name, subject.measure, subject.higher_is_better, rows, compressed)


class Bench:
    """Networks that are judged next to each other: scores at once, costs at the end and all together.

    Args:
        subject: Whose data they are judged on.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._networks: dict[str, nn.Module] = {}
        self._scores: dict[str, dict[str, float]] = {}

    def put(self, name: str, network: nn.Module) -> nn.Module:
        """Score a network as it is now and return it in evaluation mode."""
        self._networks[name] = network.eval()
        self._scores[name] = self.subject.scores(network)
        return network

    def rows(self, batch_sizes: Sequence[int], *, seconds: float, predicted: float | None = None) -> tuple[Row, ...]:
        """Measure all networks and return their rows; one that was put in twice is measured once."""
        last = {id(network): name for name, network in self._networks.items()}
        costs = measure_costs(
            self.subject, {name: self._networks[name] for name in last.values()}, batch_sizes, seconds=seconds
        )
        times = {TRUNCATED: predicted, RECOVERED: predicted}
        return tuple(
            Row(name, self._scores[name], costs[last[id(network)]], times.get(name))
            for name, network in self._networks.items()
        )


def _compress_(
    model: nn.Module, subject: Subject, config: CompressConfig, calibration: list[Any] | None, tell: Tell
) -> tuple[CompressionReport, tuple[Trial, ...]]:
    options: dict[str, Any] = {
        "measure": config.measure,
        "calibration": calibration,
        "faster_only": config.faster_only,
        "method": config.method,
        "forms": config.forms,
        "include_head": config.include_head,
        "rank_multiple": config.rank_multiple,
        "divergence": subject.divergence,
        "forward": subject.forward,
    }
    if config.budget is not None:
        return compress_(model, config.budget, **options), ()
    assert config.tolerate is not None
    found = compress_to_tolerance_(
        model,
        subject.choice_score,
        config.tolerate,
        higher_is_better=subject.higher_is_better,
        tell=lambda trial: tell(Stage("searching", said=f"{trial.fraction:.1%}, {subject.measure} {trial.score:.5g}")),
        **options,
    )
    return found.report, found.trials


def _train_(model: nn.Module, given: nn.Module, subject: Subject, config: CompressConfig, count: Count) -> Recovery:
    """Train a network on the data of the subject, and after the network as given where that is asked for."""
    assert subject.training_batches is not None
    chosen = {"lr": config.lr, "integrator": config.integrator}
    return recover_(
        model,
        subject.training_batches(config.seed),
        subject.loss,
        steps=config.recover,
        teacher=given if config.distil else None,
        distance=subject.distance,
        only=_only(config) if low_rank_layers(model) else None,
        forward=subject.training_forward or subject.forward,
        tell=count,
        **{name: value for name, value in chosen.items() if value is not None},
    )


def _only(config: CompressConfig) -> Any:
    return CORE if config.only == (CORE,) else config.only


def _student(subject: Subject, config: CompressConfig, parameters: int) -> nn.Module:
    """Return a narrower network of at most so many parameters; the global generators are left as they were."""
    assert subject.narrower is not None
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(config.seed)
        return subject.narrower(parameters)


def _count(tell: Tell, name: str, step: int, steps: int, loss: float) -> None:
    tell(Stage(name, step, steps, loss))


def _notes(subject: Subject, config: CompressConfig, calibration: list[Any] | None) -> Iterator[str]:
    if subject.evaluate is None:
        yield f"No score: {subject.name} does not define evaluate(model)."
    if calibration is None:
        lacking = "neither calibration_batches() nor training_batches(seed)"
        yield f"Truncated by the weights alone: {subject.name} defines {lacking}."
        if subject.example_batch is None:
            yield f"No time, FLOPs or memory: {subject.name} defines no example_batch either."
    if config.tolerate is not None and subject.validate is None:
        yield f"The size was chosen by evaluate(model) itself: {subject.name} does not define validate(model)."
    if config.student:
        how = "trained and distilled" if config.distil and subject.loss else "distilled" if config.distil else "trained"
        yield f"The narrower dense network is new: it was {how} for {config.recover} steps, with AdamW."
