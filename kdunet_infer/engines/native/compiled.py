"""The kernels as machine code of this CPU: compiled once a process, in less than a second. The only file that talks to LLVM."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import llvmlite
import llvmlite.binding as llvm

from kdunet_infer.engines.native.kernels import build_module
from kdunet_infer.engines.native.machine import NARROW, SMALL, WIDE, Machine


@dataclass(frozen=True, slots=True)
class Compiled:
    """What can be called, and for what it was made."""

    machine: Machine
    cpu: str
    run: Callable[[int, int, int, int, int], None]
    """(address of the records, how many, rows per step, first step, end of the steps); lets go of the GIL."""
    keeps: Any
    """LLVM's own object: the code lives as long as it does."""


_FEATURES = {
    # LLVM prefers 256-bit registers on CPUs whose clock once fell under wide loads; this blocking is made for wide ones.
    WIDE: ",-prefer-256-bit",
    NARROW: ",-avx512f",
    SMALL: "",
}
"""What is added to the host's features."""


def host_machine() -> Machine:
    """The kind of machine this is."""
    features = llvm.get_host_cpu_features()
    if all(features.get(name) for name in ("avx512f", "avx512bw", "avx512vl")):
        return WIDE
    return NARROW if features.get("avx2") and features.get("fma") else SMALL


@functools.cache
def compile_kernels(machine: Machine) -> Compiled:
    """The kernels for `machine`, which the host must be able to run."""
    engine = jit(str(build_module(machine, llvm.get_default_triple())), machine)
    signature = ctypes.CFUNCTYPE(None, ctypes.c_void_p, *[ctypes.c_int64] * 4)
    return Compiled(machine, llvm.get_host_cpu_name(), signature(engine.get_function_address("run")), engine)


def jit(source: str, machine: Machine) -> Any:
    """LLVM's engine with the code of `source` for `machine`, which the host must be able to run: the code lives as long as it.

    `get_function_address(name)` of it says where a function is.
    """
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features().flatten() + _FEATURES[machine]
    host = llvm.Target.from_default_triple()
    target = host.create_target_machine(cpu=llvm.get_host_cpu_name(), features=features, opt=3)
    code = llvm.parse_assembly(source)
    code.verify()
    # No optimisation passes: kernels are written as they should run; -O2 takes as long as all the rest and brings 3 %.
    engine = llvm.create_mcjit_compiler(code, target)
    engine.finalize_object()
    return engine


def version() -> str:
    """Of the compiler."""
    return f"llvmlite {llvmlite.__version__}"
