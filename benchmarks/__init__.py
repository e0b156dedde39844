"""Benchmarks of jaxflow against its rivals; README.md says how to run and read them.

A suite is a module with `BUDGET_S` and `run(options, watch)`, and a line in `SUITES`. Nothing here
imports JAX, so that the command line answers at once.
"""

SUITES = {
    "kernels": "is the attention operation right, how fast is it, how near to the device?",
    "flow": "what does a whole solve cost, at equal error?",
    "derivatives": "what do gradients, tangents and Hessian products cost, of attention and flows?",
    "scaling": "how do time and memory grow with the number of particles?",
    "scale": "what do many tokens cost where not all n^2 pairs are asked, and at what error?",
    "compile": "what does the first call cost, and does a new beta or time cost it again?",
    "training": "what does a step of training a language model cost?",
    "generation": "how many tokens a second does a model write?",
    "precision": "what does bfloat16 cost, and save, in training?",
    "observables": "what does it cost to look at a flow: phase diagrams, functions of a measure?",
    "solvers": "which method follows metastable tokens, and up to what beta?",
}
