"""Distances between outputs, against their formulas and finite differences, and training with them."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynarank.compress import SoftTargets, compress_, cosine_distance, recover_

EXACT = {"atol": 1e-12, "rtol": 1e-10}


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    student, teacher = torch.randn(2, *shape, dtype=torch.float64)
    return student, teacher


@pytest.mark.parametrize("shape", [(5,), (1, 5), (4, 5), (2, 3, 5)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
def test_soft_targets_are_the_divergence_of_softened_probabilities(shape: tuple[int, ...], temperature: float):
    student, teacher = pair(*shape)
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    expected = temperature**2 * (p * (p.log() - q.log())).sum(-1).mean()
    torch.testing.assert_close(SoftTargets(temperature)(student, teacher), expected, **EXACT)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_gradient_is_that_of_finite_differences_and_of_the_formula(temperature: float):
    student, teacher = pair(3, 4)
    student.requires_grad_()
    loss = SoftTargets(temperature)
    (gradient,) = torch.autograd.grad(loss(student, teacher), student)
    q, p = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    torch.testing.assert_close(gradient, temperature * (q - p).detach() / 3, **EXACT)
    step, differences = 1e-6, torch.zeros_like(gradient)
    for i in range(3):
        for j in range(4):
            nudge = torch.zeros_like(gradient)
            nudge[i, j] = step
            ahead, behind = loss(student.detach() + nudge, teacher), loss(student.detach() - nudge, teacher)
            differences[i, j] = (ahead - behind) / (2 * step)
    torch.testing.assert_close(gradient, differences, atol=1e-8, rtol=1e-6)


def test_the_size_of_the_gradient_outlasts_the_temperature():
    student, teacher = pair(6, 10)
    student, teacher = student * 0.01, teacher * 0.01  # where softened probabilities are linear in the logits
    norms = []
    for temperature in (1.0, 10.0, 100.0):
        logits = student.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(SoftTargets(temperature)(logits, teacher), logits)
        norms.append(float(gradient.norm()))
    assert norms == pytest.approx([norms[0]] * 3, rel=0.02)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_equal_logits_are_at_no_distance_whatever_is_added_to_all_classes(temperature: float):
    student, _ = pair(3, 4)
    logits = (student + 5).requires_grad_()
    loss = SoftTargets(temperature)(logits, student)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert abs(float(loss.detach())) < 1e-14
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), **EXACT)


def test_no_other_logits_are_nearer():
    _, teacher = pair(20, 4)
    loss = SoftTargets()
    assert all(float(loss(teacher + 0.1 * torch.randn_like(teacher), teacher)) > 0 for _ in range(10))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("distance", [SoftTargets(), cosine_distance])
def test_narrow_outputs_are_computed_in_float32(dtype: torch.dtype, distance: Any):
    student, teacher = (y.to(dtype) for y in pair(8, 5))
    found = distance(student, teacher)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, distance(student.double(), teacher.double()).float())


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_must_be_positive(temperature: float):
    with pytest.raises(ValueError, match=f"temperature must be above 0, got {temperature}"):
        SoftTargets(temperature)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)])
def test_cosine_distance_is_one_less_the_mean_cosine(shape: tuple[int, ...]):
    student, teacher = pair(*shape)
    cosines = (student * teacher).sum(-1) / (student.norm(dim=-1) * teacher.norm(dim=-1))
    torch.testing.assert_close(cosine_distance(student, teacher), 1 - cosines.mean(), **EXACT)
    assert float(cosine_distance(3 * student, student)) == pytest.approx(0, abs=1e-12)


def test_integrators_with_two_gradients_recover_too():
    """The teacher draws the truncated network back, with the closure run twice a step."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 5))
    smaller, batches = copy.deepcopy(dense), [torch.randn(32, 20) for _ in range(4)]
    compress_(smaller, 0.5)
    found = recover_(smaller, batches, teacher=dense, steps=300, lr=1.0, integrator="unconventional_bug")
    assert found.last_loss < 0.5 * found.first_loss
