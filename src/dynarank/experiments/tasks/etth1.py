"""Forecasts of ETTh1, the load of an electricity transformer."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynarank.data import Batches, HourlySeries, load_etth1
from dynarank.experiments.tasks.base import AbstractTask, Quality
from dynarank.measure import call
from dynarank.models import Forecaster

LOOKBACK, HORIZON = 14 * 24, 4 * 24  # hours
BATCH = 16


@final
class ETTh1Task(AbstractTask):
    """A transformer of three blocks, 128 wide, that forecasts all seven series of ETTh1 for four days from two weeks.

    The loss is the mean squared error of the standardised series over all stretches of a part. It is trained by AdamW
    in bfloat16.

    Reference:
        Nie, Nguyen, Sinthong, Kalagnanam, "A time series is worth 64 words: long-term forecasting with transformers",
        ICLR 2023, https://arxiv.org/abs/2211.14730.
    """

    measure = "loss"
    training_steps = 1000
    adamw: ClassVar = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.0}

    @cached_property
    def series(self) -> HourlySeries:
        """The seven series; the months after the first twelve are for validation and test, four each."""
        return load_etth1(self.data_dir)

    def model(self) -> nn.Module:
        return Forecaster(lookback=LOOKBACK, horizon=HORIZON, dropout=0.2)

    def narrower(self, parameters: int) -> nn.Module:
        return self.model().narrower(parameters)  # type: ignore[operator]

    def training_batches(self, seed: int, *, batch_size: int = BATCH) -> Iterator[Any]:
        return Batches(*self._windows("train"), batch_size, torch.Generator().manual_seed(seed))

    def calibration_batches(self) -> list[Any]:
        batches = Batches(*self._windows("train"), BATCH, torch.Generator().manual_seed(1))
        return [batches.next_batch() for _ in range(8)]

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(model.parameters(), **self.adamw)]

    def forward(self, model: nn.Module, batch: Any) -> Any:
        with torch.autocast(batch[0].device.type, torch.bfloat16):
            return call(model, batch)

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return functional.mse_loss(outputs.float(), batch[1])

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: str = "test") -> Quality:
        inputs, targets = self._windows(part)
        was_training, total = model.training, 0.0
        model.eval()
        for known, wanted in zip(inputs.split(128), targets.split(128), strict=True):
            total += float(functional.mse_loss(model(known), wanted, reduction="sum"))
        model.train(was_training)
        return Quality(total / targets.numel())

    def _windows(self, part: str) -> tuple[Tensor, Tensor]:
        return self.series.windows(part, lookback=LOOKBACK, horizon=HORIZON)
