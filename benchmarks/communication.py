"""What devices send to each other, counted in the compiled text, beside what theory says.

    python -m benchmarks.communication

compiles the ring's forward function and gradient for forced CPU devices (nothing is timed: they are
threads of one machine). Of n tokens on N devices, with p channels of keys and r of values and b
bytes a number, a device sends

    forward             (N - 1) (n / N) (p + r) b
    forward, cotangent  3 (N - 1) (n / N) (p + r) b

where the cotangent sends the keys N - 1 times, of which the first is that of the forward function,
and the sums that travel with them N times. Causal attention sends each operand and result with a
row a token once more, into zigzag order and out of it. Strong scaling (n fixed): less than
n (p + r) b, whatever N, while the pairs of a device are n^2 / N. Weak scaling (n / N fixed): N - 1
blocks, while the pairs are N times those of a block. The ratio of pairs to bytes, n / N for a
query, decides whether the sends hide behind the work.
"""

import collections
import math
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxflow as jf

KINDS = "all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"
WIDTHS = {"pred": 1, "f16": 2, "bf16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:to_apply|body|calls)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


def communicated(text: str) -> dict[str, int]:
    """Bytes of the results of collective operations on one device, by kind, from the text of a
    compiled program; those in a loop count once a turn.

    **Raises:** ValueError for a loop of unknown length with a collective operation in it.
    """
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[1]
            entry = name if line.startswith("ENTRY") else entry
            bodies[name] = []
        elif name:
            bodies[name].append(line)

    def total(name: str) -> collections.Counter[str]:
        found = collections.Counter[str]()
        for line in bodies.get(name, []):
            found.update(_own(line))
            for called in _called(line):
                if inner := total(called):
                    found.update({kind: _turns(line) * count for kind, count in inner.items()})
        return found

    return dict(total(entry))


def _own(line: str) -> dict[str, int]:
    """What an instruction itself communicates."""
    found = [kind for kind in KINDS if re.search(rf" {kind}(?:-start)?\(", line)]
    return {kind: _bytes(line.split(f" {kind}")[0].split(" = ")[1]) for kind in found}


def _called(line: str) -> list[str]:
    """The computations that an instruction runs."""
    found = _CALLED.findall(line)
    return [name for names in found for part in names for name in re.findall(r"[\w.\-]+", part)]


def _turns(line: str) -> int:
    if " while(" not in line:
        return 1
    if (trips := _TRIPS.search(line)) is None:
        raise ValueError(f"a loop of unknown length communicates: {line[:200]}")
    return int(trips[1])


def _bytes(types: str) -> int:
    number = lambda lengths: math.prod(int(n) for n in lengths.split(",") if n)
    return sum(WIDTHS[dtype] * number(lengths) for dtype, lengths in _ARRAY.findall(types))


def ring_bytes(devices: int, tokens: int, *, causal: bool, gradient: bool) -> tuple[dict, int]:
    """What a device of a ring receives in float32, by kind, and what theory says."""
    p, r = 4, 6
    mesh = Mesh(np.array(jax.devices()[:devices]), ("tokens",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec("tokens"))
    given = [jax.ShapeDtypeStruct((tokens, c), jnp.float32, sharding=place) for c in (p, p, r)]

    def value(q, k, v):
        return jf.softmax_expectation(q, k, v, causal=causal, backend="ring")[0]

    fn = jax.grad(lambda *a: (value(*a) ** 2).sum(), (0, 1, 2)) if gradient else value
    text = jax.jit(fn).lower(*given).compile().as_text() or ""
    block = 4 * tokens // devices
    sent = (devices - 1) * block * (p + r) * (3 if gradient else 1)
    order = p + p + r + r  # q, k, v and the mean
    if gradient:  # the log-partition; both, and what comes for both; the gradients
        order += 1 + (r + 1) + (r + 1) + (p + p + r)
    order = block * order if causal else 0
    return communicated(text), sent + order


def main():
    print("devices  tokens  causal  gradient  counted  theory")
    for causal in (False, True):
        for devices, tokens in [(2, 512), (4, 512), (8, 512), (2, 128), (4, 256)]:
            for gradient in (False, True):
                counted, theory = ring_bytes(devices, tokens, causal=causal, gradient=gradient)
                print(devices, tokens, causal, gradient, counted, theory, sep="\t")


if __name__ == "__main__":
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    main()
