"""Named shapes of real work, for tests, benchmarks and tuning alike.

particles-n-d       n interacting particles on the sphere S^{d-1}, inverse temperature 4
heads-n-d           one head of long-context attention, head dimension d
language-b-n-d      b = batch * heads causal heads of a language model
language-b-n-d-wW   each token sees itself and the W before it

A dtype other than float32 ends the name.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

MODES = ("forward", "gradient", "tangent")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Self-attention of n tokens of dimension d, `batch` times."""

    name: str
    n: int
    d: int
    batch: int = 1
    causal: bool = False
    window: int | None = None  # a query sees so many keys to each side, under the causal mask left
    scale: float = 4.0
    dtype: str = "float32"
    modes: tuple[str, ...] = ("forward",)  # of MODES, or "memory": one forward run, not timed

    @property
    def pairs(self) -> int:
        """Query-key pairs that count."""
        rows = np.arange(self.n)
        reach = self.n if self.window is None else self.window
        right = 0 if self.causal else np.minimum(rows[::-1], reach)
        return self.batch * int((np.minimum(rows, reach) + 1 + right).sum())

    def operands(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """q, k, v, each (n, d), or (batch, n, d) where batch > 1.

        Particles (scale >= 1, a temperature) are one cloud on the sphere, heads three normal ones.
        """
        axes = (self.n, self.d) if self.batch == 1 else (self.batch, self.n, self.d)
        q, k, v = np.random.default_rng(self.n).standard_normal((3, *axes), np.float32)
        if self.scale >= 1:
            q = k = v = q / np.linalg.norm(q, axis=-1, keepdims=True)
        dtype = jnp.dtype(self.dtype)
        return q.astype(dtype), k.astype(dtype), v.astype(dtype)


def particles(n: int, d: int, *modes: str) -> Shape:
    return Shape(f"particles-{n}-{d}", n, d, modes=modes or ("forward",))


def heads(n: int, d: int, *modes: str, dtype: str = "float32") -> Shape:
    name = _named(f"heads-{n}-{d}", dtype)
    return Shape(name, n, d, scale=d**-0.5, dtype=dtype, modes=modes or ("forward",))


def language(
    batch: int,
    n: int,
    d: int,
    *modes: str,
    window: int | None = None,
    dtype: str = "float32",
) -> Shape:
    name = _named(f"language-{batch}-{n}-{d}" + (f"-w{window}" if window else ""), dtype)
    rest = {"window": window, "scale": d**-0.5, "dtype": dtype, "modes": modes or MODES}
    return Shape(name, n, d, batch=batch, causal=True, **rest)


def _named(name: str, dtype: str) -> str:
    return name if dtype == "float32" else f"{name}-{dtype}"


BF16, F16 = "bfloat16", "float16"

CPU = (
    *(particles(1024, d) for d in (2, 3, 8)),
    *(particles(4096, d, *(MODES if d == 3 else ())) for d in (2, 3, 8)),
    *(particles(16384, d, *(MODES if d == 3 else ())) for d in (2, 3, 4, 8, 16)),
    particles(131072, 3, "memory"),
    heads(4096, 64, *MODES),
    heads(16384, 64),
    language(8 * 4, 128, 32),
    language(8 * 8, 256, 64),
    language(8, 2048, 64, "forward", "gradient", window=128),
)
CPU_QUICK = (particles(1024, 3), particles(4096, 3, *MODES), language(8 * 4, 128, 32))

GPU = (
    particles(16384, 3, *MODES),
    *(particles(65536, d, *(MODES if d in (3, 16) else ())) for d in (2, 3, 4, 8, 16)),
    particles(131072, 3, *MODES),
    particles(131072, 16),
    particles(1048576, 3),
    language(64, 1024, 64, dtype=BF16),
    language(64, 4096, 128, dtype=BF16),
    language(64, 8192, 64, "forward", dtype=BF16),
    language(64, 8192, 128, "forward", "gradient", dtype=BF16),
    language(64, 4096, 128, "forward", "gradient", window=512, dtype=BF16),
    language(64, 4096, 64, "forward", "gradient", dtype=F16),
    heads(16384, 16, dtype=BF16),
    heads(16384, 256, dtype=BF16),
    heads(16384, 64, *MODES),
)
GPU_QUICK = (
    particles(16384, 3, *MODES),
    particles(65536, 3),
    language(64, 1024, 64, dtype=BF16),
    heads(4096, 64),
)


def chosen(platform: str, *, quick: bool = False, only: str = "") -> tuple[Shape, ...]:
    """The shapes that suit a platform of JAX and whose name starts with `only`."""
    if platform == "cpu":
        shapes = CPU_QUICK if quick else CPU
    else:
        shapes = GPU_QUICK if quick else GPU
    return tuple(shape for shape in shapes if shape.name.startswith(only))
