"""Layers of very narrow networks on the CPU: vectors run along x, where oneDNN's run over blocks of 16 channels.

One layer is a 3x3 convolution, batch normalisation and ReLU as one autograd function over contiguous (n, c, y, x) float32.
Work is cut into units: bands of rows of one image, small enough for the cache, chosen by the shape alone. Sums are kept per
unit and added in the order of the units, so that the same input gives the same bits with any number of threads.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kdunet_infer.errors import TrainingError

MAX_CHANNELS = 16
"""Layers with more channels than this, in or out, are torch's to compute."""
BAND_PIXELS = 2048
"""Size of a unit: the planes of one channel in and two out stay in the first-level cache."""
SHARED_FROM = 1 << 18
"""Values in the largest array from which threads share the work; waking one takes 40 microseconds."""

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


def available() -> bool:
    """Whether numba is installed; without it every layer is torch's to compute."""
    return importlib.util.find_spec("numba") is not None


def suits(convolution: nn.Conv2d) -> bool:
    """Whether `conv_norm_relu` computes this convolution, and faster than torch: 3x3 same, float32, on the CPU, narrow.

    With 16 channels in and out torch's vectors are full, and as fast.
    """
    narrow, wide = sorted((convolution.in_channels, convolution.out_channels))
    return (
        convolution.kernel_size == (3, 3)
        and convolution.padding in ((1, 1), "same")
        and convolution.padding_mode == "zeros"
        and (convolution.stride, convolution.dilation, convolution.groups) == ((1, 1), (1, 1), 1)
        and wide <= MAX_CHANNELS
        and narrow < MAX_CHANNELS
        and convolution.weight.dtype == torch.float32
        and convolution.weight.device.type == "cpu"
    )


def conv_norm_relu(x: Tensor, convolution: nn.Conv2d, normalisation: nn.BatchNorm2d | None) -> Tensor:
    """What `nn.Sequential(convolution, normalisation, nn.ReLU())` gives for x (n, n_in, y, x), up to rounding.

    In training mode the running statistics move as torch's do. Another dtype than float32 is converted. Raises TrainingError
    for one value a channel, which has no variance.
    """
    x = x.float().contiguous()
    weight, bias = convolution.weight, convolution.bias
    gamma, beta = (None, None) if normalisation is None else (normalisation.weight, normalisation.bias)
    if normalisation is not None and (normalisation.training or normalisation.running_mean is None):
        z, moments = _convolve(x, weight, bias)
        statistics = _of_batch(moments, z, normalisation)
    else:
        statistics = _of_the_past(convolution, normalisation)
        if not torch.is_grad_enabled():
            return _convolve(x, weight, bias, statistics.affine(gamma, beta))[0]
        z, _ = _convolve(x, weight, bias)
    return cast(Tensor, _ConvNormReLU.apply(x, weight, bias, gamma, beta, z, statistics))  # type: ignore[no-untyped-call]


def up(x: Tensor, transposed: nn.ConvTranspose2d) -> Tensor:
    """What a 2x2 transposed convolution of stride 2 gives for x (n, n_in, y, x): (n, n_out, 2 y, 2 x)."""
    return cast(Tensor, _Up.apply(x.float().contiguous(), transposed.weight, transposed.bias))  # type: ignore[no-untyped-call]


def max_pool(x: Tensor) -> Tensor:
    """What `nn.MaxPool2d(2)` gives for x (n, c, y, x), without its 64-bit indices: (n, c, y // 2, x // 2)."""
    return cast(Tensor, _MaxPool.apply(x.float().contiguous()))  # type: ignore[no-untyped-call]


def mix(x: Tensor, convolution: nn.Conv2d) -> Tensor:
    """What a 1x1 convolution gives for x (n, n_in, y, x): (n, n_out, y, x)."""
    return cast(Tensor, _Mix.apply(x.float().contiguous(), convolution.weight, convolution.bias))  # type: ignore[no-untyped-call]


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for good; True where the allocator, glibc's, takes the wish.

    Otherwise every step gives its activations back to the system and takes them again page by page: 20 of 80 ms.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):
        return False
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    return all([set_option(trim_threshold, 2**31 - 1), set_option(mmap_threshold, 2**30)])


@dataclass(frozen=True, slots=True)
class _Statistics:
    """What a layer normalises by, a value a channel."""

    mean: Doubles
    inv_std: Doubles
    of_batch: bool
    """Whether they depend on the batch, so that gradients flow through them."""

    def affine(self, gamma: Tensor | None, beta: Tensor | None) -> tuple[Doubles, Doubles]:
        """Normalisation as scale * z + shift."""
        scale = self.inv_std if gamma is None else self.inv_std * _numpy(gamma)
        shift = -self.mean * scale
        return scale, shift if beta is None else shift + _numpy(beta)


class _ConvNormReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        z: Tensor,
        statistics: _Statistics,
    ) -> Tensor:
        """The raw convolution z and its statistics -> the layer's output; x and weight are for the backward pass."""
        scale, shift = statistics.affine(gamma, beta)
        ctx.save_for_backward(x, weight, gamma, z)
        ctx.statistics, ctx.shift, ctx.bias = statistics, shift, bias is not None
        out = torch.empty_like(z)
        _run(_kernels().normalise, _planes_of(z), *_lines(z), _single(scale), _single(shift), *_lines(out))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gamma, z = ctx.saved_tensors
        statistics = ctx.statistics
        mean, inv_std = statistics.mean, statistics.inv_std
        scale = inv_std if gamma is None else inv_std * _numpy(gamma)
        g = gradient.contiguous()
        units, shape = _units(z), z.shape
        sums = np.zeros((shape[0] * shape[1], 2))
        rectified = _single(scale), _single(ctx.shift), _single(mean)
        _run(_kernels().reduce, _planes_of(z), *_lines(g, z), *rectified, sums)
        flow, tilt = sums.reshape(*shape[:2], 2).sum(axis=0).T  # sum of g and of g (z - mean) where the ReLU passes
        slope, offset = np.zeros_like(mean), np.zeros_like(mean)
        if statistics.of_batch:
            n_values = z.numel() // shape[1]
            slope, offset = -scale * inv_std**2 * tilt / n_values, -scale * flow / n_values
        gx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        partial = np.empty((units.count, *weight.shape[:2], 9), np.float32)
        flipped = weight.detach().transpose(0, 1).flip(2, 3).flatten(2).contiguous()
        _run(
            _kernels().backward,
            units,
            (shape[2], shape[3]),
            *_flat(x, z, g),
            np.stack([*rectified, _single(slope), _single(offset)], axis=1),
            _numpy(flipped),
            *_flat(z[:0] if gx is None else gx),
            partial,
        )
        g_weight = torch.from_numpy(partial.sum(axis=0, dtype=np.float64)).float().view_as(weight)
        # the batch's mean takes a bias out again
        g_bias = torch.zeros(shape[1]) if statistics.of_batch else torch.from_numpy(scale * flow).float()
        g_gamma, g_beta = torch.from_numpy(tilt * inv_std).float(), torch.from_numpy(flow).float()
        by_affine = (None, None) if gamma is None else (g_gamma, g_beta)
        return gx, g_weight, g_bias if ctx.bias else None, *by_affine, None, None


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias = bias is not None
        n, _, height, width = x.shape
        out = torch.empty(n, weight.shape[1], 2 * height, 2 * width)
        values = np.zeros(weight.shape[1], np.float32) if bias is None else _numpy(bias)
        _run(_kernels().spread, _units(x), _numpy(x), _numpy(weight.detach().flatten(2).contiguous()), values, _numpy(out))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        g, gx, units = gradient.contiguous(), torch.empty_like(x), _units(x)
        partial = np.empty((units.count, *weight.shape[:2], 4), np.float32)
        bias = np.empty((units.count, weight.shape[1]), np.float32)
        _run(_kernels().collect, units, _numpy(x), _numpy(g), _numpy(weight.flatten(2).contiguous()), _numpy(gx), partial, bias)
        g_weight = torch.from_numpy(partial.sum(axis=0, dtype=np.float64)).float().view_as(weight)
        return gx, g_weight, torch.from_numpy(bias.sum(axis=0, dtype=np.float64)).float() if ctx.bias else None


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        n, c, height, width = x.shape
        out = torch.empty(n, c, height // 2, width // 2)
        _run(_kernels().pool, _planes_of(x), *_images(x, out))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        g, gx = gradient.contiguous(), torch.empty_like(x)
        _run(_kernels().unpool, _planes_of(x), *_images(x, g, gx))
        return gx


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias = bias is not None
        out = torch.empty(x.shape[0], weight.shape[0], *x.shape[2:])
        start = np.zeros(weight.shape[0], np.float32) if bias is None else _numpy(bias)
        _run(_kernels().mix, _Units(len(x), 1), _numpy(x.flatten(2)), _numpy(weight.flatten(1)), start, _numpy(out.flatten(2)))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        n_out, n_in = weight.shape[:2]
        gx, g_weight, g_bias = torch.empty_like(x), np.empty((len(x), n_out, n_in)), np.empty((len(x), n_out))
        images = [_numpy(tensor.flatten(2)) for tensor in (x, gradient.contiguous())]
        to = _numpy(gx.flatten(2)), g_weight, g_bias
        _run(_kernels().unmix, _Units(len(x), 1), *images, _numpy(weight.flatten(1)), *to)
        by_weight = torch.from_numpy(g_weight.sum(axis=0)).float().view_as(weight)
        return gx, by_weight, torch.from_numpy(g_bias.sum(axis=0)).float() if ctx.bias else None


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, affine: tuple[Doubles, Doubles] | None = None
) -> tuple[Tensor, Doubles]:
    """The raw convolution and, a unit and channel, its mean and sum of squares about it; with `affine` the layer's output."""
    n_out, n, height, width = weight.shape[0], x.shape[0], x.shape[2], x.shape[3]
    z, units = torch.empty(n, n_out, height, width), _units(x)
    moments = np.empty((units.count, n_out, 2))
    scale, shift = np.ones((2, n_out), np.float32) if affine is None else np.stack([_single(part) for part in affine])
    start = np.zeros(n_out, np.float32) if bias is None else _numpy(bias)
    taps = _numpy(weight.detach().flatten(2).contiguous())
    to = *_flat(z), moments
    _run(_kernels().correlate, units, (height, width), *_flat(x), taps, start, scale, shift, affine is not None, *to)
    return z, moments


def _of_batch(moments: Doubles, z: Tensor, normalisation: nn.BatchNorm2d) -> _Statistics:
    """Mean and variance of all units by those of each (Chan et al. 1979); moves the running ones."""
    n, _, height, width = z.shape
    n_values = n * height * width
    if n_values < 2:
        raise TrainingError(
            f"batch normalisation got one value a channel, in a batch of shape {tuple(z.shape)}, which has no variance; "
            "take larger crops or more of them."
        )
    rows = _units(z).rows(height)
    sizes = np.tile(rows * width, n)[:, None]
    means, squares = moments[..., 0], moments[..., 1]
    mean = (sizes * means).sum(axis=0) / n_values
    variance = (squares + sizes * (means - mean) ** 2).sum(axis=0) / n_values
    if normalisation.training and normalisation.running_mean is not None:
        _move(normalisation, mean, variance * n_values / (n_values - 1))
    return _Statistics(mean, 1 / np.sqrt(variance + normalisation.eps), of_batch=True)


def _move(normalisation: nn.BatchNorm2d, mean: Doubles, variance: Doubles) -> None:
    assert normalisation.running_mean is not None
    assert normalisation.running_var is not None
    assert normalisation.num_batches_tracked is not None
    normalisation.num_batches_tracked.add_(1)
    momentum = normalisation.momentum
    share = 1 / float(normalisation.num_batches_tracked) if momentum is None else momentum
    normalisation.running_mean.lerp_(torch.from_numpy(mean).float(), share)
    normalisation.running_var.lerp_(torch.from_numpy(variance).float(), share)


def _of_the_past(convolution: nn.Conv2d, normalisation: nn.BatchNorm2d | None) -> _Statistics:
    if normalisation is None:
        return _Statistics(np.zeros(convolution.out_channels), np.ones(convolution.out_channels), of_batch=False)
    assert normalisation.running_mean is not None
    assert normalisation.running_var is not None
    variance = _numpy(normalisation.running_var).astype(np.float64)
    inv_std = 1 / np.sqrt(variance + normalisation.eps)
    return _Statistics(_numpy(normalisation.running_mean).astype(np.float64), inv_std, of_batch=False)


def _kernels() -> ModuleType:
    from kdunet import planar_kernels  # here, because importing numba takes a third of a second

    return planar_kernels


def _numpy(tensor: Tensor) -> Any:
    return tensor.detach().numpy()


def _single(values: Doubles) -> Floats:
    return values.astype(np.float32)


@dataclass(frozen=True, slots=True)
class _Units:
    """How a batch is cut: `count` units, each up to `band` rows of one image."""

    count: int
    band: int

    def rows(self, height: int) -> npt.NDArray[np.intp]:
        """Rows of each unit of an image."""
        return np.minimum(self.band, height - np.arange(0, height, self.band))


def _units(x: Tensor) -> _Units:
    n, _, height, width = x.shape
    n_bands = -(-height // max(1, BAND_PIXELS // width))
    band = -(-height // n_bands)
    return _Units(n * -(-height // band), band)


def _planes_of(x: Tensor) -> _Units:
    return _Units(x.shape[0] * x.shape[1], 1)


def _flat(*tensors: Tensor) -> list[Any]:
    """(n, c, y, x) as arrays (n c y x)."""
    return [_numpy(tensor).reshape(-1) for tensor in tensors]


def _lines(*tensors: Tensor) -> list[Any]:
    """(n, c, y, x) as arrays (n c, y x)."""
    return [_numpy(tensor).reshape(tensor.shape[0] * tensor.shape[1], -1) for tensor in tensors]


def _images(*tensors: Tensor) -> list[Any]:
    """(n, c, y, x) as arrays (n c, y, x)."""
    return [_numpy(tensor).reshape(-1, *tensor.shape[2:]) for tensor in tensors]


_pool_of_threads: ThreadPoolExecutor | None = None


def _forget_threads() -> None:
    global _pool_of_threads
    _pool_of_threads = None


os.register_at_fork(after_in_child=_forget_threads)  # a forked child has none of its parent's threads


def _run(kernel: Callable[..., None], units: _Units, *arguments: Any) -> None:
    """`kernel(begin, end, band, *arguments)` over all units on torch's number of threads, the caller's among them."""
    global _pool_of_threads
    largest = max(argument.size for argument in arguments if isinstance(argument, np.ndarray))
    n_threads = min(torch.get_num_threads(), units.count) if largest >= SHARED_FROM else 1
    edges = [units.count * k // n_threads for k in range(n_threads + 1)]
    parts = []
    if n_threads > 1:
        if _pool_of_threads is None:
            _pool_of_threads = ThreadPoolExecutor(os.cpu_count() or 1, "planar")
        for begin, end in itertools.pairwise(edges[1:]):
            parts.append(_pool_of_threads.submit(kernel, begin, end, units.band, *arguments))
    kernel(0, edges[1], units.band, *arguments)
    for part in parts:
        part.result()
