"""The GPU kernels' own code, run on a CPU by the interpreter of PTX in `ptx`: numbers and races.

The first tests are of the interpreter and run anywhere; the others need JAX's plugin for CUDA,
which compiles the kernels for devices that need not be there: `make aot`.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from ptx.launch import execute, interpreted
from ptx.machine import Order
from ptx.memory import DeviceMemory, KernelError
from ptx.operands import Launch
from ptx.program import parse

from benchmarks import machine_code
from jaxflow.kernels.base import MODES, Band, Cotangent, Forward, Mode, Problem, Tangent, evaluate
from jaxflow.kernels.blocked import Blocked
from jaxflow.kernels.pallas_gpu import hopper
from jaxflow.kernels.pallas_gpu.hopper import Config, Hopper
from jaxflow.kernels.pallas_gpu.particles import Particles
from jaxflow.kernels.pallas_gpu.tensor_cores import TensorCores

# ------------------------------------------------------------------ the interpreter

# Each of 64 threads gives its number to the thread of the same lane in the other warp.
EXCHANGE = """
.visible .entry exchange(.param .u64 exchange_param_0)
.reqntid 64, 1, 1
{
    .shared .align 16 .b8 memory[256];
    ld.param.b64 %rd1, [exchange_param_0];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd2, %r1, 4;
    mov.b64 %rd3, memory;
    add.s64 %rd4, %rd3, %rd2;
    st.shared.b32 [%rd4], %r1;
    bar.sync 0;
    xor.b64 %rd5, %rd2, 128;
    add.s64 %rd6, %rd3, %rd5;
    ld.shared.b32 %r2, [%rd6];
    add.s64 %rd7, %rd1, %rd2;
    st.global.b32 [%rd7], %r2;
    ret;
}
"""


def exchanged(text, seed):
    memory = DeviceMemory([np.zeros(64, np.uint32)])
    parameters = {"exchange_param_0": memory.address(0)}
    execute(parse(text), Launch((1, 1, 1), 256, parameters, {}, {}), memory, Order(seed))
    return memory.array(0, (64,), np.uint32)


def right(text, seed):
    return (exchanged(text, seed) == np.arange(64) ^ 32).all()


def test_warps_that_meet_read_what_the_others_wrote():
    assert all(right(EXCHANGE, seed) for seed in range(10))
    assert not all(right(EXCHANGE.replace("bar.sync 0;", ""), seed) for seed in range(10))


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("st.global.b32 [%rd7]", "st.global.b32 [%rd7+4]", "outside of array 0, 256 bytes"),
        ("ld.shared.b32 %r2, [%rd6]", "ld.shared.b32 %r2, [%rd6+256]", "outside of shared memory"),
        ("[%rd4], %r1", "[%rd4+2], %r1", "not aligned to 4 bytes"),
        ("bar.sync 0;", "setp.lt.u32 %p1, %r1, 32; @%p1 bar.sync 0;", "wait for ever"),
        ("bar.sync 0;", "bar.sync 0, 96;", "wait for ever"),
        ("bar.sync 0;", "setp.lt.u32 %p1, %r1, 9; @%p1 bar.sync 0;", "lanes of a warp part"),
        (
            "bar.sync 0;",
            "mbarrier.init.shared.b64 [memory], 1; mbarrier.arrive.shared.b64 _, [memory], 2;",
            "more arrivals than the 1",
        ),
    ],
)
def test_mistakes(old, new, message):
    assert old in EXCHANGE
    with pytest.raises(KernelError, match=message):
        exchanged(EXCHANGE.replace(old, new), 0)


def test_an_unknown_instruction():
    with pytest.raises(NotImplementedError, match="the instruction popc.b32"):
        exchanged(EXCHANGE.replace("bar.sync 0;", "popc.b32 %r3, %r1;"), 0)


# ------------------------------------------------------------------ the kernels

REASON = machine_code.missing()
compiled = pytest.mark.skipif(REASON is not None, reason=REASON or "")
CAUSAL: Band = (None, 0)
EARLY_AND_LATE = (Order(0), Order(1, late=True))


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes that are multiples of no tile; a key of weight zero where there are weights."""

    family: Any
    mode: Mode
    dtype: str
    p: int
    r: int
    m: int = 70
    n: int = 300
    band: Band = (None, None)
    weighted: bool = True
    scales: tuple[float, ...] = (0.25,)  # one of each system
    orders: tuple[Order, ...] = EARLY_AND_LATE

    def __str__(self):
        lowering = "" if self.family != TRITON else "-triton"
        sizes = f"{self.m}-{self.n}-{self.p}-{self.r}"
        rest = f"{self.band}-{'weighted' if self.weighted else 'plain'}-{self.scales}"
        return f"{self.family.name}{lowering}-{self.mode}-{self.dtype}-{sizes}-{rest}"

    @property
    def problem(self):
        return Problem(self.band, self.weighted)

    def operands(self):
        rng = np.random.default_rng(self.p + self.r)
        batch, m, n, p, r = len(self.scales), self.m, self.n, self.p, self.r
        draw = lambda *s: jnp.asarray(rng.standard_normal((batch, *s)), jnp.float32)
        low = lambda *s: draw(*s).astype(self.dtype)
        b = draw(n).at[0, 5].set(-jnp.inf) if self.weighted else jnp.zeros((batch, n))
        primal = Forward(low(m, p), low(n, p), low(n, r), b, jnp.asarray(self.scales))
        if self.mode == "forward":
            return primal
        mean, lse = Blocked().forward(_exact(primal), self.problem)
        mean = mean.astype(self.dtype)
        if self.mode == "cotangent":
            return Cotangent(*primal, mean, lse, low(m, r), draw(m))
        db = draw(n) if self.weighted else jnp.zeros((batch, n))
        return Tangent(*primal, mean, lse, draw(m, p), low(n, p), low(n, r), db)

    @property
    def tolerance(self):
        """Relative to the largest entry: a few roundings to 8 or 11 bits of a product's factors;
        of float32, exponentials of scores, which are as uncertain as they are large.
        """
        if self.dtype == "float32":
            return 1e-5 * max(1.0, *self.scales)
        return 2 * float(jnp.finfo(self.dtype).eps)

    def error(self, found, expected) -> float:
        """The largest, in units of the tolerance; what is infinite must be so in both."""
        worst = 0.0
        for f, e in zip(found, expected, strict=True):
            f, e = np.asarray(f, np.float64), np.asarray(e, np.float64)
            finite = np.isfinite(e)
            if (f[~finite] != e[~finite]).any() or not np.isfinite(f[finite]).all():
                return np.inf
            worst = max(worst, np.abs(f - e)[finite].max() / np.abs(e[finite]).max())
        return worst / self.tolerance

    def errors(self):
        """One for each order."""
        operands, problem = self.operands(), self.problem
        used = 3 if self.mode == "cotangent" and not self.weighted else None
        expected = evaluate(Blocked(), _exact(operands), problem)[:used]
        for order in self.orders:
            with interpreted(order):
                found = evaluate(self.family, operands, problem)[:used]
            yield self.error(found, expected)


def _exact(operands):
    return jax.tree.map(lambda a: a.astype(jnp.float32), operands)


MOSAIC, TRITON = Particles(mosaic=True), Particles(mosaic=False)
HOPPER, TENSOR_CORES = Hopper(), TensorCores()


def particles(family, mode: Mode, d: int, **options: Any) -> Case:
    return Case(family, mode, "float32", d, d, **options)


def heads(mode: Mode, d: int, dtype="bfloat16", family: Any = HOPPER, **options: Any) -> Case:
    options = {"m": 150, "n": 200} | options
    return Case(family, mode, dtype, d, d, **options)


CASES = [
    # The bound on the scores is safe for the first system, not for the second.
    *(particles(MOSAIC, mode, 3, scales=(0.7, 40.0)) for mode in MODES),
    particles(MOSAIC, "forward", 2, n=1000, weighted=False),
    particles(MOSAIC, "tangent", 8),
    particles(MOSAIC, "forward", 16),
    *(particles(TRITON, mode, 3, scales=(0.7, 40.0)) for mode in MODES),
    heads("forward", 64, family=TENSOR_CORES),
    heads("tangent", 64, family=TENSOR_CORES, band=CAUSAL, weighted=False),
    heads("cotangent", 64, "float16", family=TENSOR_CORES, band=(20, 10)),
    heads("forward", 64, "float32", family=TENSOR_CORES, band=CAUSAL),
    heads("cotangent", 20, "float32", family=TENSOR_CORES, band=CAUSAL, weighted=False),
    heads("forward", 64, weighted=False),
    heads("forward", 64, m=64, n=64, weighted=False, scales=(-0.2,)),
    heads("forward", 128, "float16", band=CAUSAL),
    heads("tangent", 64, band=CAUSAL),
    heads("cotangent", 64, band=CAUSAL),
    # The rows past 66 see no key.
    heads("cotangent", 32, m=130, n=64, band=(2, 2)),
]
MANY = (*EARLY_AND_LATE, *(Order(seed, late) for seed in (2, 3, 4) for late in (False, True)))
MATRIX = [
    *(
        particles(family, mode, d, weighted=weighted, orders=MANY)
        for family in (MOSAIC, TRITON)
        for mode in MODES
        for d in (2, 3, 8, 16)
        for weighted in (False, True)
    ),
    # Triton places the barriers of the tensor cores' kernels by itself: two orders are enough.
    *(
        heads(mode, d, dtype, family, band=band, weighted=weighted, orders=orders)
        for family, orders in ((HOPPER, MANY), (TENSOR_CORES, EARLY_AND_LATE))
        for mode in MODES
        for dtype, d in (*(("bfloat16", d) for d in (16, 32, 64, 128, 256)), ("float16", 64))
        for band in ((None, None), CAUSAL, (20, 10))
        for weighted in (False, True)
    ),
    *(
        heads(mode, d, "float32", TENSOR_CORES, band=band)
        for mode in MODES
        for d in (20, 64, 128)
        for band in ((None, None), CAUSAL)
    ),
]


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels(case):
    for error in case.errors():
        assert error < 1


@compiled
@pytest.mark.slow
@pytest.mark.aot_full
@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_all_kernels(case):
    for error in case.errors():
        assert error < 1


# ------------------------------------------------------------------ kernels made wrong


def wrong(case) -> bool:
    try:
        return not all(error < 1 for error in case.errors())
    except KernelError:
        return True


SEEDS = tuple(Order(seed) for seed in range(6))


@compiled
@pytest.mark.slow
def test_barriers_between_reads_and_the_next_copy_are_missed(monkeypatch):
    unsafe = partial(plgpu.CompilerParams, unsafe_no_auto_barriers=True)
    case = particles(MOSAIC, "forward", 2, n=1024, weighted=False, orders=SEEDS)
    assert not wrong(case)
    monkeypatch.setattr(plgpu, "CompilerParams", unsafe)
    assert wrong(case)


@compiled
@pytest.mark.slow
def test_a_fence_before_a_product_is_missed(monkeypatch):
    case = heads("forward", 64, m=64, n=64, weighted=False, scales=(-0.2,))
    monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
    with pytest.raises(KernelError, match="written without a fence"):
        list(case.errors())


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("method", ["feed", "wait"])
def test_waits_for_the_ring_of_tiles_are_missed(method, monkeypatch):
    """`feed` waits for tiles to be empty, `wait` for them to be full."""
    owner = hopper._Ring if method == "feed" else hopper._Tiles
    original = getattr(owner, method)

    def hasty(self, *args):
        with monkeypatch.context() as patch:
            patch.setattr(plgpu, "barrier_wait", lambda barrier: None)
            return original(self, *args)

    case = heads("forward", 64, m=128, n=320, weighted=False, family=Hopper(Config(64)))
    assert not wrong(case)
    monkeypatch.setattr(owner, method, hasty)
    assert wrong(case)
