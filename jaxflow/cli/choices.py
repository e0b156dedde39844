"""The names that flags choose from, without what they name: help and completion import no JAX.

A test holds them against the tables that they are looked up in.
"""

from enum import StrEnum

Interaction = StrEnum("Interaction", "softmax unnormalised linear hardmax sinkhorn".split())
Law = StrEnum("Law", "uniform gaussian cap circle simplex".split())
Geometry = StrEnum("Geometry", "sphere euclidean rms-norm layer-norm".split())
Scheme = StrEnum("Scheme", "post sqrt pre peri ngpt".split())
Observable = StrEnum(
    "Observable", "energy clusters diameter order hull-area kinetic entropy rank".split()
)
Until = StrEnum("Until", "never clustered steady".split())
Solver = StrEnum(
    "Solver",
    "lie-trotter strang euler midpoint heun rk4 bosh3 tsit5 dopri5 dopri8 geodesic kvaerno3 "
    "kvaerno5".split(),
)
Curve = StrEnum("Curve", "layers shared linear smooth fourier hyper hyper-full".split())
Placement = StrEnum("Placement", "pre peri post".split())
Tokens = StrEnum("Tokens", "bytes chars bpe".split())
PhaseInteraction = StrEnum("PhaseInteraction", "softmax unnormalised".split())
DType = StrEnum("DType", "float32 float64 float16 bfloat16".split())

# Methods without an estimate of their error, which take fixed steps.
FIXED = {Solver(name) for name in ("lie-trotter", "strang", "euler", "rk4")}
