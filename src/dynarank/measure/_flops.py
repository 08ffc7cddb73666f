"""Floating-point operations of a forward pass, counted operator by operator."""

from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dynarank.measure._batches import copied
from dynarank.measure._forward import Forward, call, evaluating, unfused


def flops(model: nn.Module, batch: Any, *, forward: Forward = call) -> int:
    """Return the FLOPs of one forward pass in eval mode without gradients: 2 for each multiplication and addition.

    Matrix products, convolutions and attention count; biases, activations and normalisations do not. Causal attention
    counts as if nothing were masked. An operator without a formula, such as cuDNN's recurrent layers or a kernel of
    your own, counts 0.

    Args:
        model: The model; training flags are put back.
        batch: What ``forward`` takes.
        forward: How a batch enters the model.

    Example:
        >>> flops(nn.Linear(100, 50), torch.zeros(3, 100))  # 2 * 3 * 100 * 50
        30000
    """
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    with evaluating(model), unfused(), counter:
        forward(model, copied(batch))
    return counter.get_total_flops()


def _formulas() -> dict[Any, Any]:
    """Return what torch's counter leaves out; each formula takes the shapes of the arguments of its operator."""
    aten = torch.ops.aten
    formulas = {
        "_scaled_dot_product_flash_attention_for_cpu": _attention,
        "mkldnn_rnn_layer": _recurrent_layer,
        "mv": lambda A, x, **_: 2 * prod(A),
        "addmv": lambda y, A, x, **_: 2 * prod(A),
        "dot": lambda x, y, **_: 2 * prod(x),
        "addbmm": lambda C, A, B, **_: 2 * prod(A) * B[-1],
    }
    return {getattr(aten, name): formula for name, formula in formulas.items() if hasattr(aten, name)}


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Scores ``Q K^T`` and the mixture of the values: ``2 heads T S (d + e)`` a sequence."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[-2] * (width + value[-1])


def _recurrent_layer(x: Any, of_input: Any, of_state: Any, *_: Any, **__: Any) -> int:
    """Both matrices of an LSTM at every step of every sequence."""
    return 2 * prod(x[:2]) * (prod(of_input) + prod(of_state))
