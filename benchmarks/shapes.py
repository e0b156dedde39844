"""Named shapes of real work, for tests, benchmarks and tuning alike.

particles-n-d     n interacting particles on the sphere S^{d-1}, inverse temperature 4
heads-n-d         one head of long-context attention, head dimension d
language-b-n-d    b = batch * heads causal heads of a small language model
"""

import dataclasses

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
    scale: float = 4.0
    modes: tuple[str, ...] = ("forward",)  # of MODES, or "memory": one forward run, not timed

    @property
    def pairs(self) -> int:
        """Query-key pairs that count: half of them under a causal mask."""
        return self.batch * (self.n * (self.n + 1) // 2 if self.causal else self.n**2)

    def operands(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """q, k, v in float32, each (n, d), or (batch, n, d) where batch > 1.

        Particles (scale >= 1, a temperature) are one cloud on the sphere, heads three normal ones.
        """
        axes = (self.n, self.d) if self.batch == 1 else (self.batch, self.n, self.d)
        q, k, v = np.random.default_rng(self.n).standard_normal((3, *axes), np.float32)
        if self.scale >= 1:
            q = k = v = q / np.linalg.norm(q, axis=-1, keepdims=True)
        return q, k, v


def particles(n: int, d: int, *modes: str) -> Shape:
    return Shape(f"particles-{n}-{d}", n, d, modes=modes or ("forward",))


def heads(n: int, d: int, *modes: str) -> Shape:
    return Shape(f"heads-{n}-{d}", n, d, scale=d**-0.5, modes=modes or ("forward",))


def language(batch: int, n: int, d: int) -> Shape:
    name = f"language-{batch}-{n}-{d}"
    return Shape(name, n, d, batch=batch, causal=True, scale=d**-0.5, modes=MODES)


FULL = (
    *(particles(1024, d) for d in (2, 3, 8)),
    *(particles(4096, d, *(MODES if d == 3 else ())) for d in (2, 3, 8)),
    *(particles(16384, d, *(MODES if d == 3 else ())) for d in (2, 3, 8)),
    particles(131072, 3, "memory"),
    heads(4096, 64, *MODES),
    heads(16384, 64),
    language(8 * 4, 128, 32),
    language(8 * 8, 256, 64),
)
QUICK = (particles(1024, 3), particles(4096, 3, *MODES), language(8 * 4, 128, 32))
