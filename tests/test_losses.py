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
    student, teacher = (3 * torch.randn(2, size, size, generator=generator) for _ in range(2))
    labels = torch.randint(0, 2, (2, size, size), generator=generator).byte()
    return student, teacher, labels


def _logits(margins: torch.Tensor) -> torch.Tensor:
    """Two-class logits (n, 2, y, x) of that margin; any common shift is the same distribution."""
    return torch.stack([0.7 - margins / 2, 0.7 + margins / 2], dim=1)


def test_margin_is_what_the_softmax_of_two_logits_depends_on() -> None:
    student, _, _ = _case()
    torch.testing.assert_close(losses.margin(_logits(student)), student)
    torch.testing.assert_close(torch.sigmoid(student), _logits(student).softmax(dim=1)[:, 1])


def test_hard_loss_is_torchs_weighted_cross_entropy() -> None:
    student, _, labels = _case()
    weights = losses.pixel_weights(labels, (0.5, 9.0))
    want = F.cross_entropy(_logits(student), labels.long(), weight=torch.tensor([0.5, 9.0]))
    torch.testing.assert_close(losses.hard_loss(student, labels, weights), want)


@pytest.mark.parametrize("temperature", [1.0, 5.0])
@pytest.mark.parametrize("divergence", ["kl", "ce"])
def test_soft_loss_is_scipys_entropy_times_t_squared(temperature: float, divergence: str) -> None:
    student, teacher, labels = _case()
    weights = losses.pixel_weights(labels, (1.0, 3.0))
    p, q = (scipy.special.softmax(_logits(z).double().numpy() / temperature, axis=1) for z in (teacher, student))
    per_pixel = scipy.stats.entropy(p, q, axis=1)
    if divergence == "ce":
        per_pixel = per_pixel + scipy.stats.entropy(p, axis=1)
    want = temperature**2 * np.average(per_pixel, weights=weights.numpy())
    got = losses.soft_loss(student, teacher, weights, temperature=temperature, divergence=divergence)
    assert float(got) == pytest.approx(want, rel=1e-5)


def test_both_divergences_have_the_same_gradient() -> None:
    gradients = []
    for divergence in ("kl", "ce"):
        student, teacher, labels = _case()
        student.requires_grad_()
        weights = losses.pixel_weights(labels, (1.0, 3.0))
        losses.soft_loss(student, teacher, weights, temperature=3.0, divergence=divergence).backward()
        assert student.grad is not None
        gradients.append(student.grad)
    assert float(gradients[0].abs().max()) > 1e-3
    torch.testing.assert_close(*gradients)


def test_soft_loss_is_zero_for_a_perfect_student_whatever_the_weights() -> None:
    _, teacher, labels = _case()
    student = teacher.clone().requires_grad_()
    loss = losses.soft_loss(student, teacher, losses.pixel_weights(labels, (0.5, 9.0)), temperature=2.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-6)
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 1e-6  # class-weighted terms would push away from the teacher here


def test_soft_loss_at_high_temperature_is_an_eighth_of_the_squared_gap_of_margins() -> None:
    # T^2 KL of two Bernoullis near one half -> (gap / 2)^2 / 2
    student, teacher, labels = _case()
    got = losses.soft_loss(student, teacher, torch.ones_like(labels), temperature=100.0)
    assert float(got) == pytest.approx(float(((student - teacher) ** 2).mean()) / 8, rel=2e-2)


@pytest.mark.parametrize("temperature", [10.0, 40.0])
def test_soft_gradient_shrinks_with_t_squared_and_the_factor_mends_it(temperature: float) -> None:
    # Hinton et al. 2015, section 2: the gradient of the plain divergence scales as 1 / T^2
    scaled, plain = {}, {}
    for t in (temperature, 2 * temperature):
        student, teacher, labels = _case()
        student.requires_grad_()
        (gradient,) = torch.autograd.grad(losses.soft_loss(student, teacher, torch.ones_like(labels), temperature=t), student)
        scaled[t], plain[t] = float(gradient.norm()), float(gradient.norm()) / t**2
    assert plain[temperature] / plain[2 * temperature] == pytest.approx(4.0, rel=0.1)
    assert scaled[temperature] / scaled[2 * temperature] == pytest.approx(1.0, rel=0.1)


def test_dice_is_zero_for_a_certain_right_answer_and_one_for_a_wrong_one() -> None:
    labels = torch.randint(0, 2, (2, 32, 32), generator=torch.Generator().manual_seed(0))
    right = 100.0 * (2.0 * labels - 1.0)
    assert float(losses.soft_dice_loss(right, labels)) == pytest.approx(0.0, abs=1e-6)
    assert float(losses.soft_dice_loss(-right, labels)) == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize("name", ["hard", "soft", "dice"])
def test_gradients_agree_with_finite_differences(name: str) -> None:
    student, teacher, labels = _case(size=3)
    (gradient,) = torch.autograd.grad(_loss(name, student.requires_grad_(), teacher, labels), student)
    direction = torch.randn(student.shape, generator=torch.Generator().manual_seed(1))
    step = 1e-2
    with torch.no_grad():
        ahead, behind = (_loss(name, student + sign * step * direction, teacher, labels) for sign in (1, -1))
    assert float((gradient * direction).sum()) == pytest.approx(float((ahead - behind) / (2 * step)), rel=2e-2, abs=1e-4)


@pytest.mark.parametrize("name", ["hard", "soft", "dice"])
def test_ignored_pixels_count_in_no_loss(name: str) -> None:
    student, teacher, labels = _case(size=4)
    cut = _loss(name, student[:, :, :3], teacher[:, :, :3], labels[:, :, :3])
    labels[:, :, 3] = losses.IGNORED
    student.requires_grad_()
    loss = _loss(name, student, teacher, labels)
    torch.testing.assert_close(loss, cut)
    (gradient,) = torch.autograd.grad(loss, student)
    assert float(gradient[:, :, 3].abs().max()) == 0.0
    assert float(gradient[:, :, :3].abs().min()) > 0.0


@pytest.mark.parametrize("name", ["hard", "soft", "dice"])
def test_nothing_annotated_is_no_loss_and_no_gradient(name: str) -> None:
    student, teacher, labels = _case(size=4)
    labels[:] = losses.IGNORED
    loss = _loss(name, student.requires_grad_(), teacher, labels)
    (gradient,) = torch.autograd.grad(loss, student)
    assert torch.isfinite(loss)
    assert float(gradient.abs().max()) == 0.0


def _loss(name: str, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    weights = losses.pixel_weights(labels, (0.5, 4.0))
    if name == "hard":
        return losses.hard_loss(student, labels, weights)
    if name == "soft":
        return losses.soft_loss(student, teacher, weights, temperature=3.0)
    return losses.soft_dice_loss(student, labels)


def test_batch_statistics_are_those_of_numpy() -> None:
    student, _, labels = _case(size=8)
    labels[0, :3] = losses.IGNORED
    weights = losses.pixel_weights(labels, (0.5, 4.0))
    got = losses.batch_statistics(student, labels, weights)
    p, truth = torch.sigmoid(student).double().numpy(), labels.numpy()
    counted = truth != losses.IGNORED
    ce = -np.log(np.where(truth == 1, p, 1 - p))
    assert got.weighted_cross_entropy == pytest.approx(np.average(ce, weights=weights.numpy()), rel=1e-5)
    assert got.cross_entropies == pytest.approx([ce[i][counted[i]].mean() for i in range(2)], rel=1e-5)
    assert got.foreground_fraction == pytest.approx((truth[counted] == 1).mean())
    assert got.deviation == pytest.approx(p[counted].std(), rel=1e-4)


@given(fraction=st.floats(0.001, 0.999))
def test_class_weights_balance_the_classes(fraction: float) -> None:
    background, foreground = losses.class_weights("inverse", fraction)
    assert background * (1 - fraction) == pytest.approx(foreground * fraction)
    assert background * (1 - fraction) + foreground * fraction == pytest.approx(1.0)
    assert losses.class_weights("sqrt", fraction) == pytest.approx((background**0.5, foreground**0.5))
    assert losses.class_weights("none", fraction) == (1.0, 1.0)
    assert losses.class_weights((0.3, 2.0), fraction) == (0.3, 2.0)


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
    assert losses.margin(_logits(halves[0])).dtype == torch.float32
    for loss in (
        losses.hard_loss(halves[0], labels, weights),
        losses.soft_loss(*halves, weights, temperature=5.0),
        losses.soft_dice_loss(halves[0], labels),
    ):
        assert loss.dtype == torch.float32
