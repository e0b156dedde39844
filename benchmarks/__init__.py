"""Benchmarks of jaxflow against its rivals; README.md says how to run and read them.

A suite is a module with `BUDGET_S` and `run(options, watch)`, and a name in `SUITES`.
"""

SUITES = (
    "kernels",
    "flow",
    "derivatives",
    "scaling",
    "scale",
    "compile",
    "training",
    "observables",
    "solvers",
)
