"""Putting one module in the place of another: all its names, its hooks, and torch's inference fast path."""

from typing import Any

from torch import nn

from dynarank.layers.base import AbstractLowRankLayer

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
FAST_PATH = "_fast_path_before_factorize_"  # where a module remembers what was switched off


def replace_(model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Put ``new[old]`` wherever ``old`` is a registered submodule of ``model``, with the hooks of ``old``."""
    for old, module in new.items():
        carry_hooks(old, module)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in new:
                parent._modules[name] = new[child]  # cannot fail halfway, as a caller's __setattr__ could
    _settle_fast_paths(model)


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give ``new`` the very same dictionaries of hooks: the handles that the caller keeps still remove them."""
    for name in HOOKS:
        vars(new)[name] = vars(old)[name]


def carry_attributes(old: nn.Module, new: nn.Module, *, fresh: nn.Module) -> None:
    """Copy what users have set on ``old`` beside what its class sets, as seen on a ``fresh`` instance."""
    vars(new).update(_extra_attributes(old, fresh))


def clashing_attributes(dense: Any, twin: Any) -> list[str]:
    """Return attributes set on a dense layer that its low-rank twin needs for itself."""
    options = twin.dense_options(dense) | {"device": "meta"}
    extra = _extra_attributes(dense, twin.dense_type(**options))
    own = {*dir(twin), *twin.factor_names, *twin.basis_names, *vars(twin.smallest_of(twin.dense_type(**options)))}
    return sorted(extra.keys() & own)


def _extra_attributes(module: nn.Module, fresh: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in vars(fresh)}


def attention_projections(model: nn.Module) -> set[int]:
    """Return the ids of modules that ``nn.MultiheadAttention`` reads as ``out_proj.weight`` without calling them."""
    return {id(module.out_proj) for module in model.modules() if isinstance(module, nn.MultiheadAttention)}


# --- the inference fast path of torch's transformer layers -------------------------------------------------------


def _settle_fast_paths(model: nn.Module) -> None:
    """Switch the fast path off where it would read dense weights, and on again where all weights are dense."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # 0 means "neither ReLU nor GELU": the layer declines before it asks for any weight. Its activation stays.
            _switch(module, "activation_relu_or_gelu", off=0)
        elif isinstance(module, nn.TransformerEncoder):
            # It asks only its first layer; a nested tensor would then reach layers that cannot take one.
            _switch(module, "use_nested_tensor", off=False)


def _switch(module: Any, attribute: str, *, off: object) -> None:
    if any(not _reads_dense(layer) for layer in module.modules() if isinstance(layer, nn.TransformerEncoderLayer)):
        vars(module).setdefault(FAST_PATH, getattr(module, attribute, off))
        setattr(module, attribute, off)
    elif FAST_PATH in vars(module):
        setattr(module, attribute, vars(module).pop(FAST_PATH))


def _reads_dense(layer: Any) -> bool:
    """Whether the weights that the fast path reads are those of dense layers."""
    attention = getattr(layer, "self_attn", None)
    read = (layer.linear1, layer.linear2, getattr(attention, "out_proj", None))
    return not any(isinstance(module, AbstractLowRankLayer | nn.Sequential) for module in read)
