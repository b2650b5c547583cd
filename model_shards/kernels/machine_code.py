"""LLVM text to functions that this process can call, on one thread or on those that torch computes with."""

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import llvmlite.binding as llvm
import torch

_TEAM = ("omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier")


@dataclass(frozen=True)
class OpenMP:
    """The runtime whose threads torch computes with, so that there are no others beside them."""

    library: ctypes.CDLL
    team: dict[str, int]  # addresses of _TEAM

    def run(self, function: int, argument: int, num_threads: int) -> None:
        """Calls `void function(void *argument)` on each thread of the calling thread's team; returns after all did."""
        self.library.GOMP_parallel(ctypes.c_void_p(function), ctypes.c_void_p(argument), num_threads, 0)


def on_each_thread(function: Callable[[int], None], num_threads: int) -> None:
    """Calls a function with the number of each thread of the calling thread's team, on that thread; 0 is itself.

    Without OpenMP there is the calling thread alone. The function must not raise.
    """
    openmp = find_openmp()
    if openmp is None or num_threads <= 1:
        function(0)
        return
    library = openmp.library
    callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: function(library.omp_get_thread_num()))
    openmp.run(ctypes.cast(callback, ctypes.c_void_p).value or 0, 0, num_threads)


def find_openmp() -> OpenMP | None:
    """GNU's runtime as this process has it loaded; None where torch computes with another or with none."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    loaded = {line.split(maxsplit=5)[5] for line in lines if "/libgomp" in line}
    # torch brings its own; another package may have loaded one beside it.
    torch_directory = Path(torch.__file__).parent
    own = (f"{torch_directory}/", f"{torch_directory}.libs/")
    for path in sorted(loaded, key=lambda path: (not path.startswith(own), path)):
        library = ctypes.CDLL(path)
        team = {name: ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in _TEAM}
        return OpenMP(library, {name: address for name, address in team.items() if address is not None})
    return None


# The function as it is called on one thread, and by each thread of a team.
_SERIAL = """
define void @serial(ptr %arguments) nounwind "prefer-vector-width"="512" {
  call void @share(ptr %arguments, i64 0, i64 1)
  ret void
}"""
_PARALLEL = """
declare i32 @omp_get_thread_num()
declare i32 @omp_get_num_threads()
define void @parallel(ptr %arguments) nounwind "prefer-vector-width"="512" {
  %number = call i32 @omp_get_thread_num()
  %count = call i32 @omp_get_num_threads()
  %first = zext i32 %number to i64
  %step = zext i32 %count to i64
  call void @share(ptr %arguments, i64 %first, i64 %step)
  ret void
}"""


class TeamFunction:
    """A function that the threads of a team share: compiled, and there as long as this is."""

    def __init__(self, text: str, library: "Mapping[str, int | TeamFunction] | None" = None) -> None:
        """`text` defines `void @share(ptr %arguments, i64 %first, i64 %step)`: every `step`-th piece of the work, from
        `first`. `library`: where functions are that it declares, for this process for good; `share` of those that are
        such functions themselves."""
        self._openmp = find_openmp()
        self._library = dict(library or {})  # kept: the code has their addresses only
        for name, function in self._library.items():
            llvm.add_symbol(name, function.share if isinstance(function, TeamFunction) else function)
        self._engine = _compile(text + _SERIAL + ("" if self._openmp is None else _PARALLEL), self._openmp)
        self._serial = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._engine.get_function_address("serial"))
        self._parallel = 0 if self._openmp is None else int(self._engine.get_function_address("parallel"))
        self.share: int = int(self._engine.get_function_address("share"))  # its address

    def run(self, arguments: "ctypes.Array[ctypes.c_int64]", num_threads: int) -> None:
        """Calls it; what its arguments point at must live until then."""
        address = ctypes.addressof(arguments)
        if self._openmp is None or num_threads <= 1:
            self._serial(address)
        else:
            self._openmp.run(self._parallel, address, num_threads)


def _compile(text: str, openmp: OpenMP | None) -> llvm.ExecutionEngine:
    """For the CPU at hand."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    if openmp is not None:
        for name, address in openmp.team.items():
            llvm.add_symbol(name, address)
    module = llvm.parse_assembly(text)
    module.verify()
    features = llvm.get_host_cpu_features().flatten()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features, opt=3, jit=True
    )
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
    passes.getModulePassManager().run(module, passes)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return engine
