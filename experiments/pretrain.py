"""Trains the dense networks that compression starts from, and narrower ones from scratch, and keeps their weights.

    python experiments/pretrain.py resnet20 --out runs/trained

With ``--fraction`` a narrower network of that part of the parameters is trained instead; ``--steps`` gives it more steps.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from dynarank.checkpoint import save_model
from dynarank.experiments.pretraining import pretrain
from dynarank.experiments.tasks import TASKS
from dynarank.factorize import deployed_parameters

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("task", choices=sorted(TASKS))
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--fraction", type=float)
parser.add_argument("--steps", type=int)
parser.add_argument("--data-dir")
parser.add_argument("--out", default="runs/trained")
options = parser.parse_args()

torch.set_num_threads(1)
task = TASKS[options.task](options.data_dir)
whole = deployed_parameters(task.model())
began = time.monotonic()
model = pretrain(
    task,
    seed=options.seed,
    steps=options.steps,
    parameters=None if options.fraction is None else int(options.fraction * whole),
    tell=lambda step, steps, loss: print(f"step {step} of {steps}: loss {loss:.4f}", flush=True),
)
quality = {part: vars(task.evaluate(model, part)) for part in ("validation", "test")}
found = {
    "task": options.task,
    "seed": options.seed,
    "fraction": options.fraction,
    "steps": options.steps or task.training_steps,
    "parameters": deployed_parameters(model),
    "seconds": round(time.monotonic() - began),
    **quality,
}
name = f"{options.task}-{options.seed}" + (f"-{options.fraction:g}" if options.fraction else "")
save_model(Path(options.out) / name, model, **found)
print(json.dumps(found))
