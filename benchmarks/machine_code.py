"""What the compiler makes of the CUDA kernels, for devices that need not be there.

JAX's plugin for CUDA compiles for a device that is only described; `ptxas` then tells registers and
spills of each kernel, and `nvdisasm` its instructions. `make aot` installs all three.
"""

import atexit
import collections
import concurrent.futures
import contextlib
import functools
import importlib.util
import inspect
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.compilation_cache.compilation_cache import reset_cache


class Device(NamedTuple):
    """What the compiler asks about a GPU."""

    kind: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int  # of a block


DEVICES = {
    "8.0": Device("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166912),
    "8.9": Device("NVIDIA GeForce RTX 4090", (8, 9), 128, 101376),
    "9.0": Device("NVIDIA H100 80GB HBM3", (9, 0), 132, 232448),
    "10.0": Device("NVIDIA B200", (10, 0), 148, 232448),
    # Of GeForces JAX 0.11 knows no newer than the 4090 where none is at hand.
    "12.0": Device("NVIDIA RTX PRO 6000", (12, 0), 188, 101376),
}
# A message of XLA in text form (GpuTargetConfigProto); the rest matters to none of the kernels.
DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_block_optin: {shared_bytes}
  shared_memory_per_core: {shared_core}
  core_count: {multiprocessors}  fpus_per_core: 128
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 2000000000000  l2_cache_size: 41943040  clock_rate_ghz: 1.7
  device_memory_size: 25000000000
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{kind}"
"""
EXTENSIONS = "xla_cuda12", "xla_cuda13"  # JAX's plugins, by CUDA's version
TOOLS = "ptxas", "nvdisasm"
CUDA13 = ["nvidia-cuda-nvcc", "nvidia-nvvm"]  # the compiler, and what it needs of its own


class Loop(NamedTuple):
    """One innermost loop of a kernel: how often each instruction stands in it."""

    instructions: dict[str, int]

    @property
    def pairs(self) -> int:
        """Of a thread in one turn: an exponential each, or a maximum."""
        return self.instructions.get("MUFU.EX2", 0) or self.instructions.get("FMNMX", 0)

    @property
    def length(self) -> int:
        return sum(self.instructions.values())

    def count(self, *names: str) -> int:
        """Instructions whose name starts so."""
        return sum(n for name, n in self.instructions.items() if name.startswith(names))


class Kernel(NamedTuple):
    """One kernel in machine code."""

    registers: int  # of a thread
    spilled: int  # bytes of a thread, stored
    serialised: bool  # warpgroup products that wait for each other
    loops: tuple[Loop, ...]

    @property
    def main(self) -> Loop:
        """The loop that takes the time: the one with the most exponentials."""
        return max(self.loops, key=lambda loop: (loop.pairs, loop.length))


def missing() -> str | None:
    """What is missing to compile for a GPU that is not there, in words; None if all is there."""
    lacking = [name for name in TOOLS if _tool(name) is None]
    if _plugin() is None:
        lacking.insert(0, "JAX's plugin for CUDA")
    if not lacking:
        return None
    return f"{', '.join(lacking)} not installed: `make aot` installs what this needs, and runs it"


def lower(fn: Callable, args, device: Device, *, over: int = 1):
    """`fn` lowered for a device, by the descriptions of its arguments; or for several of its kind,
    with the first axis of all arguments and results divided among them."""
    sharding: jax.sharding.Sharding
    if over == 1:
        sharding = jax.sharding.SingleDeviceSharding(_described(device)[0])
    else:
        mesh = jax.sharding.Mesh(np.array(_described(device, over)), ("devices",))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("devices"))
    with _named(device):
        traced = jax.jit(fn, in_shardings=sharding, out_shardings=sharding).trace(*args)
        return traced.lower(lowering_platforms=("cuda",))


def compiled(lowered, device: Device, folder: str | None = None):
    """The program in machine code; with a folder, its kernels' PTX is written there, and the rest
    is left as it comes, since only the PTX will be read.

    What is divided among devices is lowered while it is compiled, so for the device here too.
    """
    options: dict[str, Any] = {}
    if folder is not None:
        options = {"xla_dump_to": folder, "xla_dump_emitter_re": "ptx"}
        options["xla_gpu_disable_gpuasm_optimizations"] = True
    with _environment(folder), _named(device), without_cache():
        return lowered.compile(compiler_options=options)


@functools.cache
def kernels(fn: Callable, args, device: Device) -> tuple[Kernel, ...]:
    """The Pallas kernels of a program, in the order of its text.

    `fn` and `args` are pickled: each device has a process of its own, since the plugin takes a
    kernel that it has compiled once for another device too.
    """
    return _process(device).submit(_kernels, fn, args, device).result()


@functools.cache
def _process(device: Device) -> concurrent.futures.Executor:
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn)
    atexit.register(pool.shutdown)
    return pool


def _kernels(fn: Callable, args, device: Device) -> tuple[Kernel, ...]:
    with tempfile.TemporaryDirectory() as folder:
        compiled(lower(fn, args, device), device, folder)
        return tuple(_kernel(file) for file in _sources(Path(folder)))


# ------------------------------------------------------------------ compiling


def _described(device: Device, count: int = 1):
    major, minor = device.capability
    core = device.shared_bytes + 1024
    text = DESCRIPTION.format(major=major, minor=minor, shared_core=core, **device._asdict())
    found = topologies.get_topology_desc("", "cuda", target_config=text, topology=f"1x1x{count}")
    return found.devices


@contextlib.contextmanager
def _named(device: Device) -> Iterator[None]:
    """Programs are lowered for the device: jaxflow chooses its kernels by it."""
    abstract = jax.sharding.AbstractDevice
    # JAX 0.10 has no argument for the platform.
    named = {"platform": "gpu"} if "platform" in inspect.signature(abstract).parameters else {}
    known = abstract(device_kind=device.kind, num_cores=device.multiprocessors, **named)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=known)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


@contextlib.contextmanager
def _environment(folder: str | None) -> Iterator[None]:
    """Mosaic GPU finds its tools on PATH, and is told by variables alone where to write."""
    old = dict(os.environ)
    tools = [str(Path(path).parent) for name in TOOLS if (path := _tool(name)) is not None]
    os.environ["PATH"] = os.pathsep.join([*tools, old.get("PATH", "")])
    if folder is not None:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(old)


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
    """A program that is read from JAX's cache tells no PTX, and needs the device to be read."""
    config: Any = jax.config
    enabled = config.jax_enable_compilation_cache
    config.update("jax_enable_compilation_cache", False)
    reset_cache()  # JAX asks once whether there is a cache.
    try:
        yield
    finally:
        config.update("jax_enable_compilation_cache", enabled)
        reset_cache()


def _plugin() -> Path | None:
    for name in EXTENSIONS:
        with contextlib.suppress(ImportError):
            if spec := importlib.util.find_spec(f"jax_plugins.{name}"):
                return Path(spec.origin or "").parent
    return None


def _tool(name: str) -> str | None:
    """The tool beside JAX's plugin, or else the one on PATH."""
    beside = [
        Path(folder).resolve() / "nvidia" for folder in sys.path if "site-packages" not in folder
    ]
    found = [file for folder in beside for file in folder.glob(f"*/bin/{name}")]
    return str(found[0]) if found else shutil.which(name)


# ------------------------------------------------------------------ reading the code


def _sources(folder: Path) -> list[Path]:
    """The PTX of the Pallas kernels, Triton's and Mosaic's; XLA's own have other names."""
    entry = re.compile(r"\.entry \w*kernel\w*\(")
    number = lambda file: [int(n) for n in re.findall(r"\d+", file.name)]
    return sorted((f for f in folder.glob("*.ptx") if entry.search(f.read_text())), key=number)


def _kernel(source: Path) -> Kernel:
    target = re.search(r"\.target (sm_\w+)", source.read_text())
    assert target is not None
    binary = source.with_suffix(".cubin")
    log = _run("ptxas", "-v", f"-arch={target[1]}", str(source), "-o", str(binary))
    registers, spilled = (
        re.search(r"Used (\d+) registers", log),
        re.search(r"(\d+) bytes spill", log),
    )
    assert registers is not None and spilled is not None, log
    code = _run("nvdisasm", "-c", str(binary))
    serialised = "wgmma" in log and "serialized" in log
    return Kernel(int(registers[1]), int(spilled[1]), serialised, tuple(_loops(code)))


def _run(tool: str, *args: str) -> str:
    path = _tool(tool)
    assert path is not None, f"{tool} is not installed"
    done = subprocess.run([path, *args], check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def _loops(code: str) -> Iterator[Loop]:
    """The innermost loops: what lies between a label and a jump back to it."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for line in code.splitlines():
        if label := re.match(r"(\.L_\w+):", line.strip()):
            labels[label[1]] = len(lines)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(found[1].strip())
            jump = re.search(r"\bBRA.*`\((\.L_\w+)\)", found[1])
            # A kernel ends in a jump to itself.
            if jump and labels.get(jump[1], len(lines)) < len(lines) - 1:
                spans.append((labels[jump[1]], len(lines)))
    for first, last in spans:
        inside = lambda other: first <= other[0] and other[1] <= last and other != (first, last)  # noqa: B023
        if not any(map(inside, spans)):
            yield Loop(collections.Counter(map(_name, lines[first:last])))


def _name(instruction: str) -> str:
    """Without its predicate and operands; MUFU and LDS keep what they do."""
    words = [w for w in instruction.split() if not w.startswith("@")]
    parts = words[0].split(".")
    return ".".join(parts[:2]) if parts[0] in ("MUFU", "LDS") else parts[0]


def cuda() -> int:
    """The newest version of CUDA that this JAX has a plugin for."""
    return 12 if tuple(map(int, jax.__version__.split(".")[:2])) < (0, 11) else 13


def requirements() -> list[str]:
    """What pip installs beside this JAX: its plugin, for CUDA 13 where there is one, and tools."""
    compiler = CUDA13 if cuda() == 13 else ["nvidia-cuda-nvcc-cu12"]
    plugin = [f"jax-cuda{cuda()}-{part}=={jax.__version__}" for part in ("plugin", "pjrt")]
    return [*plugin, *compiler, "nvidia-cuda-nvdisasm"]


if __name__ == "__main__":
    print(*requirements())
