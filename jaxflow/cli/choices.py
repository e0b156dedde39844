"""The names that flags choose from, without what they name: help and completion import no JAX.

A test holds them against the tables that they are looked up in.
"""

from enum import StrEnum

Interaction = StrEnum("Interaction", "softmax unnormalised linear hardmax sinkhorn l2")
Law = StrEnum("Law", "uniform gaussian cap circle simplex")
Geometry = StrEnum("Geometry", "sphere euclidean rms-norm layer-norm")
Scheme = StrEnum("Scheme", "post sqrt pre peri ngpt")
Observable = StrEnum("Observable", "energy clusters diameter order hull-area kinetic entropy rank")
Picture = StrEnum("Picture", "png pdf svg")
Until = StrEnum("Until", "never clustered steady")
Solver = StrEnum(
    "Solver",
    "lie-trotter strang euler normalised-euler midpoint heun rk4 bosh3 tsit5 dopri5 dopri8 "
    "geodesic kvaerno3 kvaerno5",
)
Curve = StrEnum("Curve", "layers shared linear smooth fourier hyper hyper-full")
Block = StrEnum("Block", "gpt2 llama parallel attention theory")
Placement = StrEnum("Placement", "pre peri post")
Tokens = StrEnum("Tokens", "bytes chars bpe")
Matrices = StrEnum("Matrices", "identity gaussian goe signed")
PhaseInteraction = StrEnum("PhaseInteraction", "softmax unnormalised")
Motion = StrEnum("Motion", "independent common")
At = StrEnum("At", "step time evaluations")
DType = StrEnum("DType", "float32 float64 float16 bfloat16")

# Methods without an estimate of their error, which take fixed steps.
FIXED = {Solver(name) for name in ("lie-trotter", "strang", "euler", "normalised-euler", "rk4")}

# Methods for flows with noise; tsit5, the default, stands for Heun's along geodesics.
NOISY = {Solver(name) for name in ("tsit5", "euler", "heun", "midpoint", "geodesic")}
