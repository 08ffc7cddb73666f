"""Every module that owns a weight matrix: its names, its kind, and what stands against replacing it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from dynarank._discovery import discover
from dynarank.factorize._replace import clashing_attributes
from dynarank.layers._factored import AbstractFactoredLayer
from dynarank.layers.embedding import unsupported_option

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


@dataclass(frozen=True)
class Site:
    """A module that owns at least one weight of two or more dimensions, or a layer that is low-rank already.

    Args:
        names: All its qualified names; more than one where the module is shared.
        module: The module itself.
        kind: File name of its low-rank twin, such as ``"conv2d"``; otherwise the name of its class.
        twin: Class of its low-rank twin, or None.
        obstacle: Why it cannot be replaced; empty where it can.
    """

    names: tuple[str, ...]
    module: Any
    kind: str
    twin: type[AbstractFactoredLayer] | None
    obstacle: str

    @property
    def name(self) -> str:
        """First qualified name."""
        return self.names[0]

    @property
    def low_rank(self) -> bool:
        """Whether the module is a low-rank layer already."""
        return isinstance(self.module, AbstractFactoredLayer)

    @property
    def is_candidate(self) -> bool:
        """Whether the module is of a type with a low-rank twin and nothing stands against replacing it."""
        return self.twin is not None and not self.obstacle and not self.low_rank

    @property
    def looks_up(self) -> bool:
        """Whether the rows of the weight are looked up, as an embedding does, and not multiplied."""
        return self.twin is not None and self.twin.dense_type is nn.Embedding  # type: ignore[attr-defined]


def find_sites(model: nn.Module) -> list[Site]:
    """Return the sites of ``model`` in the order of ``named_modules()``, each module once."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    partners, aliases = _owners_of_weights(model), _plain_references(model)
    sites = []
    for module in model.modules():
        kind, twin = _twin_of(module)
        if twin is None and not any(_is_matrix(p) for p in module._parameters.values()):
            continue
        own = tuple(names[id(module)])
        obstacle = "" if isinstance(module, AbstractFactoredLayer) else _obstacle(own, module, kind, twin, partners)
        if twin is not None and not obstacle and id(module) in aliases:
            obstacle = f"{aliases[id(module)]} also holds it, outside the registered submodules"
        sites.append(Site(own, module, kind, twin, obstacle))
    return sites


def multiplying(sites: Iterable[Site]) -> set[nn.Module]:
    """Return the modules with a low-rank twin whose input is multiplied by the weight: all but embeddings."""
    return {site.module for site in sites if site.twin is not None and not site.looks_up}


def _twin_of(module: nn.Module) -> tuple[str, type[AbstractFactoredLayer] | None]:
    """Return the kind of ``module`` and its low-rank twin; subclasses of a dense type count as that kind."""
    for kind, cls in discover("dynarank.layers", AbstractFactoredLayer).items():
        if isinstance(module, (cls, cls.dense_type)):  # type: ignore[attr-defined]
            return kind, cls
    return type(module).__name__, None


def _is_matrix(parameter: Tensor | None) -> bool:
    return parameter is not None and (nn.parameter.is_lazy(parameter) or parameter.dim() >= 2)


def _obstacle(
    names: tuple[str, ...],
    module: Any,
    kind: str,
    twin: type[AbstractFactoredLayer] | None,
    partners: dict[Any, list[tuple[int, str]]],
) -> str:
    """Return why ``module`` cannot be replaced, or an empty string."""
    if twin is None:
        return f"{kind} has no low-rank twin"
    reason = _type_obstacle(module, twin) or _weight_obstacle(module) or _hook_obstacle(module)
    if reason:
        return reason
    tied = sorted({name for owner, name in partners.get(_identity(module.weight), []) if owner != id(module)})
    if tied:
        return f"its weight is tied to {', '.join(repr(name) for name in tied)}"
    clashes = clashing_attributes(module, twin)
    if clashes:
        return f"its attribute {clashes[0]!r} means something else in a low-rank layer"
    if names == ("",):
        return "it is the model itself, which cannot be replaced in place; wrap it in nn.Sequential"
    return ""


def _type_obstacle(module: Any, twin: Any) -> str:
    if any(nn.parameter.is_lazy(p) for p in module._parameters.values() if p is not None):
        return "lazy: its shape is not known before the first forward pass"
    if parametrize.is_parametrized(module):
        return "it has parametrizations, which would be lost"
    if type(module) not in (twin.dense_type, NonDynamicallyQuantizableLinear):
        return f"{type(module).__name__} is a subclass of {twin.dense_type.__name__} and may compute something else"
    if "forward" in vars(module):
        return "its forward method was replaced on the instance"
    if getattr(module, "groups", 1) != 1:
        return f"grouped convolution (groups={module.groups})"
    return unsupported_option(module) if isinstance(module, nn.Embedding) else ""


def _weight_obstacle(module: Any) -> str:
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed from other tensors, as weight_norm and pruning do"
    extra = sorted((module._parameters.keys() | module._buffers.keys() | module._modules.keys()) - {"weight", "bias"})
    if extra:
        return f"it holds more than weight and bias: {', '.join(extra)}"
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}; factorise before sharding or quantising"
    if weight.dtype not in DTYPES:
        return f"weights of dtype {weight.dtype} are not supported"
    if weight.numel() == 0:
        return "its weight is empty"
    return ""


def _hook_obstacle(module: Any) -> str:
    """Forward and backward hooks are carried over; these could not be."""
    weight = module.weight
    if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
        return "its weight has gradient hooks, which would be lost"
    if any(getattr(module, hooks) for hooks in STATE_HOOKS):
        return "it has state-dict hooks, which expect a dense weight"
    return ""


# --- who else holds a weight or a module -------------------------------------------------------------------------


def _identity(tensor: Tensor) -> Any:
    """What two tensors share that are one and the same memory, as tied weights do."""
    plain = type(tensor.data) is Tensor and tensor.layout == torch.strided
    if tensor.is_meta or tensor.numel() == 0 or not plain:
        return id(tensor)
    return tensor.device, tensor.data_ptr()


def _owners_of_weights(model: nn.Module) -> dict[Any, list[tuple[int, str]]]:
    """Return for each memory the modules that hold it, as ``(id, qualified name)``."""
    owners: dict[Any, list[tuple[int, str]]] = {}
    for name, module in model.named_modules():
        for key, tensor in (module._parameters | module._buffers).items():
            if tensor is not None and not nn.parameter.is_lazy(tensor):
                full = name if key == "weight" else f"{name}.{key}".lstrip(".")
                owners.setdefault(_identity(tensor), []).append((id(module), full))
    return owners


def _plain_references(model: nn.Module) -> dict[int, str]:
    """Return modules that stand in an ordinary attribute of another: replacing the submodule would miss those."""
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers", "_modules"):
                owner = f"attribute {key!r} of {name or 'the model'!r}" if name else f"attribute {key!r} of the model"
                found.update({id(held): owner for held in _held(value) if held is not module})
    return found


def _held(value: Any, depth: int = 2) -> Iterator[nn.Module]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple | set) and depth:
        for item in value:
            yield from _held(item, depth - 1)
    owner = value if isinstance(value, nn.Module) else getattr(value, "__self__", None)
    if isinstance(owner, nn.Module):
        yield owner
