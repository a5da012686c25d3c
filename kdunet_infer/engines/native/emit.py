"""A few verbs over llvmlite's IR builder, so that a kernel reads like the loop it is. Knows no networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

I8, I32, I64, F32, POINTER = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.PointerType()
_FLUSH_TO_ZERO, _DENORMALS_ARE_ZERO = 0x8000, 0x0040
"""Bits of x86's MXCSR."""

Value = Any
"""An llvmlite value; the library carries no types."""


class Kernel:
    """One function in the making: 64-bit integers and pointers in, nothing out.

    Vectors have `n_lanes` float32 lanes. Addresses are pointers to float32 unless said otherwise, indices count elements.
    """

    def __init__(self, module: ir.Module, name: str, arguments: Sequence[Any], n_lanes: int) -> None:
        self.module = module
        self.n_lanes = n_lanes
        self.vector = ir.VectorType(F32, n_lanes)
        self.function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), name)
        self.b = ir.IRBuilder(self.function.append_basic_block())

    # integers

    def integer(self, value: int) -> Value:
        """A 64-bit constant."""
        return ir.Constant(I64, value)

    def smaller(self, a: Value, b: Value) -> Value:
        """The smaller of two integers."""
        return self.b.select(self.b.icmp_signed("<", a, b), a, b)

    def greater(self, a: Value, b: Value) -> Value:
        """The greater of two integers."""
        return self.b.select(self.b.icmp_signed("<", a, b), b, a)

    # memory

    def at(self, pointer: Value, index: Value, kind: Any = F32) -> Value:
        """The address of element `index`."""
        return self.b.gep(pointer, [index], source_etype=kind)

    def load(self, pointer: Value, kind: Any) -> Value:
        """One value of `kind`."""
        return self.b.load(pointer, typ=kind, align=8 if kind in (I64, POINTER) else 4)

    def field(self, record: Value, index: int) -> Value:
        """64-bit integer `index` of a record."""
        return self.load(self.at(record, self.integer(index), I64), I64)

    def pointer_field(self, record: Value, index: int) -> Value:
        """The same as an address."""
        return self.b.inttoptr(self.field(record, index), POINTER)

    def load_vector(self, pointer: Value, offset: int = 0) -> Value:
        """`n_lanes` floats, `offset` elements after `pointer`, at any alignment."""
        return self.b.load(self.at(pointer, self.integer(offset)), typ=self.vector, align=4)

    def store_vector(self, value: Value, pointer: Value, offset: int = 0) -> None:
        """The other way round."""
        self.b.store(value, self.at(pointer, self.integer(offset)), align=4)

    def store_first(self, value: Value, pointer: Value, n: Value) -> None:
        """Store only the first `n` lanes, of floats or bytes."""
        size = 1 if value.type.element == I8 else 4
        store = self.intrinsic("masked.store", ir.VoidType(), [value.type, POINTER, I32, self.mask_type], "p0")
        self.b.call(store, [value, pointer, ir.Constant(I32, size), self.first(n)])

    def load_first_bytes(self, pointer: Value, n: Value) -> Value:
        """The first `n` of `n_lanes` bytes as floats; 0 in the others, whose memory is not touched."""
        load = self.intrinsic("masked.load", self.bytes, [POINTER, I32, self.mask_type, self.bytes], "p0")
        found = self.b.call(load, [pointer, ir.Constant(I32, 1), self.first(n), ir.Constant(self.bytes, None)])
        return self.b.uitofp(found, self.vector)

    # vectors

    @property
    def bytes(self) -> Any:
        """An 8-bit integer a lane."""
        return ir.VectorType(I8, self.n_lanes)

    @property
    def integers(self) -> Any:
        """A 32-bit integer a lane."""
        return ir.VectorType(I32, self.n_lanes)

    @property
    def mask_type(self) -> Any:
        """One bit a lane."""
        return ir.VectorType(ir.IntType(1), self.n_lanes)

    def first(self, n: Value) -> Value:
        """A mask of the first `n` lanes."""
        lanes = ir.Constant(ir.VectorType(I64, self.n_lanes), list(range(self.n_lanes)))
        return self.b.icmp_signed("<", lanes, self._spread(n, I64))

    def splat(self, scalar: Value) -> Value:
        """A float32 in every lane."""
        return self._spread(scalar, F32)

    def constant(self, value: float) -> Value:
        """A constant in every lane."""
        return ir.Constant(self.vector, [value] * self.n_lanes)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c; rounded once where the CPU can, which is anywhere but on the oldest x86."""
        return self.b.call(self.intrinsic("fmuladd", self.vector, [self.vector] * 3), [a, b, c])

    def maximum(self, a: Value, b: Value) -> Value:
        """The greater, lane by lane; b where either is NaN."""
        return self.b.select(self.b.fcmp_ordered(">", a, b), a, b)

    def shuffle(self, a: Value, b: Value, lanes: Sequence[int]) -> Value:
        """Lanes picked from a (0 to n_lanes - 1) and b (n_lanes and on)."""
        return self.b.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, self.n_lanes), list(lanes)))

    def intrinsic(self, name: str, returns: Any, arguments: Sequence[Any], *suffix: str) -> Value:
        """LLVM's own `llvm.<name>` for these types."""
        first = arguments[0] if isinstance(arguments[0], ir.VectorType) else returns
        kind = f"v{self.n_lanes}{'i8' if first.element == I8 else 'f32'}"
        full = ".".join(["llvm", name, kind, *suffix])
        found = self.module.globals.get(full)
        return found or ir.Function(self.module, ir.FunctionType(returns, arguments), full)

    def _spread(self, scalar: Value, kind: Any) -> Value:
        wide = ir.VectorType(kind, self.n_lanes)
        one = self.b.insert_element(ir.Constant(wide, ir.Undefined), scalar, ir.Constant(I32, 0))
        return self.b.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, self.n_lanes), [0] * self.n_lanes))

    # control

    def loop(
        self,
        begin: Value,
        end: Value,
        step: int,
        body: Callable[..., Sequence[Value] | None],
        carried: Sequence[Value] = (),
    ) -> tuple[Value, list[Value]]:
        """`for i in range(begin, end, step)`: `body(i, *carried)` returns the carried values of the next round.

        Returns the first i that was not run, and the carried values at the end.
        """
        before, head, inside, after = self.b.block, *(self.function.append_basic_block() for _ in range(3))
        self.b.branch(head)
        self.b.position_at_end(head)
        phis = [self._phi(value, before) for value in (begin, *carried)]
        self.b.cbranch(self.b.icmp_signed("<", phis[0], end), inside, after)
        self.b.position_at_end(inside)
        following = [self.b.add(phis[0], self.integer(step)), *(body(*phis) or ())]
        for phi, value in zip(phis, following, strict=True):
            phi.add_incoming(value, self.b.block)
        self.b.branch(head)
        self.b.position_at_end(after)
        return phis[0], phis[1:]

    def choose(self, index: Value, functions: Sequence[Value], arguments: Sequence[Value]) -> None:
        """Call `functions[index]`."""
        after = self.function.append_basic_block()
        switch = self.b.switch(index, after)
        for number, function in enumerate(functions):
            block = self.function.append_basic_block()
            switch.add_case(number, block)
            self.b.position_at_end(block)
            self.b.call(function, arguments)
            self.b.branch(after)
        self.b.position_at_end(after)

    @contextmanager
    def denormals_as_zero(self) -> Iterator[None]:
        """What is emitted inside runs with numbers below 1e-38 taken for 0: on some CPUs each would cost a hundred cycles."""
        if not self.module.triple.startswith(("x86_64", "i686")):
            yield  # NEON in AArch64 computes with them at full speed
            return
        saved, changed = self.b.alloca(I32), self.b.alloca(I32)
        store, load = (
            ir.Function(self.module, ir.FunctionType(ir.VoidType(), [POINTER]), f"llvm.x86.sse.{verb}mxcsr")
            for verb in ("st", "ld")
        )
        address = [self.b.bitcast(pointer, POINTER) for pointer in (saved, changed)]
        self.b.call(store, address[:1])
        flags = self.b.or_(self.b.load(address[0], typ=I32), ir.Constant(I32, _FLUSH_TO_ZERO | _DENORMALS_ARE_ZERO))
        self.b.store(flags, address[1])
        self.b.call(load, address[1:])
        yield
        self.b.call(load, address[:1])

    def _phi(self, value: Value, block: Value) -> Value:
        phi = self.b.phi(value.type)
        phi.add_incoming(value, block)
        return phi
