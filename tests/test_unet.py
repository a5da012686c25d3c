"""The network's size, grid and reach."""

from __future__ import annotations

import pytest
import torch

from kdunet.unet import UNet, halo, n_parameters, receptive_field_radius
from kdunet_infer.errors import ConfigError

PARAMETERS = {128: 124_131_074, 64: 31_042_434, 32: 7_765_442, 16: 1_943_778, 8: 487_154, 4: 122_394, 2: 30_902, 1: 7_878}


@pytest.mark.parametrize(("width", "count"), PARAMETERS.items())
def test_parameter_counts_are_the_published_ones(width: int, count: int) -> None:
    with torch.device("meta"):  # counts need no memory for 124 million weights
        assert n_parameters(UNet(width)) == count


def test_2_unet_is_1000_times_smaller_than_64_unet() -> None:
    assert PARAMETERS[64] / PARAMETERS[2] == pytest.approx(1004.5, abs=0.1)


@pytest.mark.parametrize(("n_levels", "radius", "margin"), [(1, 2, 2), (2, 8, 8), (3, 22, 24), (5, 94, 96)])
def test_halo_is_the_radius_rounded_up_to_the_stride(n_levels: int, radius: int, margin: int) -> None:
    assert receptive_field_radius(n_levels) == radius
    assert halo(n_levels) == margin


@pytest.mark.parametrize("n_levels", [1, 2, 3, 4])
def test_gradient_reaches_the_derived_radius_and_no_further(n_levels: int) -> None:
    # every weight positive and no ReLU cut off, so that no path cancels; average pooling lets each of the window through
    network = UNet(1, n_levels=n_levels).double().eval()
    network.pool = torch.nn.AvgPool2d(2)  # type: ignore[assignment]
    for parameter in network.parameters():
        torch.nn.init.constant_(parameter, 0.1)
    torch.nn.init.constant_(network.head.weight[1:].detach(), 0.3)
    margin = halo(n_levels) + network.stride
    image = torch.ones(1, 1, network.stride, 2 * margin + network.stride, dtype=torch.double, requires_grad=True)
    logits = network(image)
    logits[0, 1, :, margin : margin + network.stride].sum().backward()
    assert image.grad is not None
    felt = image.grad[0, 0].abs().amax(dim=0).nonzero()[:, 0]
    assert int(margin - felt.min()) == receptive_field_radius(n_levels)
    assert int(felt.max()) - (margin + network.stride - 1) == receptive_field_radius(n_levels)


def test_forward_keeps_the_image_size_and_normalises_by_itself() -> None:
    torch.manual_seed(0)
    network = UNet(2, intensity=(100.0, 20.0)).eval()
    plain = UNet(2).eval()
    plain.load_state_dict({**network.state_dict(), "mean": torch.tensor(0.0), "std": torch.tensor(1.0)})
    image = torch.rand(3, 1, 32, 48) * 255
    assert network(image).shape == (3, 2, 32, 48)
    torch.testing.assert_close(network(image), plain((image - 100.0) / 20.0))


def test_width_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="width is 0; a k-Unet needs a width of at least 1"):
        UNet(0)
