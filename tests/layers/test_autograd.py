"""Low-rank layers are ordinary modules to autograd, torch.func, autocast and every dtype and device."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from dynarank.layers.linear import LowRankLinear

EXACT = {"atol": 1e-12, "rtol": 1e-12}


def functional(layer: nn.Module, names: list[str]) -> Any:
    return lambda x, *tensors: torch.func.functional_call(layer, dict(zip(names, tensors, strict=True)), (x,))


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_first_and_second_derivatives_are_right(kind: Any, form: str, memory: Any):
    tiny = type(kind)(kind.cls, *small(kind))
    layer = tiny.build(2)
    layer.set_factors(layer.factors(), form=form)
    names = [name for name, _ in layer.named_parameters()]
    x = tiny.inputs()
    if x.dim() == 4:
        x = x.to(memory_format=memory)
    inputs = (x.requires_grad_(not kind.looks_up), *(p.detach().clone().requires_grad_() for p in layer.parameters()))
    assert torch.autograd.gradcheck(functional(layer, names), inputs)
    assert torch.autograd.gradgradcheck(functional(layer, names), inputs)


def small(kind: Any) -> tuple[Any, Any]:
    """Sizes and an input shape small enough for a numerical Jacobian."""
    dimensions = len(kind.shape) - 2
    if dimensions == 0:
        return (4, 3), (2, 4)
    return (2, 5, 2), (2, 2, *(3, 2, 2)[:dimensions])


def test_functional_grad_is_that_of_backward(kind: Any):
    layer, x = kind.build(), kind.inputs()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    grads = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).square().sum())(parameters)
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, **EXACT)


def test_per_sample_gradients_add_up(kind: Any):
    layer, x = kind.build(), kind.inputs()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(p: Any, sample: Any) -> Any:
        return torch.func.functional_call(layer, p, (sample,)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert per_sample[name].shape == (len(x), *parameter.shape)
        torch.testing.assert_close(per_sample[name].sum(0), parameter.grad, **EXACT)


def test_vmap_over_an_ensemble(kind: Any):
    layers = [kind.build() for _ in range(3)]
    x = kind.inputs()
    parameters, buffers = torch.func.stack_module_state(layers)
    together = torch.func.vmap(lambda p, b: torch.func.functional_call(layers[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(together, torch.stack([layer(x) for layer in layers]), **EXACT)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # raised inside torch.func.jvp
def test_forward_mode(kind: Any):
    if kind.looks_up:
        pytest.skip("indices have no tangent")
    layer, x = kind.build(), kind.inputs()
    v = torch.randn_like(x)
    _, tangent = torch.func.jvp(layer, (x,), (v,))
    dense = layer.to_dense()
    dense.bias = None
    torch.testing.assert_close(tangent, dense(v), **EXACT)


def test_autocast_gives_the_dtype_of_the_twin_and_keeps_float32_gradients(kind: Any, form: str):
    layer, x = kind.build().float(), kind.inputs(torch.float32)
    layer.set_factors(layer.factors(), form=form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        expected = layer.to_dense()(x)
    assert y.dtype == expected.dtype == (torch.float32 if kind.looks_up else torch.bfloat16)
    torch.testing.assert_close(y.float(), expected.float(), atol=0.2, rtol=0.05)
    y.float().square().sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(kind: Any, form: str, dtype: torch.dtype):
    layer, x = kind.build(), kind.inputs(dtype)
    layer.set_factors(layer.factors(), form=form)
    layer.to(dtype)
    y = layer(x)
    y.float().square().sum().backward()
    assert y.dtype == dtype and layer.weight.dtype == dtype
    assert {p.grad.dtype for p in layer.parameters()} == {dtype}
    dense, plain = layer.to_dense(), layer.to_plain()
    assert {p.dtype for p in [*dense.parameters(), *plain.parameters()]} == {dtype}
    torch.testing.assert_close(dense(x).float(), y.float(), atol=0.2, rtol=0.05)
    torch.testing.assert_close(plain(x).float(), y.float(), atol=0.2, rtol=0.05)


def test_half_precision_is_merged_in_float32(form: str):
    layer = LowRankLinear(64, 48, rank=8).bfloat16()
    layer.set_factors(layer.factors(), form=form)
    point = layer.point()
    parts = [getattr(point, name).double() for name in ("ABUSV" if form == "pair" else "USV") if hasattr(point, name)]
    exact = parts[0].mT @ parts[1] if form == "pair" else parts[0] @ parts[1] @ parts[2].mT
    # One rounding of the product: half a unit in the last of 8 bits, and the error of float32.
    assert ((layer.to_dense().weight.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


def test_decompositions_of_half_precision_run_in_float32(kind: Any):
    layer = kind.build().bfloat16()
    read = layer.factors()
    assert {read.U.dtype, read.S.dtype, read.V.dtype} == {torch.float32}
    layer.set_weight_(torch.randn(layer.weight_shape).bfloat16())
    assert layer.A.dtype == torch.bfloat16


def test_meta_device_needs_no_memory_and_no_randomness(kind: Any):
    state = torch.get_rng_state()
    layer = kind.cls(*kind.sizes, **kind.options, rank=2, device="meta")
    dense = layer.dense_type(*kind.sizes, **kind.options, device="meta")
    other = kind.cls.from_dense(dense, rank=3, rank_multiple=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.A.is_meta and other.A.is_meta and all(p.is_meta for p in layer.parameters())
    assert (layer.rank, other.rank, other.capacity) == (2, 3, 4)
    assert layer(kind.inputs(torch.float32).to("meta")).is_meta
    assert layer.to_dense().weight.is_meta and layer.to_plain()[0].weight.is_meta
    layer.to_empty(device="cpu").reset_parameters()
    assert torch.isfinite(layer(kind.inputs(torch.float32))).all()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_frozen_weight_gives_frozen_factors(kind: Any, device: str):
    dense = kind.cls.dense_type(*kind.sizes, **kind.options, device=device)
    dense.weight.requires_grad_(False)
    layer = kind.cls.from_dense(dense.eval(), rank=2)
    assert not layer.A.requires_grad and not layer.B.requires_grad and not layer.training
    assert kind.looks_up or (layer.bias is dense.bias and layer.bias.requires_grad)
    assert not layer.to_dense().weight.requires_grad


def test_from_dense_is_the_best_approximation_and_draws_nothing(kind: Any):
    dense = kind.cls.dense_type(*kind.sizes, **kind.options, dtype=torch.float64)
    state = torch.get_rng_state()
    layer = kind.cls.from_dense(dense, rank=2)
    assert torch.equal(torch.get_rng_state(), state)
    W = layer.as_matrix(dense.weight.detach())
    error = torch.linalg.matrix_norm(layer.as_matrix(layer.to_dense().weight) - W)
    torch.testing.assert_close(error, torch.linalg.vector_norm(torch.linalg.svdvals(W)[2:]), **EXACT)
    full = kind.cls.from_dense(dense, rank=layer.max_rank)
    torch.testing.assert_close(full.to_dense().weight, dense.weight, **EXACT)
    assert kind.looks_up or full.to_dense().bias is dense.bias


def test_deepcopy_is_independent(kind: Any, form: str):
    layer, x = kind.build(2, rank_multiple=4), kind.inputs()
    layer.set_factors(layer.factors(), form=form)
    twin = copy.deepcopy(layer)
    assert (twin.rank, twin.capacity, twin.form) == (layer.rank, layer.capacity, layer.form)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not twin(x).any() and layer(x).any()


def test_compile_traces_one_graph(kind: Any):
    layer, x = kind.build(), kind.inputs()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), **EXACT)


def test_export(kind: Any):
    layer, x = kind.build(), kind.inputs()
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x), **EXACT)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7)])
def test_gradients_of_a_linear_layer_are_computed_rank_first(shape: tuple[int, ...], bias: bool):
    layer, arrived = LowRankLinear(7, 9, bias, rank=2), []
    for factor in (layer.A, layer.B):
        factor.register_hook(lambda gradient: arrived.append(gradient.stride()))  # before it is copied to .grad
    layer(torch.randn(shape, requires_grad=True)).sum().backward()
    assert sorted(arrived) == [(7, 1), (9, 1)]


def test_gradients_have_the_layout_of_the_parameters(kind: Any, form: str):
    layer, x = kind.build(), kind.inputs()
    layer.set_factors(layer.factors(), form=form)
    layer(x).square().sum().backward()
    assert all(p.grad.stride() == p.stride() and p.grad.is_contiguous() for p in layer.parameters())
