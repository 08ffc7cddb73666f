"""Finding the classifier head by its role: what computes the model's output, never what was registered last."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from dynarank.measure import evaluating

NAMES = frozenset(
    [
        "head",
        "heads",
        "classifier",
        "classification_head",
        "cls_head",
        "lm_head",
        "output_head",
        "out_head",
        "fc_out",
        "logits",
        "to_logits",
        "output",
        "outputs",
        "output_layer",
        "out_layer",
        "final_layer",
        "output_projection",
        "score",
        "qa_outputs",
        "embed_out",
        "unembed",
    ]
)
NAME_ENDS = ("_head", "_classifier", "_logits")
WEAK_NAMES = frozenset(["decoder", "fc", "fc_final", "out"])  # believed only when nothing else is known
Heads = dict[nn.Module, str]  # module: how it was recognised


def find_heads(model: nn.Module, candidates: set[nn.Module], example_inputs: Any = None) -> Heads:
    """Return the layers that compute the model's output, each with how it was recognised; often one, maybe none.

    In this order: the layer that was seen to write the output for ``example_inputs``; what the model itself declares;
    a telling attribute name at the top; the last layer of nested ``nn.Sequential``; the layer that feeds the output in
    a symbolic trace. The order of registration never decides.

    Args:
        model: The model.
        candidates: Layers among which heads are looked for.
        example_inputs: A batch for the model, a tuple of positional or a mapping of keyword arguments; None for none.
    """
    if example_inputs is not None:
        return _by_running(model, candidates, example_inputs)
    return _declared(model, candidates) or _search(model, candidates, top=True)


def _declared(model: nn.Module, candidates: set[nn.Module]) -> Heads:
    for method in ("get_output_embeddings", "get_classifier"):
        try:
            head = getattr(model, method)()
        except (AttributeError, NotImplementedError, TypeError):
            continue
        if head in candidates:
            return {head: f"returned by {method}()"}
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    tied = [m for m in model.modules() if isinstance(m, nn.Linear) and id(getattr(m, "weight", None)) in embedded]
    return dict.fromkeys(tied, "its weight is tied to an embedding")


def _search(module: nn.Module, candidates: set[nn.Module], *, top: bool = False) -> Heads:
    if module in candidates:
        return {module: "the only layer with a low-rank twin"}
    inside = {name: child for name, child in module.named_children() if _holds(child, candidates)}
    if isinstance(module, nn.MultiheadAttention):
        return {}
    if len(inside) == 1 and not module._parameters:
        return _search(next(iter(inside.values())), candidates, top=top)
    ways: tuple[Callable[[], Heads], ...] = (
        lambda: _by_name(inside, candidates),
        lambda: _last_of_sequential(module, candidates),
        lambda: _by_tracing(module, candidates),
        lambda: _by_weak_name(inside, candidates) if top else {},
    )
    return next((heads for way in ways if (heads := way())), {})


def _holds(module: nn.Module, candidates: set[nn.Module]) -> bool:
    return any(child in candidates for child in module.modules())


def _by_name(inside: dict[str, nn.Module], candidates: set[nn.Module]) -> Heads:
    heads = {}
    for name, child in inside.items():
        if (name in NAMES or name.endswith(NAME_ENDS)) and not isinstance(child, nn.MultiheadAttention):
            # Where the head is a block of which no part stands out, all of it stays dense.
            found = _search(child, candidates) or [m for m in child.modules() if m in candidates]
            heads.update(dict.fromkeys(found, f"recognised by the attribute name {name!r}"))
    return heads


def _by_weak_name(inside: dict[str, nn.Module], candidates: set[nn.Module]) -> Heads:
    named = {name: child for name, child in inside.items() if name in WEAK_NAMES and child in candidates}
    return {child: f"recognised by the attribute name {name!r}" for name, child in named.items()}


def _last_of_sequential(module: nn.Module, candidates: set[nn.Module]) -> Heads:
    children = list(module.children()) if isinstance(module, nn.Sequential) else []
    for child in reversed(children):
        if _holds(child, candidates):
            return dict.fromkeys(_search(child, candidates), "the last layer of nn.Sequential")
    return {}


# --- by symbolic tracing -----------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Steps into every module but the candidates and torch's own; leaves buffers alone."""

    proxy_buffer_attributes = True

    def __init__(self, candidates: set[nn.Module]) -> None:
        super().__init__()
        self.candidates = candidates

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.candidates or super().is_leaf_module(m, module_qualified_name)


def _by_tracing(model: nn.Module, candidates: set[nn.Module]) -> Heads:
    kept = {module: dict(vars(module)) for module in model.modules()}
    tracer = _Tracer(candidates)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
            graph = tracer.trace(model)
    except Exception:  # noqa: BLE001 - tracing runs the user's forward on proxies, and that may raise anything
        return {}
    finally:
        vars(tracer).clear()  # tracing ends in a reference cycle, which would keep the layers after their replacement
        for module, attributes in kept.items():  # a forward that stores something on self has stored a proxy
            vars(module).clear()
            vars(module).update(attributes)
    modules = dict(model.named_modules(remove_duplicate=False))
    output = next(node for node in graph.nodes if node.op == "output")
    starts = [leaf for leaf in tree_leaves(output.args) if isinstance(leaf, fx.Node)]
    heads = [head for start in starts if (head := _producer(start, modules, candidates)) is not None]
    return dict.fromkeys(heads, "feeds the output in a symbolic trace")


def _producer(node: fx.Node, modules: Mapping[str, nn.Module], candidates: set[nn.Module]) -> nn.Module | None:
    """Follow a chain of parameter-free operations back to a candidate; a sum of branches has no single producer."""
    while True:
        module = modules[str(node.target)] if node.op == "call_module" else None
        if module in candidates:
            return module
        free = module is None or not any(True for _ in module.parameters())
        if node.op not in ("call_module", "call_function", "call_method") or not free or len(node.all_input_nodes) != 1:
            return None
        node = node.all_input_nodes[0]


# --- by running --------------------------------------------------------------------------------------------------


def _by_running(model: nn.Module, candidates: set[nn.Module], example_inputs: Any) -> Heads:
    written: list[tuple[nn.Module, Tensor]] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        written.append((module, output))  # kept until the end, so that no address is used twice

    handles = [module.register_forward_hook(note) for module in candidates]
    try:
        with evaluating(model):
            result = call_with(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    finals = {_memory(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)} - {0}
    heads = {module: "seen to write the output" for module, output in written if _memory(output) in finals}
    return heads or ({written[-1][0]: "the last layer executed"} if written else {})


def call_with(model: nn.Module, example_inputs: Any) -> Any:
    """Return what a model computes of its inputs: one, a tuple of them, or a mapping of keyword arguments."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    return model(*example_inputs) if isinstance(example_inputs, Sequence) else model(example_inputs)


def _memory(output: Any) -> int:
    return output.data_ptr() if isinstance(output, Tensor) else 0
