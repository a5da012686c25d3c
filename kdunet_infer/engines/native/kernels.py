"""The arithmetic, as LLVM code for the CPU it will run on: every kernel makes some rows of one layer, vectorised along x.

Maps are planar float32. A row of a map holds its channels one after the other; a map keeps a ring of rows. Runtimes that
vectorise over channels waste most lanes of a network of 2 channels; along x none is wasted. A convolution holds rows x channels
x vectors sums in registers while it passes over the input channels: each weight that is loaded serves all vectors, and each
input vector all channels and up to three rows, so that the fused multiply-adds and not the loads are the limit.

Each sum adds its products in one order (input channel, row, column) whatever the blocking, and the bias at the end: a bias in
the first place would cost every partial sum the bits that it takes. So a pixel's bits do not depend on where it lies in a tile,
nor on the tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, product

from llvmlite import ir

from kdunet_infer.engines.native.emit import F32, I8, I64, POINTER, Kernel, Value
from kdunet_infer.engines.native.machine import MARGIN, Blocking, Field, Machine


def build_module(machine: Machine, triple: str) -> ir.Module:
    """All kernels and `run`, which drives them, for a kind of machine."""
    built = ir.Module("kdunet")
    built.triple = triple
    kernels = [
        _normalise(built, machine),
        _pool(built, machine),
        _head(built, machine, as_mask=False),
        _head(built, machine, as_mask=True),
        *(_convolve(built, machine, blocking) for blocking in machine.convolutions),
        *(_upsample(built, machine, blocking) for blocking in machine.upsamplings),
    ]
    _run(built, machine, kernels)
    return built


def _run(module: ir.Module, machine: Machine, kernels: list[Value]) -> None:
    """`run(records, n_tasks, rows_per_step, step_begin, step_end)`: every task makes its rows, step after step."""
    k = Kernel(module, "run", [POINTER, I64, I64, I64, I64], machine.n_lanes)
    records, n_tasks, rows_per_step, step_begin, step_end = k.function.args

    def step(s: Value) -> None:
        k.loop(k.integer(0), n_tasks, 1, lambda i: task(s, i))

    def task(s: Value, i: Value) -> None:
        record = k.at(records, k.b.mul(i, k.integer(len(Field))), I64)

        def rows_done(n_steps: Value) -> Value:
            rows = k.b.ashr(k.b.mul(n_steps, rows_per_step), k.field(record, Field.CLOCK))
            unclipped = k.b.sub(rows, k.field(record, Field.LAG))
            return k.smaller(k.greater(unclipped, k.field(record, Field.ROW_BEGIN)), k.field(record, Field.ROW_END))

        k.choose(k.field(record, Field.KERNEL), kernels, [record, rows_done(s), rows_done(k.b.add(s, k.integer(1)))])

    with k.denormals_as_zero():
        k.loop(step_begin, step_end, 1, step)
    k.b.ret_void()


@dataclass(frozen=True, slots=True)
class _Map:
    """A map's fields, loaded once a call."""

    pointer: Value
    n_channels: Value
    stride: Value
    n_rows: Value


def _map(k: Kernel, record: Value, first: Field) -> _Map:
    fields = (k.field(record, first + i) for i in (1, 2, 3))
    return _Map(k.pointer_field(record, first), *fields)


def _row(k: Kernel, m: _Map, row: Value) -> Value:
    """The address of column 0 of channel 0 of a row that is in the ring."""
    index = k.b.mul(k.b.srem(row, m.n_rows), k.b.mul(m.n_channels, m.stride))
    return k.at(m.pointer, k.b.add(index, k.integer(MARGIN)))


def _row_or_zeros(k: Kernel, record: Value, m: _Map, row: Value) -> tuple[Value, Value]:
    """The same and the stride from channel to channel; zeros above and below the map, as the network pads."""
    height = k.field(record, Field.HEIGHT)
    inside = k.b.and_(k.b.icmp_signed(">=", row, k.integer(0)), k.b.icmp_signed("<", row, height))
    zeros = k.at(k.pointer_field(record, Field.ZEROS), k.integer(MARGIN))
    safe = k.b.select(inside, row, k.integer(0))
    return k.b.select(inside, _row(k, m, safe), zeros), k.b.select(inside, m.stride, k.integer(0))


def _in_vectors(k: Kernel, record: Value, n_vectors: int, body: Callable[[Value, int], None]) -> None:
    """`body(x, n)` over the columns, `n_vectors` registers at a time and then one by one; up to a register beyond the end."""
    begin, end = k.field(record, Field.X_BEGIN), k.field(record, Field.X_END)
    size = n_vectors * k.n_lanes
    whole = k.b.sub(end, k.integer(size - k.n_lanes))  # a last block that is more than a register too long is cut
    x, _ = k.loop(begin, whole, size, lambda x: body(x, n_vectors))
    if n_vectors > 1:
        k.loop(x, end, k.n_lanes, lambda x: body(x, 1))


def _channel_rows(k: Kernel, m: _Map, rows: list[Value], first: Value, n: int) -> list[list[Value]]:
    """Addresses of column 0 of each row in `n` channels from `first` on, by row and channel."""
    return [[k.at(row, k.b.mul(k.b.add(first, k.integer(i)), m.stride)) for i in range(n)] for row in rows]


def _pad_right(k: Kernel, row: Value, end: Value) -> None:
    """A zero after the last column: what the next layer sees where the image ends. Never read where it does not end."""
    k.b.store(ir.Constant(F32, 0.0), k.at(row, end), align=4)


def _normalise(module: ir.Module, machine: Machine) -> Value:
    """uint8 -> (value - mean) / deviation, rounded as the graph does it: a division, not a product with the inverse."""
    k = Kernel(module, "normalise", [POINTER, I64, I64], machine.n_lanes)
    record, begin, end = k.function.args
    image, out = _map(k, record, Field.IN), _map(k, record, Field.OUT)
    constants = k.pointer_field(record, Field.WEIGHTS)
    mean, deviation = (k.splat(k.load(k.at(constants, k.integer(i)), F32)) for i in (0, 1))
    x_end = k.field(record, Field.X_END)

    def row(y: Value) -> None:
        source, target = k.at(image.pointer, k.b.mul(y, image.stride), I8), _row(k, out, y)

        def pixels(x: Value) -> None:
            grey = k.load_first_bytes(k.at(source, x, I8), k.b.sub(x_end, x))
            k.store_vector(k.b.fdiv(k.b.fsub(grey, mean), deviation), k.at(target, x))

        k.loop(k.field(record, Field.X_BEGIN), x_end, k.n_lanes, pixels)
        _pad_right(k, target, x_end)

    k.loop(begin, end, 1, row)
    k.b.ret_void()
    return k.function


def _convolve(module: ir.Module, machine: Machine, blocking: Blocking) -> Value:
    """3x3 convolution of one map, or of two as if concatenated, with bias and ReLU."""
    k = Kernel(module, f"convolve_{blocking.channels}", [POINTER, I64, I64], machine.n_lanes)
    record, begin, end = k.function.args
    inputs, out = (_map(k, record, Field.IN), _map(k, record, Field.IN2)), _map(k, record, Field.OUT)
    weights, biases = k.pointer_field(record, Field.WEIGHTS), k.pointer_field(record, Field.BIASES)
    n_weights = k.b.mul(k.b.add(inputs[0].n_channels, inputs[1].n_channels), k.integer(9 * blocking.channels))

    def rows(y: Value, n_rows: int) -> None:
        above = k.b.sub(y, k.integer(1))
        read = [[_row_or_zeros(k, record, m, k.b.add(above, k.integer(j))) for j in range(n_rows + 2)] for m in inputs]
        written = [_row(k, out, k.b.add(y, k.integer(r))) for r in range(n_rows)]

        def channels(c: Value) -> None:
            group = k.b.sdiv(c, k.integer(blocking.channels))
            w, bias = k.at(weights, k.b.mul(group, n_weights)), k.at(biases, c)
            targets = _channel_rows(k, out, written, c, blocking.channels)

            def columns(x: Value, n_vectors: int) -> None:
                block = Blocking(n_rows, blocking.channels, n_vectors)
                sums = [k.constant(0.0)] * len(_places(block))
                kernel = w
                for m, sources in zip(inputs, read, strict=True):
                    begins = [(k.at(row, x), stride) for row, stride in sources]
                    kernel, sums = _add_products(k, block, m.n_channels, begins, kernel, sums)
                for (r, i, v), total in zip(_places(block), sums, strict=True):
                    total = k.b.fadd(total, k.splat(k.load(k.at(bias, k.integer(i)), F32)))
                    k.store_vector(k.maximum(k.constant(0.0), total), k.at(targets[r][i], x), v * k.n_lanes)  # NaN stays NaN

            _in_vectors(k, record, blocking.vectors, columns)
            for target in chain(*targets):
                _pad_right(k, target, k.field(record, Field.X_END))

        k.loop(k.integer(0), out.n_channels, blocking.channels, channels)

    y, _ = k.loop(begin, k.b.sub(end, k.integer(blocking.rows - 1)), blocking.rows, lambda y: rows(y, blocking.rows))
    if blocking.rows > 1:
        k.loop(y, end, 1, lambda y: rows(y, 1))
    k.b.ret_void()
    return k.function


def _add_products(
    k: Kernel, block: Blocking, n_channels: Value, rows: list[tuple[Value, Value]], weights: Value, sums: list[Value]
) -> tuple[Value, list[Value]]:
    """Add to the sums what the channels of one map contribute; returns the weights of the next map, and the sums.

    `rows` are address and channel stride of the rows above, in and below the block. Weights lie as (channel, y, x, output).
    """
    n = len(rows)

    def channel(_: Value, *carried: Value) -> list[Value]:
        pointers, w, totals = carried[:n], carried[n], list(carried[n + 1 :])
        for j, kx in product(range(n), range(3)):
            seen = [k.load_vector(pointers[j], v * k.n_lanes + kx - 1) for v in range(block.vectors)]
            for ky in range(3):
                if not 0 <= j - ky < block.rows:
                    continue
                for i in range(block.channels):
                    weight = k.splat(k.load(k.at(w, k.integer((3 * ky + kx) * block.channels + i)), F32))
                    for v in range(block.vectors):
                        place = _places(block).index((j - ky, i, v))
                        totals[place] = k.fma(seen[v], weight, totals[place])
        following = [k.at(pointer, stride) for pointer, (_, stride) in zip(pointers, rows, strict=True)]
        return [*following, k.at(w, k.integer(9 * block.channels)), *totals]

    _, carried = k.loop(k.integer(0), n_channels, 1, channel, [*(pointer for pointer, _ in rows), weights, *sums])
    return carried[n], carried[n + 1 :]


def _places(block: Blocking) -> list[tuple[int, int, int]]:
    """Row, channel and vector of each sum."""
    return list(product(range(block.rows), range(block.channels), range(block.vectors)))


def _pool(module: ir.Module, machine: Machine) -> Value:
    """Maximum of 2x2 pixels."""
    k = Kernel(module, "pool", [POINTER, I64, I64], machine.n_lanes)
    record, begin, end = k.function.args
    fine, out = _map(k, record, Field.IN), _map(k, record, Field.OUT)
    even, odd = (range(first, 2 * k.n_lanes, 2) for first in (0, 1))

    def row(y: Value) -> None:
        above = k.b.mul(y, k.integer(2))
        read, written = [_row(k, fine, k.b.add(above, k.integer(j))) for j in range(2)], _row(k, out, y)

        def channel(c: Value) -> None:
            upper, lower = (k.at(source, k.b.mul(c, fine.stride)) for source in read)
            target = k.at(written, k.b.mul(c, out.stride))

            def pixels(x: Value) -> None:
                at = k.b.mul(x, k.integer(2))
                a, b = (
                    k.maximum(k.load_vector(k.at(upper, at), offset), k.load_vector(k.at(lower, at), offset))
                    for offset in (0, k.n_lanes)
                )
                k.store_vector(k.maximum(k.shuffle(a, b, even), k.shuffle(a, b, odd)), k.at(target, x))

            k.loop(k.field(record, Field.X_BEGIN), k.field(record, Field.X_END), k.n_lanes, pixels)
            _pad_right(k, target, k.field(record, Field.X_END))

        k.loop(k.integer(0), out.n_channels, 1, channel)

    k.loop(begin, end, 1, row)
    k.b.ret_void()
    return k.function


def _upsample(module: ir.Module, machine: Machine, blocking: Blocking) -> Value:
    """2x2 transposed convolution of stride 2: each pixel becomes four. Rows and columns count the coarse map's pixels."""
    k = Kernel(module, f"upsample_{blocking.channels}", [POINTER, I64, I64], machine.n_lanes)
    record, begin, end = k.function.args
    coarse, out = _map(k, record, Field.IN), _map(k, record, Field.OUT)
    weights, biases = k.pointer_field(record, Field.WEIGHTS), k.pointer_field(record, Field.BIASES)
    n_lanes, n = k.n_lanes, 4 * blocking.channels
    # a0 b0 a1 b1 ...: even and odd columns of the result
    mixed = [[lane // 2 + (n_lanes if lane % 2 else 0) + half for lane in range(n_lanes)] for half in (0, n_lanes // 2)]

    def row(y: Value) -> None:
        source, fine_y = _row(k, coarse, y), k.b.mul(y, k.integer(2))
        written = [_row(k, out, k.b.add(fine_y, k.integer(dy))) for dy in (0, 1)]

        def channels(c: Value) -> None:
            group = k.b.sdiv(c, k.integer(blocking.channels))
            w = k.at(weights, k.b.mul(group, k.b.mul(coarse.n_channels, k.integer(n))))
            bias = [k.splat(k.load(k.at(biases, k.b.add(c, k.integer(i))), F32)) for i in range(blocking.channels)]
            targets = _channel_rows(k, out, written, c, blocking.channels)

            def columns(x: Value, n_vectors: int) -> None:
                begins = [bias[i] for _, i, _, _ in _quads(blocking, n_vectors)]

                def channel(_: Value, pointer: Value, w: Value, *sums: Value) -> list[Value]:
                    seen = [k.load_vector(pointer, v * n_lanes) for v in range(n_vectors)]
                    added = []
                    for (dy, i, dx, v), total in zip(_quads(blocking, n_vectors), sums, strict=True):
                        weight = k.splat(k.load(k.at(w, k.integer((2 * dy + dx) * blocking.channels + i)), F32))
                        added.append(k.fma(seen[v], weight, total))
                    return [k.at(pointer, coarse.stride), k.at(w, k.integer(n)), *added]

                _, (_, _, *sums) = k.loop(k.integer(0), coarse.n_channels, 1, channel, [k.at(source, x), w, *begins])
                found = dict(zip(_quads(blocking, n_vectors), sums, strict=True))
                for dy, i, v in product((0, 1), range(blocking.channels), range(n_vectors)):
                    target = k.at(targets[dy][i], k.b.mul(x, k.integer(2)))
                    for half in (0, 1):
                        together = k.shuffle(found[dy, i, 0, v], found[dy, i, 1, v], mixed[half])
                        k.store_vector(together, target, (2 * v + half) * n_lanes)

            _in_vectors(k, record, blocking.vectors, columns)
            for target in chain(*targets):
                _pad_right(k, target, k.b.mul(k.field(record, Field.X_END), k.integer(2)))

        k.loop(k.integer(0), out.n_channels, blocking.channels, channels)

    k.loop(begin, end, 1, row)
    k.b.ret_void()
    return k.function


def _quads(blocking: Blocking, n_vectors: int) -> list[tuple[int, int, int, int]]:
    """Row, channel, column and vector of each sum of an up-sampling."""
    return list(product((0, 1), range(blocking.channels), (0, 1), range(n_vectors)))


def _head(module: ir.Module, machine: Machine, *, as_mask: bool) -> Value:
    """1x1 convolution to one map, the logistic function, and out into the result: the probability, or a mask of uint8.

    The mask is 1 where the very probability that the other kernel would store reaches the threshold, else 0; 255 for NaN.
    """
    k = Kernel(module, "mask" if as_mask else "probability", [POINTER, I64, I64], machine.n_lanes)
    record, begin, end = k.function.args
    features, out = _map(k, record, Field.IN), _map(k, record, Field.OUT)
    weights, bias = k.pointer_field(record, Field.WEIGHTS), k.load(k.pointer_field(record, Field.BIASES), F32)
    threshold = k.splat(k.load(k.pointer_field(record, Field.THRESHOLD), F32))
    x_begin, x_end = k.field(record, Field.X_BEGIN), k.field(record, Field.X_END)
    kind = I8 if as_mask else F32

    def row(y: Value) -> None:
        source = _row(k, features, y)
        target = k.at(out.pointer, k.b.mul(k.b.sub(y, k.field(record, Field.ORIGIN_Y)), out.stride), kind)

        def pixels(x: Value) -> None:
            def channel(c: Value, pointer: Value, total: Value) -> list[Value]:
                weight = k.splat(k.load(k.at(weights, c), F32))
                return [k.at(pointer, features.stride), k.fma(k.load_vector(pointer), weight, total)]

            _, (_, total) = k.loop(k.integer(0), features.n_channels, 1, channel, [k.at(source, x), k.constant(0.0)])
            found = _logistic(k, k.b.fadd(total, k.splat(bias)))
            if as_mask:
                is_nan = k.b.sext(k.b.fcmp_unordered("uno", found, found), k.bytes)
                found = k.b.or_(k.b.zext(k.b.fcmp_ordered(">=", found, threshold), k.bytes), is_nan)
            k.store_first(found, k.at(target, k.b.sub(x, k.field(record, Field.ORIGIN_X)), kind), k.b.sub(x_end, x))

        k.loop(x_begin, x_end, k.n_lanes, pixels)

    k.loop(begin, end, 1, row)
    k.b.ret_void()
    return k.function


def _logistic(k: Kernel, logit: Value) -> Value:
    """1 / (1 + exp(-logit)), within two units in the last place: exp by 2^n times a polynomial of the rest."""
    low, high = k.constant(-87.0), k.constant(87.0)  # exp stays a normal number; the logistic is 0 or 1 to float32 long before
    z = k.b.fneg(logit)
    z = k.b.select(k.b.fcmp_ordered("<", z, low), low, z)
    z = k.b.select(k.b.fcmp_ordered(">", z, high), high, z)
    # Adding and subtracting 1.5 * 2^23 rounds to the nearest integer.
    magic = k.constant(12582912.0)
    n = k.b.fsub(k.fma(z, k.constant(1.4426950408889634), magic), magic)
    # ln 2 in two parts (Cody and Waite), so that the rest is exact to float32.
    rest = k.fma(n, k.constant(-0.693145751953125), z)
    rest = k.fma(n, k.constant(-1.428606765330187e-06), rest)
    total = k.constant(1 / 5040)
    for divisor in (720, 120, 24, 6, 2, 1, 1):  # Taylor: |rest| <= 0.35, so the next term is below 1e-8
        total = k.fma(total, rest, k.constant(1 / divisor))
    exponent = k.b.shl(k.b.fptosi(n, k.integers), ir.Constant(k.integers, [23] * k.n_lanes))
    power = k.b.bitcast(k.b.add(k.b.bitcast(total, k.integers), exponent), k.vector)
    probability = k.b.fdiv(k.constant(1.0), k.b.fadd(k.constant(1.0), power))
    return k.b.select(k.b.fcmp_ordered("==", logit, logit), probability, logit)  # NaN stays NaN
