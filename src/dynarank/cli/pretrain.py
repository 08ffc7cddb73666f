"""The command ``pretrain``: the network of a built-in task, trained from scratch and kept."""

import time

from dynarank.checkpoint import save_model
from dynarank.cli.arguments import Pretrain
from dynarank.cli.stages import telling
from dynarank.errors import unknown_name
from dynarank.experiments.compression import Stage
from dynarank.experiments.pretraining import pretrain
from dynarank.experiments.proof import score_text
from dynarank.experiments.result_folder import new_folder
from dynarank.experiments.tasks import TASKS
from dynarank.factorize import deployed_parameters


def run_pretraining(command: Pretrain) -> None:
    """Train the network of a task, save its weights, and print how well it does.

    Raises:
        ValueError: The task is unknown, an option is out of range, or the folder is not empty.
    """
    if command.task not in TASKS:
        raise unknown_name("task", command.task, TASKS)
    if command.steps is not None and command.steps < 1:
        raise ValueError(f"steps must be at least 1, got {command.steps}.")
    if command.fraction is not None and not 0 < command.fraction < 1:
        raise ValueError(f"fraction must be between 0 and 1, got {command.fraction}.")
    task = TASKS[command.task](command.data_dir)
    steps = command.steps or task.training_steps
    parameters = None if command.fraction is None else int(command.fraction * deployed_parameters(task.model()))
    name = f"{command.task}-{command.seed}" + (f"-{command.fraction:g}" if command.fraction else "")
    with new_folder(command.out or f"runs/trained/{name}", name=name) as folder:
        began = time.monotonic()
        with telling() as tell:
            model = pretrain(
                task,
                seed=command.seed,
                steps=steps,
                parameters=parameters,
                tell=lambda step, steps, loss: tell(Stage("training", step, steps, loss)),
            )
        seconds = time.monotonic() - began
        quality = {part: vars(task.evaluate(model, part)) for part in ("validation", "test")}
        size = deployed_parameters(model)
        options = {"task": command.task, "seed": command.seed, "fraction": command.fraction, "steps": steps}
        save_model(folder, model, **options, parameters=size, seconds=round(seconds), **quality)
    for part, scores in quality.items():
        print(f"{part:<12}{', '.join(f'{n} {score_text(n, v)}' for n, v in scores.items() if v is not None)}")
    print(f"{'parameters':<12}{size:,}\n{'weights':<12}{folder}")
