"""The suite `generation`: how many tokens a second does a model generate?

The same weights write greedily until the context is full, from one token on: jaxflow with the keys
and values of each layer kept, jaxflow without, and the loop of nanoGPT (`GPT.generate`), which
computes the whole text again for each token, in torch. All must write the same tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxflow as jf

from . import rivals, transformers
from .pace import Watch
from .timing import Launch, Options, Runner, compete

BUDGET_S = {"quick": 20, "full": 20}
VOCABULARY = 65  # characters, as in nanoGPT's setting for a CPU
RIVALS = "jaxflow", "jaxflow without cache", "torch"


class Case(NamedTuple):
    prompts: int
    dim: int = 128
    heads: int = 4
    layers: int = 4
    context: int = 64

    @property
    def name(self) -> str:
        return f"generation-{self.prompts}-{self.context - 1}"

    @property
    def tokens(self) -> int:
        return self.prompts * (self.context - 1)


def cases(quick: bool) -> list[Case]:
    return [Case(1, 32, 2, 2, 16)] if quick else [Case(1), Case(12)]


def model(case: Case) -> jf.models.LanguageModel:
    """With weights so large that the likeliest token does not hang on rounding."""
    sizes = case.dim, case.heads, case.layers, case.context
    start = jf.models.LanguageModel(VOCABULARY, *sizes, key=jax.random.key(0))
    return jax.tree.map(lambda a: 10 * a if a.ndim >= 3 else a, start)


def prompt(case: Case) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCABULARY, (case.prompts, 1))


def ours(case: Case, *, cache: bool) -> Runner:
    whole, start = model(case), jnp.asarray(prompt(case))
    launch = lambda: whole.generate(start, case.context - 1, temperature=0, cache=cache)
    return Runner(launch, jax.block_until_ready)


def nanogpt(case: Case) -> Launch:
    """The loop of nanoGPT, which reads out the last token of the text alone."""
    torch = rivals.module("torch")
    arrays = jax.tree.map(np.array, transformers.parameters(model(case)))
    params = transformers.to_torch(transformers.layers(arrays))
    start = torch.from_numpy(prompt(case).astype(np.int64)).to(rivals.torch_device())

    def step(text):
        seen = text[:, -case.context :]
        x = params["embedding"][seen] + params["positions"][: seen.shape[1]]
        x = transformers.torch_loop(x, params["blocks"], case.heads)[:, -1]
        x = torch.nn.functional.layer_norm(
            x, x.shape[-1:], params["gain"], params["bias"], transformers.EPSILON
        )
        return (x @ params["embedding"].T).argmax(dim=-1, keepdim=True)

    def launch():
        text = start
        with torch.no_grad():
            for _ in range(case.context - 1):
                text = torch.cat([text, step(text)], dim=1)
        return text

    return launch


def prepare(case: Case, name: str) -> Runner:
    if name.startswith("jaxflow"):
        runner = ours(case, cache=name == "jaxflow")
        runner()  # compiles
        return runner
    return rivals.torch_runner(nanogpt(case), threads=rivals.torch_threads(name))


def run(options: Options, watch: Watch) -> dict:
    rivals.preload()
    chosen = [case for case in cases(options.quick) if case.name.startswith(options.only)]
    for case in watch.each(chosen, lambda case: case.name):
        watch.rows += contest(case, rivals.beside_one_thread(RIVALS), options)
    return {"rows": watch.rows}


def contest(case: Case, names: Sequence[str], options: Options) -> list[dict]:
    expected = np.asarray(ours(case, cache=False)())
    rows: list[dict[str, Any]] = [{"shape": case.name, "rival": name} for name in names]
    compete(
        rows,
        lambda row: prepare(case, row["rival"]),
        lambda found: float((np.asarray(found) != expected).mean()),
        0.0,
        samples=options.samples,
    )
    for row in rows:
        if "ms" in row:
            row["tokens_per_s"] = 1e3 * case.tokens / row["ms"]
    return rows
