"""The inner loops of `kdunet.planar`, compiled by numba on first use and kept on disk; all over float32.

Every kernel takes a range of units, so that threads can share them, and the rows of a unit. Within a unit each channel is
copied into a flat plane with zero margins, `stride` = x + 2 apart; a tap of a 3x3 convolution is then the same plane read at
an offset, and the loops run over the whole unit without borders.

Three things keep the loops at the speed of the multiply-adds. Indices into planes are unsigned, or numba would look for ones
counted from the end. Loops run over whole vectors, or the scalars of a rest would hold half of the vector registers. Nothing
views a row: the counting of references costs more than a row does.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

numba: Any = importlib.import_module("numba")  # untyped, and may be absent where types are checked

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Kernel = TypeVar("Kernel", bound=Callable[..., Any])

MARGIN = 18
"""Values behind a plane that its last vector may read: two columns and sixteen lanes."""
MIXED = 2048
"""Pixels that a 1x1 convolution takes at once, so that all their channels stay in the first cache."""


def _compiled(function: Kernel) -> Kernel:
    # sums may be reordered and contracted; NaN and infinity keep their meaning, so that a diverged run is seen
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz", "arcp"}}
    try:
        return cast(Kernel, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # neither the package's folder nor the user's cache can be written: compile in every process
        return cast(Kernel, numba.njit(**options)(function))


@_compiled
def _whole(size: int) -> Any:
    """Size rounded down to whole vectors, in a way that shows the compiler that there is no rest."""
    return np.uint64(size) & np.uint64(0xFFFFFFFFFFFFFFF0)


@_compiled
def _planes(n: int, size: int) -> Floats:
    """Zeros whose lines hold at least `size` values and are whole vectors."""
    return np.zeros((n, (size + 15) // 16 * 16), np.float32)


@_compiled
def _copy(source: Floats, begin: int, size: int, target: Floats, to: int) -> None:
    """Numba's own copy of a slice is not vectorised."""
    s, t = np.uint64(begin), np.uint64(to)
    for x in range(np.uint64(size)):
        target[t + x] = source[s + x]


@_compiled
def _pad(source: Floats, begin: int, y: int, rows: int, height: int, width: int, plane: Floats) -> None:
    """Rows y .. y + rows - 1 of the (height, width) that begins there, zero beyond its borders, at a stride of width + 2."""
    for row in range(rows):
        to = row * (width + 2) + 1
        if 0 <= y + row < height:
            _copy(source, begin + (y + row) * width, width, plane, to)
        else:
            plane[to : to + width] = 0.0


@_compiled
def _pad_gradient(
    z: Floats, g: Floats, begin: int, y: int, rows: int, height: int, width: int, terms: Floats, plane: Floats
) -> None:
    """The loss's gradient by the raw convolution, laid out as `_pad` does."""
    scale, shift, mean, slope, offset = terms[0], terms[1], terms[2], terms[3], terms[4]
    for row in range(rows):
        to = row * (width + 2) + 1
        if 0 <= y + row < height:
            s, t = np.uint64(begin + (y + row) * width), np.uint64(to)
            for x in range(np.uint64(width)):
                value, flow = z[s + x], g[s + x]
                passed = np.float32(0) if scale * value + shift <= 0 else flow
                plane[t + x] = scale * passed + slope * (value - mean) + offset
        else:
            plane[to : to + width] = 0.0


@_compiled
def _nine(v: Floats) -> Any:
    return v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8]


@_compiled
def _taps(plane: Floats, x: Any, stride: Any) -> Any:
    """The nine values around (y + 1, x + 1) of a plane, row by row."""
    one, two = np.uint64(1), np.uint64(2)
    y = x + stride
    z = y + stride
    top, middle = (plane[x], plane[x + one], plane[x + two]), (plane[y], plane[y + one], plane[y + two])
    return *top, *middle, plane[z], plane[z + one], plane[z + two]


@_compiled
def _dot(w: Any, v: Any) -> Any:
    top = w[0] * v[0] + w[1] * v[1] + w[2] * v[2]
    middle = w[3] * v[3] + w[4] * v[4] + w[5] * v[5]
    return top + middle + w[6] * v[6] + w[7] * v[7] + w[8] * v[8]


@_compiled
def _plus(s: Any, f: Any, v: Any) -> Any:
    top, middle = (s[0] + f * v[0], s[1] + f * v[1], s[2] + f * v[2]), (s[3] + f * v[3], s[4] + f * v[4], s[5] + f * v[5])
    return *top, *middle, s[6] + f * v[6], s[7] + f * v[7], s[8] + f * v[8]


@_compiled
def _add_correlation(planes: Floats, stride: int, weights: Floats, o: int, sums: Floats) -> None:
    """Adds outputs o and, if there is one, o + 1 of weights (n_out, n_in, 9) to sums (2, whole vectors).

    Two outputs share what they load; their 18 weights and two sums fit the vector registers.
    """
    one, two, step = sums[0], sums[1], np.uint64(stride)
    for i in range(weights.shape[1]):
        plane, p = planes[i], _nine(weights[o, i])
        if o + 1 < weights.shape[0]:
            q = _nine(weights[o + 1, i])
            for x in range(_whole(one.size)):
                taps = _taps(plane, x, step)
                one[x] += _dot(p, taps)
                two[x] += _dot(q, taps)
        else:
            for x in range(_whole(one.size)):
                one[x] += _dot(p, _taps(plane, x, step))


@_compiled
def _product(planes: Floats, stride: int, size: int, g: Floats, o: int, out: Floats) -> None:
    """Weight gradients (n_out, n_in, 9) of outputs o and o + 1: sums of gradient times tap."""
    step, zero = np.uint64(stride), np.float32(0)
    centre = stride + 1
    one, two = g[o, centre : centre + size], g[min(o + 1, len(g) - 1), centre : centre + size]
    for i in range(len(planes)):
        p = (zero, zero, zero, zero, zero, zero, zero, zero, zero)
        q, plane = p, planes[i]
        for x in range(_whole(size)):
            taps = _taps(plane, x, step)
            p = _plus(p, one[x], taps)
            q = _plus(q, two[x], taps)
        for k, value in enumerate(p):
            out[o, i, k] = value
        if o + 1 < len(g):
            for k, value in enumerate(q):
                out[o + 1, i, k] = value


@_compiled
def _moments(values: Floats) -> Any:
    """Mean and sum of squares about it: nothing cancels, however far the mean is from zero."""
    total = np.float32(0)
    for x in range(values.size):
        total += values[x]
    mean = np.float32(total / np.float32(values.size))
    squares = np.float32(0)
    for x in range(values.size):
        squares += (values[x] - mean) ** 2
    return mean, squares


@_compiled
def correlate(
    begin: int,
    end: int,
    band: int,
    size: tuple[int, int],
    x: Floats,
    weights: Floats,
    bias: Floats,
    scale: Floats,
    shift: Floats,
    finish: bool,
    z: Floats,
    moments: Doubles,
) -> None:
    """A 3x3 convolution of flat x (n n_in y x) to flat z (n n_out y x), weights (n_out, n_in, 9); `size` is (y, x).

    To `finish` is to give relu(scale z + shift) in its place; otherwise moments (unit, n_out, 2) are filled.
    """
    height, width = size
    n_out, n_in, stride = weights.shape[0], weights.shape[1], width + 2
    n_bands = (height + band - 1) // band
    planes = _planes(n_in, (band + 2) * stride + MARGIN)
    sums = _planes(2, band * stride)
    for unit in range(begin, end):
        image, y = unit // n_bands, unit % n_bands * band
        rows = min(band, height - y)
        for i in range(n_in):
            _pad(x, (image * n_in + i) * height * width, y - 1, rows + 2, height, width, planes[i])
        for o in range(0, n_out, 2):
            sums[0] = bias[o]
            sums[1] = bias[min(o + 1, n_out - 1)]
            _add_correlation(planes, stride, weights, o, sums)
            for k in range(min(2, n_out - o)):
                to = ((image * n_out + o + k) * height + y) * width
                for row in range(rows):
                    _copy(sums[k], row * stride, width, z, to + row * width)
                values = z[to : to + rows * width]
                if finish:
                    _finish(values, scale[o + k], shift[o + k])
                else:
                    moments[unit, o + k, 0], moments[unit, o + k, 1] = _moments(values)


@_compiled
def _finish(values: Floats, scale: float, shift: float) -> None:
    for x in range(values.size):
        value = scale * values[x] + shift
        values[x] = np.float32(0) if value <= 0 else value


@_compiled
def normalise(begin: int, end: int, _: int, z: Floats, scale: Floats, shift: Floats, out: Floats) -> None:
    """Lines (n c, y x) of raw convolutions -> of rectified outputs."""
    for plane in range(begin, end):
        source, target, a, b = z[plane], out[plane], scale[plane % scale.size], shift[plane % scale.size]
        for x in range(source.size):
            value = a * source[x] + b
            target[x] = np.float32(0) if value <= 0 else value


@_compiled
def reduce(
    begin: int, end: int, _: int, g: Floats, z: Floats, scale: Floats, shift: Floats, mean: Floats, sums: Doubles
) -> None:
    """Adds to sums (n c, 2) those of the gradient where the ReLU passes, and of it times z - mean, over lines (n c, y x)."""
    for plane in range(begin, end):
        channel = plane % scale.size
        a, b, centre = scale[channel], shift[channel], mean[channel]
        for start in range(0, z.shape[1], 4096):
            values, flow = z[plane, start : start + 4096], g[plane, start : start + 4096]
            total, tilt = np.float32(0), np.float32(0)
            for x in range(values.size):
                passed = np.float32(0) if a * values[x] + b <= 0 else flow[x]
                total += passed
                tilt += passed * (values[x] - centre)
            sums[plane, 0] += total
            sums[plane, 1] += tilt


@_compiled
def backward(
    begin: int,
    end: int,
    band: int,
    size: tuple[int, int],
    x: Floats,
    z: Floats,
    g: Floats,
    terms: Floats,
    flipped: Floats,
    gx: Floats,
    g_weights: Floats,
) -> None:
    """Gradients of a layer: of flat x, unless gx is empty, and a unit each of the weights (unit, n_out, n_in, 9).

    `terms` (n_out, 5) are scale, shift, mean, slope, offset of `_pad_gradient`; `flipped` (n_in, n_out, 9) turned weights.
    """
    height, width = size
    n_in, n_out, stride = flipped.shape[0], flipped.shape[1], width + 2
    n_bands = (height + band - 1) // band
    sources = _planes(n_in, (band + 2) * stride + MARGIN)
    gradients = _planes(n_out, (band + 2) * stride + MARGIN)
    sums = _planes(2, band * stride)
    for unit in range(begin, end):
        image, y = unit // n_bands, unit % n_bands * band
        rows = min(band, height - y)
        for i in range(n_in):
            _pad(x, (image * n_in + i) * height * width, y - 1, rows + 2, height, width, sources[i])
        for o in range(n_out):
            start = (image * n_out + o) * height * width
            _pad_gradient(z, g, start, y - 1, rows + 2, height, width, terms[o], gradients[o])
        if gx.size:
            for i in range(0, n_in, 2):
                sums[:] = 0
                _add_correlation(gradients, stride, flipped, i, sums)
                for k in range(min(2, n_in - i)):
                    to = ((image * n_in + i + k) * height + y) * width
                    for row in range(rows):
                        _copy(sums[k], row * stride, width, gx, to + row * width)
        gradients[:, (rows + 1) * stride : (rows + 1) * stride + MARGIN] = 0  # the last vector looks into the next unit
        n_products = (rows * stride + 15) // 16 * 16
        for o in range(0, n_out, 2):
            _product(sources, stride, n_products, gradients, o, g_weights[unit])


@_compiled
def spread(begin: int, end: int, band: int, x: Floats, weights: Floats, bias: Floats, out: Floats) -> None:
    """A 2x2 transposed convolution of stride 2: x (n, n_in, y, x), weights (n_in, n_out, 4) -> out (n, n_out, 2 y, 2 x)."""
    n_in, height, width = x.shape[1:]
    n_bands = (height + band - 1) // band
    sums = np.empty((4, band * width), np.float32)
    for unit in range(begin, end):
        image, y = unit // n_bands, unit % n_bands * band
        rows = min(band, height - y)
        for o in range(weights.shape[1]):
            a, b, c, d = sums[0, : rows * width], sums[1, : rows * width], sums[2, : rows * width], sums[3, : rows * width]
            sums[:] = bias[o]
            for i in range(n_in):
                w, source = weights[i, o], x[image, i, y : y + rows].ravel()
                p, q, r, s = w[0], w[1], w[2], w[3]
                for k in range(rows * width):
                    a[k] += p * source[k]
                    b[k] += q * source[k]
                    c[k] += r * source[k]
                    d[k] += s * source[k]
            for row in range(rows):
                upper, lower = out[image, o, 2 * (y + row)], out[image, o, 2 * (y + row) + 1]
                for k in range(width):
                    upper[2 * k], upper[2 * k + 1] = a[row * width + k], b[row * width + k]
                    lower[2 * k], lower[2 * k + 1] = c[row * width + k], d[row * width + k]


@_compiled
def collect(
    begin: int, end: int, band: int, x: Floats, g: Floats, weights: Floats, gx: Floats, g_weights: Floats, g_bias: Floats
) -> None:
    """Gradients of `spread`: of x, and a unit each of the weights (unit, n_in, n_out, 4) and the bias (unit, n_out)."""
    n_in, height, width = x.shape[1:]
    n_out = weights.shape[1]
    n_bands = (height + band - 1) // band
    phases = np.empty((n_out, 4, band * width), np.float32)
    for unit in range(begin, end):
        image, y = unit // n_bands, unit % n_bands * band
        rows = min(band, height - y)
        size = rows * width
        for o in range(n_out):
            for row in range(rows):
                upper, lower = g[image, o, 2 * (y + row)], g[image, o, 2 * (y + row) + 1]
                a, b = phases[o, 0, row * width : (row + 1) * width], phases[o, 1, row * width : (row + 1) * width]
                c, d = phases[o, 2, row * width : (row + 1) * width], phases[o, 3, row * width : (row + 1) * width]
                for k in range(width):
                    a[k], b[k], c[k], d[k] = upper[2 * k], upper[2 * k + 1], lower[2 * k], lower[2 * k + 1]
            total = np.float32(0)
            for phase in range(4):
                for k in range(size):
                    total += phases[o, phase, k]
            g_bias[unit, o] = total
        for i in range(n_in):
            source, target = x[image, i, y : y + rows].ravel(), gx[image, i, y : y + rows].ravel()
            target[:] = 0
            for o in range(n_out):
                a, b, c, d = phases[o, 0, :size], phases[o, 1, :size], phases[o, 2, :size], phases[o, 3, :size]
                w = weights[i, o]
                p, q, r, s = w[0], w[1], w[2], w[3]
                e = f = u = v = np.float32(0)
                for k in range(size):
                    target[k] += p * a[k] + q * b[k] + r * c[k] + s * d[k]
                for k in range(size):
                    e += source[k] * a[k]
                    f += source[k] * b[k]
                    u += source[k] * c[k]
                    v += source[k] * d[k]
                g_weights[unit, i, o, 0], g_weights[unit, i, o, 1] = e, f
                g_weights[unit, i, o, 2], g_weights[unit, i, o, 3] = u, v


@_compiled
def pool(begin: int, end: int, _: int, x: Floats, out: Floats) -> None:
    """The maximum of each 2x2 of planes (n c, y, x), NaN if one is."""
    for plane in range(begin, end):
        for y in range(out.shape[1]):
            upper, lower, target = x[plane, 2 * y], x[plane, 2 * y + 1], out[plane, y]
            for k in range(target.size):
                best = upper[2 * k]
                for value in (upper[2 * k + 1], lower[2 * k], lower[2 * k + 1]):
                    best = value if (value > best) | (value != value) else best
                target[k] = best


@_compiled
def unpool(begin: int, end: int, _: int, x: Floats, g: Floats, gx: Floats) -> None:
    """A gradient goes to the first of equal maxima, as torch's does."""
    zero = np.float32(0)
    for plane in range(begin, end):
        if x.shape[1] % 2 or x.shape[2] % 2:
            gx[plane] = 0
        for y in range(g.shape[1]):
            upper, lower, flow = x[plane, 2 * y], x[plane, 2 * y + 1], g[plane, y]
            top, bottom = gx[plane, 2 * y], gx[plane, 2 * y + 1]
            for k in range(flow.size):
                a, b, c, d, whole = upper[2 * k], upper[2 * k + 1], lower[2 * k], lower[2 * k + 1], flow[k]
                first = whole if (a >= b) & (a >= c) & (a >= d) else zero
                second = whole if (b > a) & (b >= c) & (b >= d) else zero
                third = whole if (c > a) & (c > b) & (c >= d) else zero
                top[2 * k], top[2 * k + 1] = first, second
                bottom[2 * k] = third
                bottom[2 * k + 1] = zero if ((a >= d) | (b >= d) | (c >= d)) else whole


@_compiled
def mix(begin: int, end: int, _: int, x: Floats, weights: Floats, bias: Floats, out: Floats) -> None:
    """A 1x1 convolution of images (n, c, y x) by weights (n_out, c)."""
    for n in range(begin, end):
        for first in range(0, x.shape[2], MIXED):
            last = min(first + MIXED, x.shape[2])
            for o in range(weights.shape[0]):
                target = out[n, o, first:last]
                target[:] = bias[o]
                for c in range(weights.shape[1]):
                    source, weight = x[n, c, first:last], weights[o, c]
                    for k in range(target.size):
                        target[k] += weight * source[k]


@_compiled
def unmix(
    begin: int, end: int, _: int, x: Floats, g: Floats, weights: Floats, gx: Floats, g_weights: Doubles, g_bias: Doubles
) -> None:
    """From the gradient g (n, n_out, y x): that of x, and of weights (n, n_out, c) and bias (n, n_out) for each image."""
    for n in range(begin, end):
        g_weights[n] = 0.0
        g_bias[n] = 0.0
        for first in range(0, x.shape[2], MIXED):
            last = min(first + MIXED, x.shape[2])
            gx[n, :, first:last] = 0
            for o in range(weights.shape[0]):
                flow, whole = g[n, o, first:last], np.float32(0)
                for k in range(flow.size):
                    whole += flow[k]
                g_bias[n, o] += whole
                for c in range(weights.shape[1]):
                    source, target, weight, product = x[n, c, first:last], gx[n, c, first:last], weights[o, c], np.float32(0)
                    for k in range(flow.size):
                        target[k] += weight * flow[k]
                        product += flow[k] * source[k]
                    g_weights[n, o, c] += product
