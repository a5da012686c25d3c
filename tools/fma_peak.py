"""The most fused multiply-adds a second this CPU can do in float32: a loop that touches no memory, in LLVM code.

Every sum waits for its own last product only, and there are more sums than the units have products in flight. What an engine
reaches of this is how well it uses the CPU, whatever the CPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kdunet_infer.engines.native.compiled import host_machine, jit
from kdunet_infer.engines.native.machine import Machine

N_LOOPS = 2_000_000
"""A call: a few milliseconds."""


def peak_run(n_threads: int) -> tuple[Callable[[], None], int]:
    """A call that keeps `n_threads` CPUs busy, and how many multiply-adds it does."""
    machine = host_machine()
    n_lanes = machine.n_lanes
    n_sums = 24 if n_lanes == 16 else 12  # of 32 registers, or of 16
    spin = _compiled(_source(n_lanes, n_sums), machine)
    threads = ThreadPoolExecutor(n_threads)
    outs = [(ctypes.c_float * (n_lanes * n_sums))() for _ in range(n_threads)]

    def run() -> None:
        for job in [threads.submit(spin, ctypes.addressof(out), N_LOOPS) for out in outs]:
            job.result()

    return run, n_threads * N_LOOPS * n_lanes * n_sums


def _source(n_lanes: int, n_sums: int) -> str:
    vector, sums = f"<{n_lanes} x float>", range(n_sums)
    factor, summand = (f"<{', '.join([f'float {value}'] * n_lanes)}>" for value in ("0.5", "1.0"))  # a sum tends to 2
    phis = "\n".join(f"  %a{i} = phi {vector} [zeroinitializer, %begin], [%b{i}, %loop]" for i in sums)
    products = "\n".join(
        f"  %b{i} = call {vector} @llvm.fma.v{n_lanes}f32({vector} %a{i}, {vector} {factor}, {vector} {summand})" for i in sums
    )
    stores = "\n".join(
        f"  %p{i} = getelementptr {vector}, ptr %out, i64 {i}\n  store {vector} %b{i}, ptr %p{i}, align 4" for i in sums
    )
    return f"""
declare {vector} @llvm.fma.v{n_lanes}f32({vector}, {vector}, {vector})

define void @spin(ptr %out, i64 %n) {{
begin:
  br label %loop
loop:
  %i = phi i64 [0, %begin], [%next, %loop]
{phis}
{products}
  %next = add i64 %i, 1
  %more = icmp slt i64 %next, %n
  br i1 %more, label %loop, label %end
end:
{stores}
  ret void
}}
"""


_engines: list[Any] = []
"""Code lives as long as its engine."""


def _compiled(source: str, machine: Machine) -> Callable[[int, int], None]:
    engine = jit(source, machine)
    _engines.append(engine)
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(engine.get_function_address("spin"))
