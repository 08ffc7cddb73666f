"""The low-rank network of a run: its phases, its rank events, its checkpoints."""

import gc
import logging
from dataclasses import asdict
from typing import final

from dynarank import checkpoint
from dynarank.dense_start.dense_start import DenseStart
from dynarank.events import RankEvent
from dynarank.experiments import measuring, methods, networks
from dynarank.experiments.logbook import Logbook, looks_after
from dynarank.experiments.loop import Loop, make_batches
from dynarank.experiments.moments import Moments
from dynarank.experiments.problem import Problem
from dynarank.experiments.processes import Processes
from dynarank.experiments.progress import Progress, Report
from dynarank.experiments.run_folder import RunFolder
from dynarank.layers.base import low_rank_layers
from dynarank.optim.low_rank_optimizer import LowRankOptimizer
from dynarank.stability import WeightWatch

_logger = logging.getLogger(__name__)

NAME = "low rank"
LOSSES = 500  # about as many are noted in a run
SPECTRA = 60


@final
class LowRankRun:
    """Trains the low-rank network of a configuration, from the start or from a checkpoint.

    Whatever can be refused is refused here, before anything is written.

    Args:
        problem: Data, network and settings.
        processes: Who takes part.
        tell: Called with the progress.

    Raises:
        ValueError: If the settings do not fit the data, the network or each other.
    """

    def __init__(self, problem: Problem, processes: Processes, tell: Report) -> None:
        self.problem = problem
        self.config = problem.config
        self.processes = processes
        self.tell = tell
        self.loop = Loop(problem, processes, make_batches(problem, processes))
        self.moments = Moments.of(self.config, per_epoch=self.loop.batches.steps_per_epoch)
        self.step = 0
        self.saved_step = 0
        self._save_failed = False
        self.validation: float | None = None
        self.log = Logbook(None)
        self._build()

    def _build(self) -> None:
        config, moments = self.config, self.moments
        model = self.problem.build()
        self.dense_parameters = measuring.deployed_parameters(model)
        self.applications = measuring.applications(model, self.problem.splits.train_inputs[:1])
        self.report = networks.factorise_(model, config)
        layers = low_rank_layers(model)
        self.shapes = {name: layer.matrix_shape for name, layer in layers.items()}
        self.first_ranks = {name: layer.rank for name, layer in layers.items()}
        self.ranks = dict(self.first_ranks)
        policy = methods.rank_policy(config, freeze_step=moments.adaptive_steps)
        networks.check_plan(model, policy, step=moments.adaptive_steps)
        self.start: DenseStart | None = None
        if config.method == "oialr":
            self.trainee, self.start = networks.oialr_trainee(self.problem.build(), config, moments, self.processes)
            self.start.on_rank_event(self._note_events)
            self.ranks = {}
        elif config.start == "low":
            self.trainee = networks.low_rank_trainee(model, config, moments, self.processes)
            self._watch_ranks()
        else:
            methods.integrator(config)  # refused now, not after the warm-up
            self.trainee = networks.warming_trainee(self.problem.build(), config, moments, self.processes)
        self.watch = WeightWatch(self.trainee.model)

    def _become_low_rank(self) -> None:
        model = self.trainee.model
        del self.trainee
        gc.collect()  # a wrapper's hooks leave the parameters with it
        networks.factorise_(model, self.config)
        self.trainee = networks.low_rank_trainee(model, self.config, self.moments, self.processes)
        self._watch_ranks()

    def _first_cut(self) -> None:
        """Cut the trained weights to the first budget at once: steps at full rank cost more than dense ones."""
        if isinstance(self.trainee.optimizer, LowRankOptimizer):
            self.trainee.optimizer.change_ranks()

    def _watch_ranks(self) -> None:
        if isinstance(self.trainee.optimizer, LowRankOptimizer):
            self.trainee.optimizer.on_rank_event(self._note_events)

    @property
    def is_low_rank(self) -> bool:
        """Whether the network is factorised yet, or one of its layers."""
        if self.start is not None:
            return bool(self.start.low_rank)
        return isinstance(self.trainee.optimizer, LowRankOptimizer)

    @property
    def deployed_parameters(self) -> int:
        """Parameters as deployed now, without candidate directions."""
        if not self.is_low_rank:
            return self.dense_parameters
        return measuring.deployed_at(self.trainee.model, self.ranks)

    @property
    def flops_per_sample(self) -> int:
        """Multiplications and additions of a forward pass as deployed now."""
        return measuring.flops_per_sample(self.applications, self.ranks if self.is_low_rank else {})

    # --- start, checkpoint, resume -------------------------------------------------------------------------------

    def begin(self, folder: RunFolder | None) -> None:
        """Open the record in the folder and save the state before the first step."""
        self.log = Logbook(folder)
        self._describe()
        self._log_size()
        self.log.spectra(self.step, self.trainee.model)
        self.log.look(self.step, self.watch, self.trainee.optimizer)
        self._save()

    def restore(self, source: RunFolder) -> None:
        """Take over the state of the checkpoint in a folder, and go on with its record.

        Raises:
            OSError: If there is no checkpoint.
            ValueError: If it is damaged, or of another configuration.
        """
        values = checkpoint.load(source.checkpoint, ignore="rest").extra["run"]
        if self.start is not None:
            self.start.load_state_dict(values["start"])
        elif values["low_rank"] and not self.is_low_rank:
            self._become_low_rank()
        trainee = self.trainee
        info = checkpoint.load(
            source.checkpoint,
            model=trainee.model,
            optimizer=trainee.optimizer,
            scheduler=trainee.scheduler,
            batches=self.loop.batches,
            watch=self.watch,
        )
        self.step = self.saved_step = info.step
        self.loop.seconds = values["seconds"]
        self.ranks = values["ranks"]
        self.log = Logbook(source if self.processes.is_main else None, resume_at=self.step)
        self._describe()

    def _save(self) -> None:
        if self.log.folder is None:
            return
        try:
            checkpoint.save(
                self.log.folder.checkpoint,
                step=self.step,
                model=self.trainee.model,
                optimizer=self.trainee.optimizer,
                scheduler=self.trainee.scheduler,
                batches=self.loop.batches,
                watch=self.watch,
                config=asdict(self.config),
                run={
                    "low_rank": self.is_low_rank,
                    "seconds": self.loop.seconds,
                    "ranks": self.ranks,
                    "start": None if self.start is None else self.start.state_dict(),
                },
            )
        except OSError as error:
            if not self._save_failed:
                _logger.warning("%s Training goes on, and every epoch tries again.", error.strerror or error)
            self._save_failed = True
        else:
            self.saved_step, self._save_failed = self.step, False

    def _describe(self) -> None:
        self.log.describe(
            self.config,
            dense_parameters=self.dense_parameters,
            dense_flops_per_sample=measuring.flops_per_sample(self.applications, {}),
            shapes=self.shapes,
            ranks=self.first_ranks,
            kept_dense={entry.name: entry.reason for entry in self.report.kept_dense},
        )

    # --- training ------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Take all steps that are left. At the last one ranks are frozen and candidates dropped."""
        while self.step < self.moments.steps:
            self.step += 1  # what happens within the step, such as a rank event, counts as after it
            self._take_step()
            if self.step == self.moments.offset:  # never, without a change of optimizer
                self._become_low_rank()
                self._first_cut()
            if self.moments.ends_epoch(self.step):
                self._end_epoch()

    def _take_step(self) -> None:
        trainee, ends_epoch = self.trainee, self.moments.ends_epoch(self.step)
        self.loop.take_step(trainee, before_update=self._log_memory if ends_epoch else None)
        if self.step == self.moments.steps and isinstance(trainee.optimizer, LowRankOptimizer):
            trainee.optimizer.freeze_ranks()
        if self.moments.among(self.step, number=SPECTRA):
            self.log.spectra(self.step, trainee.model)
        if looks_after(self.step, steps=self.moments.steps):
            self.log.look(self.step, self.watch, trainee.optimizer)
        if self.moments.among(self.step, number=LOSSES):
            loss = self.loop.loss()
            self.log.numbers(self.step, loss=loss)
            if not ends_epoch:
                self._tell(loss)

    def _end_epoch(self) -> None:
        accuracy = self.loop.end_epoch()
        quality = self.problem.evaluate(self.trainee.model, "validation")
        self.validation = self.problem.score(quality)
        self.log.numbers(
            self.step,
            accuracy=accuracy,
            validation_accuracy=quality.accuracy,
            validation_loss=quality.loss,
            flops_per_sample=self.flops_per_sample,
            seconds=self.loop.seconds,
        )
        self._log_size()
        self._save()
        self._tell(self.loop.loss(), ended=True)

    def _note_events(self, events: list[RankEvent]) -> None:
        self.ranks |= {event.layer: event.new_rank for event in events}
        self.log.events(events, offset=self.moments.offset)
        self._log_size()

    def _log_size(self) -> None:
        self.log.size(self.step, self.trainee.model, deployed=self.deployed_parameters)

    def _log_memory(self) -> None:
        self.log.memory(self.step, self.trainee.model, self.trainee.optimizer)

    def _tell(self, loss: float, *, ended: bool = False) -> None:
        self.tell(
            Progress(
                network=NAME,
                step=self.step,
                steps=self.moments.steps,
                epoch=self.step // self.moments.per_epoch,
                epochs=self.moments.steps // self.moments.per_epoch,
                loss=loss,
                measure=self.problem.measure,
                validation=self.validation,
                parameters=self.deployed_parameters,
                dense_parameters=self.dense_parameters,
                ranks=dict(self.ranks) if self.is_low_rank else {},
                full_ranks={name: min(shape) for name, shape in self.shapes.items()},
                event="epoch" if ended else "step",
                note="" if self.is_low_rank else "dense warm-up",
            )
        )
