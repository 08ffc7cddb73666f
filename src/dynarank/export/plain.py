"""A compressed model as plain layers, in a file that needs no dynarank."""

import copy
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dynarank._files import replacing
from dynarank.errors import unknown_name
from dynarank.export._inputs import as_inputs, largest_difference
from dynarank.export._programs import write_onnx, write_pt2, write_state_dict
from dynarank.factorize import MergedLayer, MergeReport, to_plain_
from dynarank.factorize.structure import CHAIN, structure
from dynarank.layers._factored import factored_layers

INPUTS = ("in_channels", "in_features", "num_embeddings")  # what layers call the sizes of their weights
OUTPUTS = ("out_channels", "out_features", "embedding_dim")
FORMATS = {"pt2": (".pt2", write_pt2), "onnx": (".onnx", write_onnx), "state_dict": (".safetensors", write_state_dict)}


@dataclass(frozen=True)
class PlainReport:
    """What ``save_plain`` wrote. ``print(report)`` shows a table.

    Args:
        file: The file.
        format: Its format.
        bytes: Its length.
        dense_bytes: Bytes of the state dict that the dense model would have.
        largest_difference: Largest difference between outputs of the file and of the model in eval mode, on the example
            inputs and, with a dynamic batch, on twice as many.
        layers: What became of every low-rank layer.
    """

    file: Path
    format: str
    bytes: int
    dense_bytes: int
    largest_difference: float
    layers: tuple[MergedLayer, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as a plain dictionary that JSON can hold."""
        return asdict(self) | {"file": str(self.file)}

    def __str__(self) -> str:
        table = f"{MergeReport(self.layers)}\n" if self.layers else ""
        return (
            f"{table}{self.file.name}: {self.bytes:,} bytes, {self.bytes / self.dense_bytes:.1%} of the "
            f"{self.dense_bytes:,} of the dense weights; outputs differ by at most {self.largest_difference:.1e}."
        )


def save_plain(
    path: str | os.PathLike[str],
    model: nn.Module,
    example_inputs: Any,
    *,
    format: Literal["pt2", "onnx", "state_dict"] = "pt2",
    dynamic_batch: bool = False,
) -> PlainReport:
    """Save a copy of a model for inference, with plain torch layers in a row in place of each low-rank one.

    ``"pt2"`` is a program that torch alone loads and runs: ``torch.export.load(path).module()(x)``. ``"onnx"`` is for
    ONNX runtimes. ``"state_dict"`` is a safetensors file for the dense architecture; its header says which layers to
    put in, and this function, which needs no dynarank, does it::

        def load_plain(path, model):
            def build(part):
                if part["type"] == "Sequential":
                    return nn.Sequential(*map(build, part["layers"]))
                return getattr(nn, part["type"])(**part["options"])

            with safetensors.safe_open(path, framework="pt") as file:
                plan = json.loads(file.metadata()["structure"])
                state = {name: file.get_tensor(name).clone() for name in file.keys()}
            state |= {name: state[owner] for name, owner in plan["shared"].items()}
            for names, part in plan["layers"]:
                new = build(part)
                for parent, _, child in (name.rpartition(".") for name in names):
                    setattr(model.get_submodule(parent), child, new)
            for name, values in plan["settings"].items():
                vars(model.get_submodule(name)).update(values)
            model.load_state_dict(state, assign=True)
            return model

    Layers become dense where two would not be smaller, and inside ``nn.MultiheadAttention``. The file is for the eval
    mode. It is there whole or not at all, and holds neither example inputs nor source code.

    Args:
        path: The file, with the suffix ``.pt2``, ``.onnx`` or ``.safetensors``; an old one is replaced.
        model: Any model; usually one with low-rank layers. Dense parameters are not copied meanwhile.
        example_inputs: A tensor, a tuple of positional or a mapping of keyword arguments.
        format: One of the three.
        dynamic_batch: Whether the program takes batches of any size: the first dimension of every input whose first
            dimension is as large as that of the first input. A state dict always does.

    Raises:
        ValueError: The format is unknown, the suffix is another, or the format cannot hold the model.
        RuntimeError: The file computes outputs of other shapes, torch cannot trace the model, or it is wrapped for
            distributed training.
        ImportError: The extra ``onnx`` is not installed.
        OSError: Writing fails. An old file is still there.

    Example:
        >>> import tempfile, torch
        >>> from dynarank.factorize import factorize_
        >>> model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
        >>> report = factorize_(model, rank=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = save_plain(Path(folder, "m.pt2"), model, torch.ones(2, 64), dynamic_batch=True)
        ...     program = torch.export.load(report.file).module()
        >>> program(torch.ones(5, 64)).shape, report.largest_difference < 1e-6, report.layers[0].form
        (torch.Size([5, 10]), True, 'plain')
    """
    if format not in FORMATS:
        raise unknown_name("format", format, FORMATS)
    path, (suffix, write) = Path(path), FORMATS[format]
    if path.suffix != suffix:
        raise ValueError(f"path must end in {suffix} for the format {format!r}, got {path.name!r}.")
    if isinstance(model, DistributedDataParallel):
        raise RuntimeError("save_plain got a model wrapped by DistributedDataParallel. Pass model.module.")
    inputs = as_inputs(example_inputs)
    batches = [inputs, inputs.doubled()] if dynamic_batch else [inputs]
    plain, described = _copied(model).eval(), structure(model)
    expected = [batch.run(plain) for batch in batches]
    layers = to_plain_(plain).entries if factored_layers(plain) else ()
    with replacing(path) as partial:
        run = write(partial, plain, inputs, described, dynamic_batch)
        difference = max(
            largest_difference(run(batch), wanted) for batch, wanted in zip(batches, expected, strict=True)
        )
    return PlainReport(path, format, path.stat().st_size, _dense_bytes(model, described), difference, layers)


def _copied(model: nn.Module) -> Any:
    """Return a copy of the model with factors and buffers of its own; dense parameters are those of the model."""
    layers = factored_layers(model).values()
    factors = {id(layer._parameters.get(name)) for layer in layers for name in layer.factor_names}
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if id(p) not in factors})


def _dense_bytes(model: nn.Module, described: Mapping[str, Any]) -> int:
    """Return the bytes of the state dict with every low-rank layer, or chain, as one dense layer."""
    total, factors = 0, set()
    for name, entry in described.items():
        parts = list(entry["layers"].values()) if entry["kind"] == CHAIN else [entry]
        first, last = parts[0]["options"], parts[-1]["options"]
        sides = ((first, INPUTS), (last, OUTPUTS))
        ends = [next(options[key] for key in keys if key in options) for options, keys in sides]
        kernel = math.prod(size for part in parts for size in part["options"].get("kernel_size", ()))
        stored = model.get_submodule(name).state_dict(keep_vars=True)
        weights = [tensor for key, tensor in stored.items() if not key.endswith("bias")]
        total += math.prod(ends) * kernel * weights[0].element_size()
        factors |= {id(tensor) for tensor in weights}
    others = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values() if isinstance(tensor, Tensor)}
    return total + sum(tensor.nbytes for key, tensor in others.items() if key not in factors)
