"""The writers of ``save_plain``: each writes a plain model to a file and returns what runs that file."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynarank.errors import missing_extra
from dynarank.export._inputs import Inputs, tensors_of
from dynarank.export._tensors import distinct, write_tensors
from dynarank.factorize.structure import arguments, describe, twin_of

Run = Callable[[Inputs], list[Tensor]]
ONNX_LIMIT = 2**31  # bytes that one protobuf message may have


def write_pt2(path: Path, model: nn.Module, inputs: Inputs, structure: Mapping[str, Any], dynamic_batch: bool) -> Run:
    """Write a program for ``torch.export.load``."""
    with path.open("wb") as file:  # a path would give its name to the folders inside the archive
        torch.export.save(_traced(model, inputs, dynamic_batch), file)
    program = torch.export.load(path).module()
    return lambda inputs: inputs.run(program)


def write_onnx(path: Path, model: nn.Module, inputs: Inputs, structure: Mapping[str, Any], dynamic_batch: bool) -> Run:
    """Write an ONNX file."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise missing_extra(error.name or "onnx", "onnx") from error
    tensors = [*tensors_of(model.state_dict()), *inputs.tensors()]
    if any(tensor.dtype == torch.bfloat16 for tensor in tensors):
        raise ValueError("onnx: onnxruntime has no bfloat16 arithmetic on a CPU. Export model.float() instead.")
    if sum(tensor.nbytes for tensor in tensors) > ONNX_LIMIT:
        raise ValueError("onnx: one file holds at most 2 GiB. Export to 'pt2' instead.")
    with _quiet_exporter():
        program = torch.onnx.export(_traced(model, inputs, dynamic_batch), dynamo=True, verbose=False)
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # source lines and paths of this machine
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(inputs: Inputs) -> list[Tensor]:
        names = [node.name for node in session.get_inputs()]
        arrays = [tensor.detach().cpu().numpy() for tensor in inputs.tensors()]
        return [torch.from_numpy(array) for array in session.run(None, dict(zip(names, arrays, strict=True)))]

    return run


def write_state_dict(
    path: Path, model: nn.Module, inputs: Inputs, structure: Mapping[str, Any], dynamic_batch: bool
) -> Run:
    """Write the state dict, with what it takes to rebuild the layers in the header of the file."""
    tensors, shared = distinct(model.state_dict())
    replaced = [
        (entry["names"], _described(model.get_submodule(name)))
        for name, entry in structure.items()
        if isinstance(model.get_submodule(name), nn.Sequential)
    ]
    plan = {"layers": replaced, "settings": _settings(model), "shared": shared}
    write_tensors(path, tensors, structure=json.dumps(plan))
    return lambda inputs: inputs.run(model)


def _traced(model: nn.Module, inputs: Inputs, dynamic_batch: bool) -> torch.export.ExportedProgram:
    if dynamic_batch and inputs.batch_size() == 1:
        inputs = inputs.doubled()  # torch.export takes a size of 1 for a constant
    shapes = inputs.dynamic_shapes() if dynamic_batch else None
    program = torch.export.export(model, inputs.args, inputs.kwargs, dynamic_shapes=shapes)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # source lines and paths of this machine
    program.example_inputs = None  # the file would hold the user's data
    return program


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Leave out what the exporter of torch says about its own deprecations and about torchvision."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*treespec.*")
            yield
    finally:
        logger.setLevel(level)


def _described(module: Any) -> dict[str, Any]:
    """Return how to build a plain layer or sequence of layers again."""
    if isinstance(module, nn.Sequential):
        return {"type": "Sequential", "layers": [_described(part) for part in module]}
    entry = describe(module)
    return {"type": twin_of(entry["kind"]).dense_type.__name__, "options": arguments(entry)}


def _settings(model: nn.Module) -> dict[str, Any]:
    """Return what keeps the inference fast path of torch away from layers that are not dense."""
    settings: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            settings[name] = {"activation_relu_or_gelu": module.activation_relu_or_gelu}
        elif isinstance(module, nn.TransformerEncoder):
            settings[name] = {"use_nested_tensor": module.use_nested_tensor}
    return settings
