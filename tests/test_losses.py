"""Losses against torch's own, scipy, limits and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from kdunet import losses
from kdunet_infer.errors import ConfigError


def _case(seed: int = 0, size: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(2, 2, size, size, generator=generator) for _ in range(2))
    labels = torch.randint(0, 2, (2, size, size), generator=generator)
    return student, teacher, labels


def test_hard_loss_is_torchs_weighted_cross_entropy() -> None:
    student, _, labels = _case()
    weights = losses.pixel_weights(labels, (0.5, 9.0))
    want = F.cross_entropy(student, labels, weight=torch.tensor([0.5, 9.0]))
    torch.testing.assert_close(losses.hard_loss(student, labels, weights), want)


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_soft_loss_is_scipys_relative_entropy_times_t_squared(temperature: float) -> None:
    student, teacher, labels = _case()
    weights = losses.pixel_weights(labels, (1.0, 3.0))
    p, q = (scipy.special.softmax(z.double().numpy() / temperature, axis=1) for z in (teacher, student))
    per_pixel = scipy.stats.entropy(p, q, axis=1)
    want = temperature**2 * np.average(per_pixel, weights=weights.numpy())
    got = losses.soft_loss(student, teacher, weights, temperature=temperature)
    assert float(got) == pytest.approx(want, rel=1e-5)


def test_soft_loss_is_zero_for_a_perfect_student_whatever_the_weights() -> None:
    _, teacher, labels = _case()
    student = teacher.clone().requires_grad_()
    loss = losses.soft_loss(student, teacher, losses.pixel_weights(labels, (0.5, 9.0)), temperature=2.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-6)
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 1e-6  # class-weighted terms would push away from the teacher here


def test_soft_loss_at_high_temperature_is_a_quarter_of_the_squared_gap_of_centred_logits() -> None:
    # two classes: T^2 KL -> sum of (gap of centred logits)^2 / (2 * 2)
    student, teacher, labels = _case()
    gap = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    want = (gap**2).sum(1).mean() / 4
    got = losses.soft_loss(student.double(), teacher.double(), torch.ones_like(labels), temperature=100.0)
    assert float(got) == pytest.approx(float(want), rel=2e-2)


def test_soft_gradient_keeps_its_size_as_temperature_grows() -> None:
    sizes = []
    for temperature in (5.0, 50.0):
        student, teacher, labels = _case()
        student.requires_grad_()
        losses.soft_loss(student, teacher, torch.ones_like(labels), temperature=temperature).backward()
        assert student.grad is not None
        sizes.append(float(student.grad.norm()))
    assert 0.5 < sizes[0] / sizes[1] < 2.0  # without T^2 it would shrink a hundredfold


def test_dice_is_zero_for_a_certain_right_answer_and_one_for_a_wrong_one() -> None:
    labels = torch.randint(0, 2, (2, 32, 32), generator=torch.Generator().manual_seed(0))
    right = 100.0 * F.one_hot(labels, 2).permute(0, 3, 1, 2).float()
    assert float(losses.soft_dice_loss(right, labels)) == pytest.approx(0.0, abs=1e-6)
    assert float(losses.soft_dice_loss(-right, labels)) == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize("name", ["hard", "soft", "dice"])
def test_gradients_agree_with_finite_differences(name: str) -> None:
    student, teacher, labels = _case(size=3)
    weights = losses.pixel_weights(labels, (0.5, 4.0))

    def loss(logits: torch.Tensor) -> torch.Tensor:
        if name == "hard":
            return losses.hard_loss(logits, labels, weights)
        if name == "soft":
            return losses.soft_loss(logits, teacher, weights, temperature=3.0)
        return losses.soft_dice_loss(logits, labels)

    student.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(student), student)
    direction = torch.randn(student.shape, generator=torch.Generator().manual_seed(1))
    step = 1e-2
    with torch.no_grad():
        slope = (loss(student + step * direction) - loss(student - step * direction)) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=2e-2, abs=1e-4)


@given(fraction=st.floats(0.001, 0.999))
def test_class_weights_balance_the_classes(fraction: float) -> None:
    background, foreground = losses.class_weights("inverse", fraction)
    assert background * (1 - fraction) == pytest.approx(foreground * fraction)
    assert background * (1 - fraction) + foreground * fraction == pytest.approx(1.0)
    assert losses.class_weights("sqrt", fraction) == pytest.approx((background**0.5, foreground**0.5))
    assert losses.class_weights("none", fraction) == (1.0, 1.0)


def test_class_weights_of_the_reports_prior() -> None:
    assert losses.class_weights("inverse", 0.053) == pytest.approx((0.528, 9.43), rel=1e-3)


@pytest.mark.parametrize(
    ("scheme", "fraction", "says"),
    [("balanced", 0.1, "class_weights is 'balanced'; choose"), ("sqrt", 0.0, "foreground fraction of 0; class weights need")],
)
def test_class_weights_refuse(scheme: str, fraction: float, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        losses.class_weights(scheme, fraction)


def test_losses_are_float32_under_half_precision_logits() -> None:
    student, teacher, labels = _case()
    weights = losses.pixel_weights(labels, (1.0, 1.0))
    halves = student.bfloat16(), teacher.bfloat16()
    for loss in (
        losses.hard_loss(halves[0], labels, weights),
        losses.soft_loss(*halves, weights, temperature=5.0),
        losses.soft_dice_loss(halves[0], labels),
    ):
        assert loss.dtype == torch.float32
