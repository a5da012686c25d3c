"""Layers along x against torch's in double precision, in single precision, and against themselves on more threads."""

from __future__ import annotations

import copy
import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kdunet import planar, planar_kernels
from kdunet.unet import DoubleConv, UNet
from kdunet_infer.errors import TrainingError

SINGLE = 2e-5
"""Rounding of float32 sums of up to 10,000 terms, relative to the largest value; measured: below 1e-6."""


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _layer(n_in: int, n_out: int, *, batch_norm: bool = True, bias: bool = True, **options: Any) -> nn.Sequential:
    layer = nn.Sequential(nn.Conv2d(n_in, n_out, 3, padding=1, bias=bias))
    if batch_norm:
        layer.append(norm := nn.BatchNorm2d(n_out, **options))
        for tensor in (norm.weight, norm.running_var):
            if tensor is not None:
                nn.init.uniform_(tensor, 0.5, 2)
        for tensor in (norm.bias, norm.running_mean):
            if tensor is not None:
                nn.init.normal_(tensor)
    return layer


def _planar(layer: nn.Sequential, x: Tensor) -> Tensor:
    convolution, norm = layer[0], layer[1] if len(layer) > 1 else None
    assert isinstance(convolution, nn.Conv2d)
    assert norm is None or isinstance(norm, nn.BatchNorm2d)
    return planar.conv_norm_relu(x, convolution, norm)


def _assert_close(got: Tensor | None, want: Tensor | None, what: str) -> None:
    assert got is not None, f"no {what}"
    assert want is not None
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    worst = float((got.detach().double() - want.detach().double()).abs().max())
    scale = max(1.0, float(want.detach().double().abs().max()))
    assert worst <= SINGLE * scale, f"{what} differs by {worst:.3g}, of {scale:.3g}"  # NaN fails too


def _assert_as_torch(layer: nn.Sequential, x: Tensor, *, dtype: torch.dtype = torch.double) -> None:
    layer.zero_grad()
    want_layer = copy.deepcopy(layer).to(dtype)
    want_x = x.detach().to(dtype, copy=True).requires_grad_(x.requires_grad)
    got, want = _planar(layer, x), want_layer(want_x).relu()
    _assert_close(got, want, "output")
    torch.manual_seed(1)
    gradient = torch.randn_like(want) / want[0].numel() ** 0.5
    got.backward(gradient.float())
    want.backward(gradient)
    for (name, parameter), (_, expected) in zip(layer.named_parameters(), want_layer.named_parameters(), strict=True):
        _assert_close(parameter.grad, expected.grad, f"gradient of {name}")
    if x.requires_grad:
        _assert_close(x.grad, want_x.grad, "gradient of x")
    for (name, buffer), (_, moved) in zip(layer.named_buffers(), want_layer.named_buffers(), strict=True):
        _assert_close(buffer, moved, name)


def test_a_comparison_catches_a_wrong_answer() -> None:
    with pytest.raises(AssertionError, match=r"output differs by 0\.001"):
        _assert_close(torch.ones(3), torch.ones(3) * 1.001, "output")
    with pytest.raises(AssertionError, match="differs by nan"):
        _assert_close(torch.tensor([float("nan")]), torch.ones(1), "output")


@pytest.mark.parametrize("n_out", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("n_in", [1, 2, 3, 4, 8])
def test_layer_is_torchs_in_double_precision(n_in: int, n_out: int) -> None:
    torch.manual_seed(n_in * 10 + n_out)
    _assert_as_torch(_layer(n_in, n_out), torch.randn(2, n_in, 37, 130, requires_grad=True))


@pytest.mark.parametrize("shape", [(1, 5, 7), (1, 1, 16), (2, 1, 1), (3, 16, 16), (1, 130, 33), (2, 3, 2100)])
@pytest.mark.parametrize("mode", ["training", "eval", "no batch norm"])
def test_any_size_in_any_mode(shape: tuple[int, int, int], mode: str) -> None:
    torch.manual_seed(3)
    n, height, width = shape
    layer = _layer(3, 4, batch_norm=mode != "no batch norm").train(mode == "training")
    x = torch.randn(n, 3, height, width, requires_grad=True)
    _assert_as_torch(layer, x)
    with torch.no_grad():
        _assert_close(_planar(layer.eval(), x), layer(x).relu(), "output without gradients")


@settings(max_examples=25, deadline=None)
@given(
    channels=st.tuples(st.integers(1, 16), st.integers(1, 16)),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(2, 90)),
    seed=st.integers(0, 99),
)
def test_any_shape_is_torchs_in_single_precision(channels: tuple[int, int], shape: tuple[int, int, int], seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(shape[0], channels[0], *shape[1:], requires_grad=True)
    _assert_as_torch(_layer(*channels), x, dtype=torch.double if min(shape[1:]) < 3 else torch.float)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics_move_with_any_momentum(momentum: float | None) -> None:
    layer = _layer(2, 3, momentum=momentum)
    for _ in range(3):
        _assert_as_torch(layer, torch.randn(2, 2, 6, 9))


def test_statistics_far_from_zero_lose_nothing() -> None:
    # the naive mean of squares minus the square of the mean would keep no digit of a variance of 1 beside 10,000 squared
    layer = _layer(1, 1)
    nn.init.dirac_(layer[0].weight)
    nn.init.constant_(layer[0].bias, 1e4)
    x = torch.randn(4, 1, 64, 64)
    want = nn.functional.batch_norm(x.double(), None, None, layer[1].weight.double(), layer[1].bias.double(), training=True)
    got = _planar(layer, x)
    worst = float((got.double() - want.relu()).detach().abs().max())
    assert worst < 5e-3, f"differs by {worst:.3g}, and 10,000 itself is rounded to 1e-3"


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}], ids=str)
def test_batch_norms_without_some_of_their_tensors(options: dict[str, bool]) -> None:
    for training in (True, False):
        _assert_as_torch(_layer(2, 3, **options).train(training), torch.randn(2, 2, 8, 8, requires_grad=True))


def test_convolution_without_bias_and_input_without_gradient() -> None:
    _assert_as_torch(_layer(2, 3, bias=False), torch.randn(2, 2, 9, 9))


def test_other_memory_layouts_and_dtypes_are_taken() -> None:
    layer = _layer(4, 2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    _assert_as_torch(layer, torch.randn(2, 4, 9, 12).contiguous(memory_format=torch.channels_last).requires_grad_())
    _assert_as_torch(layer, torch.randn(2, 4, 12, 9).transpose(2, 3).requires_grad_())
    x = torch.randn(2, 4, 8, 8).bfloat16()
    assert _planar(layer.eval(), x).dtype == torch.float32


def test_an_expanded_gradient_is_taken() -> None:
    x = torch.randn(2, 2, 8, 8, requires_grad=True)
    _planar(_layer(2, 2, batch_norm=False).eval(), x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_nan_goes_through_forward_and_backward() -> None:
    layer, x = _layer(1, 2), torch.randn(2, 1, 20, 20)
    x[0, 0, 3, 4] = float("nan")
    y = _planar(layer, x)
    assert y.isnan().all()  # by the statistics
    y.sum().backward()
    for parameter in (layer[0].weight, layer[1].weight):
        assert isinstance(parameter.grad, Tensor)
        assert parameter.grad.isnan().all()
    layer = _layer(1, 2).eval()
    y = _planar(layer, x.requires_grad_())
    assert int(y[0, 0].isnan().sum()) == 9
    with torch.no_grad():
        assert torch.equal(_planar(layer, x).isnan(), y.isnan())


def test_two_threads_give_the_bits_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planar, "SHARED_FROM", 1)
    torch.manual_seed(0)
    network = UNet(2, n_levels=3, intensity=(128.0, 50.0)).accelerated()
    image = torch.rand(3, 1, 72, 100) * 255
    results = []
    for n_threads in (1, 2, 3, 1):
        torch.set_num_threads(n_threads)
        features = image
        steps: list[Tensor] = []
        for block in (network.encoder[0], network.decoder[-1]):
            x = features.expand(-1, block[0].in_channels, -1, -1).clone().requires_grad_()
            features = block(x)
            pooled = planar.max_pool(planar.up(features, nn.ConvTranspose2d(2, 1, 2, stride=2).requires_grad_(False)) * 0 + 1)
            (features.square().mean() + pooled.mean()).backward()
            assert x.grad is not None
            steps += [features.detach(), x.grad, *(p.grad for p in block.parameters() if p.grad is not None)]
            block.zero_grad()
            features = features.detach()[:, :1]
        results.append(steps)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shape", [(2, 4, 16, 32), (1, 3, 5, 7), (2, 1, 2, 3), (1, 2, 6, 2)])
def test_max_pool_is_torchs_with_ties(shape: tuple[int, ...]) -> None:
    x = torch.randint(0, 3, shape).float().requires_grad_()
    y = x.detach().clone().requires_grad_()
    got, want = planar.max_pool(x), nn.functional.max_pool2d(y, 2)
    assert torch.equal(got, want)
    gradient = torch.randn_like(want)
    got.backward(gradient)
    want.backward(gradient)
    assert x.grad is not None
    assert y.grad is not None
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("place", range(4))
def test_max_pool_keeps_nan(place: int) -> None:
    x = torch.ones(1, 1, 2, 2)
    x.view(-1)[place] = float("nan")
    assert planar.max_pool(x).isnan().all()


@pytest.mark.parametrize("shape", [(2, 4, 24, 130), (1, 3, 5, 7), (1, 1, 1, 1), (3, 2, 70, 61)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["up", "mix"])
def test_up_and_mix_are_torchs(shape: tuple[int, ...], bias: bool, kind: str) -> None:
    torch.manual_seed(5)
    layer = nn.ConvTranspose2d(shape[1], 3, 2, stride=2, bias=bias) if kind == "up" else nn.Conv2d(shape[1], 3, 1, bias=bias)
    reference = copy.deepcopy(layer).double()
    x = torch.randn(shape, requires_grad=True)
    y = x.detach().double().requires_grad_()
    got, want = (planar.up if kind == "up" else planar.mix)(x, layer), reference(y)  # type: ignore[operator]
    _assert_close(got, want, "output")
    gradient = torch.randn_like(want)
    got.backward(gradient.float())
    want.backward(gradient)
    _assert_close(x.grad, y.grad, "gradient of x")
    for (name, parameter), (_, expected) in zip(layer.named_parameters(), reference.named_parameters(), strict=True):
        _assert_close(parameter.grad, expected.grad, f"gradient of {name}")


def _forward(network: UNet, image: Tensor) -> Tensor:
    """The network by hand, every layer that can be along x."""

    def block(double: Any, features: Tensor) -> Tensor:
        assert isinstance(double, DoubleConv)
        for k in (0, 3):
            features = planar.conv_norm_relu(features, double[k], double[k + 1])  # type: ignore[arg-type]
        return features

    features, skips = (image - network.mean) / network.std, []
    for level, double in enumerate(network.encoder):
        features = block(double, planar.max_pool(features) if level else features)
        skips.append(features)
    skips.pop()
    for up, double in zip(network.up, network.decoder, strict=True):
        assert isinstance(up, nn.ConvTranspose2d)
        features = block(double, torch.cat([skips.pop(), planar.up(features, up)], dim=1))
    return planar.mix(features, network.head)


def test_a_step_of_a_2_unet_is_torchs() -> None:
    torch.manual_seed(7)
    network = UNet(2, n_levels=3, intensity=(128.0, 50.0))
    reference = copy.deepcopy(network).double()
    image, labels = torch.rand(2, 1, 32, 48) * 255, torch.randint(0, 2, (2, 32, 48))
    losses = []
    for net, logits in ((network, _forward(network, image)), (reference, reference(image.double()))):
        losses.append(nn.functional.cross_entropy(logits, labels))
        losses[-1].backward()
        net.requires_grad_(False)
    _assert_close(losses[0], losses[1], "loss")
    for (name, parameter), (_, expected) in zip(network.named_parameters(), reference.named_parameters(), strict=True):
        _assert_close(parameter.grad, expected.grad, f"gradient of {name}")
    for (name, buffer), (_, moved) in zip(network.named_buffers(), reference.named_buffers(), strict=True):
        _assert_close(buffer, moved, name)


@pytest.mark.parametrize(
    ("convolution", "suitable"),
    [
        (nn.Conv2d(1, 2, 3, padding=1), True),
        (nn.Conv2d(16, 8, 3, padding="same"), True),
        (nn.Conv2d(16, 16, 3, padding=1), False),
        (nn.Conv2d(8, 32, 3, padding=1), False),
        (nn.Conv2d(2, 2, 1), False),
        (nn.Conv2d(2, 2, 3), False),
        (nn.Conv2d(2, 2, 3, padding=1, stride=2), False),
        (nn.Conv2d(2, 2, 3, padding=1, groups=2), False),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), False),
        (nn.Conv2d(2, 2, 3, padding=1).double(), False),
        (nn.Conv2d(2, 2, 3, padding=1, device="meta"), False),
    ],
    ids=str,
)
def test_which_convolutions_suit(convolution: nn.Conv2d, suitable: bool) -> None:
    assert planar.suits(convolution) is suitable


def test_one_value_a_channel_has_no_variance() -> None:
    with pytest.raises(TrainingError, match=r"one value a channel, in a batch of shape \(1, 2, 1, 1\)"):
        _planar(_layer(1, 2), torch.ones(1, 1, 1, 1))


def test_threads_are_made_anew_in_a_forked_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planar, "SHARED_FROM", 1)
    torch.set_num_threads(2)
    layer, x = _layer(1, 2).eval(), torch.ones(2, 1, 8, 8)
    with torch.no_grad():
        want = _planar(layer, x)
        reader, writer = multiprocessing.Pipe(duplex=False)

        def child() -> None:
            torch.set_num_threads(2)
            writer.send(bool(torch.equal(_planar(layer, x), want)))

        process = multiprocessing.get_context("fork").Process(target=child, daemon=True)
        process.start()
        assert reader.poll(30)
        assert reader.recv()
        process.join()


def test_without_numba_the_module_loads_and_says_so() -> None:
    code = "import sys; sys.modules['numba'] = None; import kdunet.planar as p; print(p.available())"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert got.returncode == 0, got.stderr
    assert got.stdout.strip() == "False"


def test_where_nothing_can_be_kept_kernels_are_compiled_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    def njit(*, cache: bool = False, **_: object) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")  # as numba does
        return lambda function: ("compiled", function)

    monkeypatch.setattr(planar_kernels, "numba", SimpleNamespace(njit=njit))
    assert planar_kernels._compiled(len) == ("compiled", len)


def test_freed_memory_is_kept() -> None:
    code = """
import pathlib, torch
from kdunet import planar
def data_pages():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[5])
def pages_left_by_a_tensor():
    before = data_pages()
    torch.zeros(1 << 26)  # 256 MB
    return data_pages() - before
print(pages_left_by_a_tensor(), planar.keep_freed_memory(), pages_left_by_a_tensor())
"""
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    before, kept, after = int(got[0]), got[1] == "True", int(got[2])
    assert before < 2**15
    assert not kept or after > 60_000, "256 MB are 65,536 pages"
