"""How ``layer.weight`` shows the product of the factors: for reading and differentiating, not for writing."""

from typing import Any

import torch
from torch import Tensor


class ReadOnlyWeight(torch.Tensor):
    """The product of the factors, as ``layer.weight`` shows it: differentiable, and closed to writing.

    It behaves as a plain tensor in every operation that returns a new one. Operations in place, such as those of
    ``torch.nn.init``, raise instead of changing a temporary. Being a subclass, it also makes
    ``nn.TransformerEncoderLayer`` decline its inference fast path, which would rebuild dense weights.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        # torch.nn.init passes the tensor by name once it has seen a subclass.
        target = args[0] if args else kwargs.get("tensor")
        if isinstance(kwargs.get("out"), cls) or (isinstance(target, cls) and _writes(name)):
            raise RuntimeError(
                f"weight of a low-rank layer is read-only, got {name}(). It is the product of the factors; "
                "use layer.set_weight_(tensor) to start from another dense weight."
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        # weight.data.normal_() and weight[0].zero_() must not change a temporary either.
        return result.as_subclass(cls) if isinstance(result, Tensor) and _is_view(func, name) else result


def _writes(name: str) -> bool:
    return name in ("__setitem__", "__set__", "__delete__") or (name.endswith("_") and not name.endswith("__"))


def _is_view(func: Any, name: str) -> bool:
    if name == "__get__":
        return func.__self__.__name__ in ("data", "T", "mT")
    return name in ("__getitem__", "detach", "flatten", "permute", "reshape", "t", "transpose", "view", "view_as")
