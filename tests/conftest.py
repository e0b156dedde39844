"""Every test runs with shapes checked, strict dtypes, no implicit broadcasting of ranks."""

import importlib.metadata
import importlib.util
import os
from pathlib import Path

# Programs that one worker or one run has compiled are read by the others, subprocesses included;
# the smallest compile as fast as they are written.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    programs = Path(__file__).parent.parent / ".pytest_cache" / "programs"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(programs)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

if importlib.util.find_spec("beartype"):
    import jaxtyping

    jaxtyping.install_import_hook("jaxflow", "beartype.beartype")

# Kernels are lowered for devices that are not at hand, and tested where they are proved nowhere.
os.environ.setdefault("JAXFLOW_KERNELS", "all")

# The suite is little else than compiling small programs, each of which runs once. Without LLVM's
# optimisations they compile in two thirds of the time; XLA's own, which decide what is computed
# and in what order, stay. A program that runs for long asks for all by the fixture `optimised`;
# where JAX's plugin for GPUs is, the code of kernels is what is tested.
if not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu")):
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# XLA's newer emitters for CPUs double the time to compile a small program, and to cut it into
# pieces takes a seventh more. JAX's own setting compiles on newer versions and where XLA_FLAGS is
# set; the compiler for TPUs ends the process at a flag of the CPU's.
if importlib.metadata.version("jaxlib").startswith("0.10.") and not importlib.util.find_spec(
    "libtpu"
):
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ.setdefault("XLA_FLAGS", flags)

import contextlib
import gc
import inspect
import re
import signal

import jax
import jax.numpy as jnp
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# A machine with a GPU need not have the packages that only other tests compare with.
MISSING = [name for name in ("scipy", "hypothesis") if importlib.util.find_spec(name) is None]
collect_ignore = [
    file.name
    for file in Path(__file__).parent.glob("test_*.py")
    if any(re.search(rf"^(from|import) {name}\b", file.read_text(), re.M) for name in MISSING)
]


# A suite that runs in the background is started with Ctrl-C ignored, which some tests send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    if jax.default_backend() == "gpu":
        return
    reason = "needs a GPU; none on this machine"
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish():
    """Tracing makes so many objects that a tenth of its time goes into collecting them: what is
    imported by now stays, and is not looked through again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """Programs are dropped where they come to fill three quarters of the memory maps of a process,
    some four to ten each: XLA ends in a segmentation fault, not an error, where there are no more
    (65,530 on Linux).
    """
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 48_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def x64():
    """Float64 for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def compiles():
    """compiles(dtype) skips where XLA has no such numbers for the processor: float16 needs more
    than SSE 4.2."""

    def check(dtype):
        try:
            jax.jit(lambda x: x + x)(jnp.ones(3, dtype))
        except jax.errors.JaxRuntimeError as error:
            pytest.skip(f"{jnp.dtype(dtype).name} does not compile for this processor: {error}")

    return check


@pytest.fixture
def optimised():
    """For programs that take longer to run than to compile."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, False)
    yield
    jax.config.update(name, before)


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def abstract_device():
    """with abstract_device(kind): lowers as for that device, on a machine that has none."""

    @contextlib.contextmanager
    def use(kind):
        abstract = jax.sharding.AbstractDevice
        named = {"platform": "gpu"} if "platform" in inspect.signature(abstract).parameters else {}
        device = abstract(device_kind=kind, num_cores=132, **named)
        mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            yield

    return use
