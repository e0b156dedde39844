"""The suite `training`: what does a step of training a language model cost?

    theta -> L(theta), dL/dtheta      gradient: the layers of a transformer, one step each
    theta -> L, theta - AdamW         update: the same, and the optimiser
    theta -> L, dL/dtheta             adaptive: parameters a smooth curve in time, dopri5

in float32, against the same layers by `lax.scan` in plain jnp and by torch, and against diffrax
and torchdiffeq. All have one set of parameters, and the loss and its gradient are checked against
float64. A second table holds the memory of a gradient against the number of steps.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxflow as jf

from . import rivals, transformers
from .pace import Watch
from .peak import peak
from .slopes import fit
from .timing import (
    TOLERANCE,
    Options,
    Runner,
    compete,
    compiled,
    relative_error,
)

BUDGET_S = {"quick": 60, "full": 55}
VOCABULARY = 256  # bytes
SOLVE_TOLERANCE = 1e-3
# Of a gradient through a solve to that tolerance, which bounds the local error of the points.
SOLVE_ERROR = 0.1
# The update is then a smooth function of the gradient, so that it can be checked.
RATE, EPSILON, DECAY = 1e-3, 1e-4, 0.01
FACTOR = 3  # times as many samples as other suites take: a few per cent are to be told apart
MEASURE_PEAK = ("jaxflow", "torch")
POINTS, WIDTH = 256, 64  # of the solves whose memory is compared
STORED = 64  # steps up to which jaxflow keeps each state

SCANS = {
    "scan jaxflow": transformers.ours,
    "scan jax.nn": transformers.jax_nn,
    "scan naive": transformers.naive,
}
RIVALS = {
    "gradient": ("jaxflow", *SCANS, "torch", "torchdiffeq"),
    "update": ("jaxflow", "scan jaxflow", "torch"),
    "adaptive": ("jaxflow", "diffrax", "torchdiffeq"),
}
QUICK = ("jaxflow", "scan jaxflow", "torch", "torchdiffeq")


class Case(NamedTuple):
    batch: int
    n: int
    dim: int
    heads: int
    layers: int
    mode: str

    @property
    def name(self) -> str:
        return f"training-{self.batch}-{self.n}-{self.dim}"


def cases(quick: bool) -> list[Case]:
    if quick:
        return [Case(4, 64, 64, 2, 3, "gradient")]
    layers = Case(8, 128, 128, 4, 6, "gradient")
    return [layers, Case(8, 64, 64, 2, 3, "adaptive"), layers._replace(mode="update")]


class Answer(NamedTuple):
    """The loss, and the gradient or the new parameters; evaluations of the field, if counted."""

    loss: Any
    tree: Any
    evaluations: Any = None
    state: Any = None  # of the optimiser


# ------------------------------------------------------------------ jaxflow


def model(case: Case, *, backend: str | None = None) -> jf.models.LanguageModel:
    """As if trained a little: all parameters moved from where they start."""
    smooth = case.mode == "adaptive"
    depth = jf.models.Depth(
        float(case.layers), tolerance=SOLVE_TOLERANCE, solver=diffrax.Dopri5(), max_steps=64
    )
    start = jf.models.LanguageModel(
        VOCABULARY,
        case.dim,
        case.heads,
        case.layers,
        case.n,
        curve=jf.models.smooth if smooth else jf.models.layered,
        depth=depth if smooth else None,
        backend=backend,
        key=jax.random.key(0),
    )
    rng = np.random.default_rng(0)
    move = lambda a: a + jnp.asarray(0.02 * rng.standard_normal(a.shape), a.dtype)
    return jax.tree.map(lambda a: move(a) if eqx.is_inexact_array(a) else a, start)


def text(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and the ones that follow them."""
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (case.batch, case.n + 1))
    return tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32)


def ours(case: Case, row: dict, *, backend: str | None = None) -> Runner:
    params, static = eqx.partition(model(case, backend=backend), eqx.is_inexact_array)

    def loss(params, tokens, targets):
        whole = eqx.combine(params, static)
        solved = whole.solve(tokens)
        logits = whole.read_out(solved.final)
        value = optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
        return value, solved.stats["num_evaluations"]

    return step(case, row, loss, params)


# ------------------------------------------------------------------ the others


def with_jnp(case: Case, row: dict, *, attend: Callable) -> Runner:
    start = jax.tree.map(np.asarray, transformers.parameters(model(case)))
    return step(case, row, partial(jnp_loss, case, attend, SOLVE_TOLERANCE), start)


def jnp_loss(case: Case, attend: Callable, tolerance: float, params, tokens, targets):
    advance = partial(transformers.scanned, heads=case.heads, attend=attend)
    if case.mode == "adaptive":
        numbers = {"t1": float(case.layers), "tolerance": tolerance}
        advance = partial(transformers.solved, heads=case.heads, attend=attend, **numbers)
    return transformers.loss(params, tokens, targets, advance), None


def step(case: Case, row: dict, loss: Callable, params) -> Runner:
    """(loss, gradient) or (loss, updated parameters), compiled."""
    gradient = jax.value_and_grad(loss, has_aux=True)
    optimiser = optax.adamw(RATE, eps=EPSILON, weight_decay=DECAY)

    def run(params, state, tokens, targets):
        (value, evaluations), tree = gradient(params, tokens, targets)
        if case.mode == "update":
            updates, state = optimiser.update(tree, state, params)
            return Answer(value, optax.apply_updates(params, updates), state=state)
        return Answer(value, tree, evaluations)

    state = optimiser.init(params) if case.mode == "update" else None
    operands = params, state, *text(case)
    program = jax.jit(run)
    begin = time.perf_counter()
    program.trace(*operands)
    row["trace_s"] = time.perf_counter() - begin
    return compiled(program, *operands)


def with_torch(case: Case, row: dict, *, ode: bool, threads: int | None = None) -> Runner:
    torch = rivals.module("torch")
    arrays = jax.tree.map(np.array, transformers.parameters(model(case)))
    adaptive = case.mode == "adaptive"
    params = transformers.to_torch(arrays if adaptive else transformers.layers(arrays))
    leaves, structure = jax.tree.flatten(params)
    place = lambda a: torch.from_numpy(a.astype(np.int64)).to(rivals.torch_device())
    tokens, targets = map(place, text(case))
    adamw = {"lr": RATE, "eps": EPSILON, "weight_decay": DECAY, "fused": True}
    optimiser = torch.optim.AdamW(leaves, **adamw) if case.mode == "update" else None
    evaluations = [0]

    def count():
        evaluations[0] += 1

    advance = partial(transformers.torch_loop, heads=case.heads)
    if ode:
        rivals.module("torchdiffeq")
        advance = partial(transformers.torch_euler, heads=case.heads)
    if adaptive:
        numbers = {"t1": float(case.layers), "tolerance": SOLVE_TOLERANCE, "count": count}
        advance = partial(transformers.torch_solved, heads=case.heads, **numbers)

    def launch():
        evaluations[0] = 0
        loss = transformers.torch_loss(params, tokens, targets, advance)
        if optimiser is None:
            found = jax.tree.unflatten(structure, torch.autograd.grad(loss, leaves))
            return Answer(loss, found, evaluations[0])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return Answer(loss, params)

    return rivals.torch_runner(launch, threads=threads)


def prepare(case: Case, name: str, row: dict) -> Runner:
    library, _, backend = name.partition(" ")
    if library == "jaxflow":
        return ours(case, row, backend=backend or None)
    if library in ("torch", "torchdiffeq"):
        threads = rivals.torch_threads(name)
        return with_torch(case, row, ode=library == "torchdiffeq", threads=threads)
    return with_jnp(case, row, attend=SCANS.get(name, transformers.naive))


# ------------------------------------------------------------------ the check


def exact(case: Case) -> list[np.ndarray]:
    """In float64, with attention by the definition; solved to 1e-7 where steps are adaptive."""
    narrow = transformers.parameters(model(case))
    with jax.enable_x64(True):
        params = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), narrow)
        fn = partial(jnp_loss, case, transformers.naive, 1e-6)
        runner = step(case, {}, fn, params)
        return leaves(runner())


def leaves(answer: Answer) -> list[np.ndarray]:
    """The loss and the arrays of an answer, as all libraries share them."""
    tree = answer.tree
    if not isinstance(tree, dict):
        tree = transformers.parameters(tree)
    elif isinstance(tree["blocks"], list):
        stack = lambda *parts: np.stack(rivals.from_torch(parts))
        tree = tree | {"blocks": jax.tree.map(stack, *tree["blocks"])}
    found = rivals.from_torch([answer.loss, *jax.tree.leaves(tree)])
    return [np.asarray(a) for a in found]


# ------------------------------------------------------------------ memory


class Solve(NamedTuple):
    """A gradient through a flow of so many steps of one block."""

    name: str
    steps: int


def solves(quick: bool) -> list[Solve]:
    steps, names = (96, 384), ("jaxflow",)
    if not quick:
        steps, names = (6, 24, 96, 240, 600, 1536), ("jaxflow", "scan")
    return [Solve(*pair) for pair in itertools.product(names, steps)]


def many_steps(solve: Solve) -> Callable:
    """(field, x) -> the loss behind `steps` steps, by jaxflow or by `lax.scan`."""
    depth = jf.models.Depth(1.0, steps=solve.steps, solver=diffrax.Euler())

    def flowed(field, x):
        return depth.flow(field, jf.Measure(x)).measures[-1].points

    def scanned(field, x):
        @jax.checkpoint
        def body(x, _):
            return x + field(0.0, x, jf.Measure(x)) / solve.steps, None

        return jax.lax.scan(body, x, length=solve.steps)[0]

    advance = flowed if solve.name == "jaxflow" else scanned
    return lambda field, x: (advance(field, x) ** 2).mean()


def temporaries(solve: Solve) -> dict:
    """What the compiled gradient keeps beside its operands and results."""
    row: dict[str, Any] = {"rival": solve.name, "steps": solve.steps}
    field = jf.FeedForward(WIDTH, 2 * WIDTH, jnp.tanh, key=jax.random.key(0))
    params, static = eqx.partition(field, eqx.is_inexact_array)
    loss = many_steps(solve)
    gradient = jax.grad(lambda params, x: loss(eqx.combine(params, static), x))
    account = jax.jit(gradient).lower(params, jnp.ones((POINTS, WIDTH))).compile().memory_analysis()
    if account is None:
        return row | {"note": "this platform does not state its memory"}
    return row | {"peak_mib": account.temp_size_in_bytes / 2**20}


def fits(rows: Sequence[dict]) -> list[dict]:
    """b of memory ~ steps^b, over more steps than have all their states kept."""
    out = []
    for rival in dict.fromkeys(row["rival"] for row in rows):
        grown = {
            row["steps"]: row["peak_mib"]
            for row in rows
            if row["rival"] == rival and row["steps"] > STORED and "peak_mib" in row
        }
        if grown:
            out.append({"rival": rival} | fit({}, grown))
    return out


# ------------------------------------------------------------------ the suite


def run(options: Options, watch: Watch) -> dict:
    rivals.preload()
    memory = []
    if not options.only or "memory".startswith(options.only):
        label = lambda solve: f"memory {solve.name} {solve.steps} steps"
        memory = [temporaries(solve) for solve in watch.each(solves(options.quick), label)]
    chosen = [case for case in cases(options.quick) if case.name.startswith(options.only)]
    for case in watch.each(chosen, lambda case: f"{case.name} {case.mode}"):
        watch.rows += contest(case, competitors(case.mode, options), options)
    return {"rows": watch.rows, "fits": memory + fits(memory)}


def competitors(mode: str, options: Options) -> tuple[str, ...]:
    names = tuple(n for n in RIVALS[mode] if n in QUICK or not options.quick)
    return *rivals.beside_one_thread(names), *(f"jaxflow {name}" for name in options.backends)


def contest(case: Case, names: Sequence[str], options: Options) -> list[dict]:
    expected = exact(case)
    tolerance = SOLVE_ERROR if case.mode == "adaptive" else TOLERANCE["float32"]
    rows: list[dict[str, Any]] = [
        {"shape": case.name, "mode": case.mode, "rival": name} for name in names
    ]
    runners = compete(
        rows,
        lambda row: prepare(case, row["rival"], row),
        lambda found: relative_error(leaves(found), expected),
        tolerance,
        samples=options.samples._replace(
            least=FACTOR * options.samples.least, most=FACTOR * options.samples.most
        ),
    )
    for row in rows:
        if row["rival"] not in runners:
            continue
        counted = runners[row["rival"]]().evaluations if case.mode == "adaptive" else None
        if counted is not None:
            row["evaluations"] = int(counted)
        if case.mode == "gradient" and row["rival"] in MEASURE_PEAK and not options.quick:
            which = case._asdict() | {"name": row["rival"]}
            row |= peak("training", which, runners[row["rival"]])
    return against_scan(rows)


def against_scan(rows: list[dict]) -> list[dict]:
    """`vs_scan` and `compile_vs_scan`: over what the plain layers with the same attention take.

    By the fastest samples, which other programs disturbed least.
    """
    found = [row for row in rows if row["rival"] == "scan jaxflow" and "ms" in row]
    for row in rows if found else ():
        if "ms" in row:
            row["vs_scan"] = row["ms_min"] / found[0]["ms_min"]
        if "trace_s" in row:
            row["compile_vs_scan"] = row["compile_s"] / found[0]["compile_s"]
    return rows


def runner(name: str, batch: int, n: int, dim: int, heads: int, layers: int, mode: str) -> Runner:
    return prepare(Case(batch, n, dim, heads, layers, mode), name, {})
