"""How many tokens a second does a model generate?

    PYTHONPATH=. python -m benchmarks.generation

The same weights, greedily: by jaxflow with the keys and values of each layer kept, by jaxflow
without, and by the loop of nanoGPT (`GPT.generate`), which computes the whole text again for each
token, in torch with one thread and with as many as it likes. Tokens are compared before times are
taken, in turn.
"""

import statistics
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import typer

import jaxflow as jf

from . import rivals, transformers
from .device import provenance
from .timing import Launch, Runner, Samples, UnavailableError, in_turn

VOCABULARY = 65  # characters, as in nanoGPT's setting for a CPU
NAMES = "jaxflow", "jaxflow without cache", "torch, nanoGPT's loop", "the same 1 thread"


def model(dim: int, heads: int, layers: int, context: int) -> jf.models.LanguageModel:
    """With weights so large that the likeliest token does not hang on rounding."""
    start = jf.models.LanguageModel(VOCABULARY, dim, heads, layers, context, key=jax.random.key(0))
    return jax.tree.map(lambda a: 10 * a if a.ndim >= 3 else a, start)


def ours(whole: jf.models.LanguageModel, prompt: np.ndarray, length: int, *, cache: bool) -> Runner:
    text = jnp.asarray(prompt)
    launch = lambda: whole.generate(text, length, temperature=0, cache=cache)
    return Runner(launch, jax.block_until_ready)


def nanogpt(whole: jf.models.LanguageModel, prompt: np.ndarray, length: int) -> Launch:
    """The loop of nanoGPT, which reads out the last token of the text alone."""
    torch = rivals.module("torch")
    heads, context = whole.field.curve.coefficients.fields[0].field.query.shape[1], whole.context  # pyright: ignore
    arrays = jax.tree.map(np.array, transformers.parameters(whole))
    params = transformers.to_torch(transformers.layers(arrays))
    start = torch.from_numpy(prompt.astype(np.int64)).to(rivals.torch_device())

    def step(text):
        seen = text[:, -context:]
        x = params["embedding"][seen] + params["positions"][: seen.shape[1]]
        x = transformers.torch_loop(x, params["blocks"], heads)[:, -1]
        x = torch.nn.functional.layer_norm(
            x, x.shape[-1:], params["gain"], params["bias"], transformers.EPSILON
        )
        return (x @ params["embedding"].T).argmax(dim=-1, keepdim=True)

    def launch():
        text = start
        with torch.no_grad():
            for _ in range(length):
                text = torch.cat([text, step(text)], dim=1)
        return text

    return launch


def contest(whole: jf.models.LanguageModel, prompt: np.ndarray, length: int) -> dict[str, Runner]:
    """The rivals that can, which all generate the same tokens."""
    runs = {NAMES[i]: ours(whole, prompt, length, cache=i == 0) for i in range(2)}
    try:
        launch = nanogpt(whole, prompt, length)
        runs |= {
            name: rivals.torch_runner(launch, threads=rivals.torch_threads(name))
            for name in NAMES[2:]
        }
    except UnavailableError as error:
        print(f"torch: {error}.")
    texts = {name: np.asarray(run()) for name, run in runs.items()}
    for name, text in texts.items():
        if not np.array_equal(text, texts[NAMES[0]]):
            raise RuntimeError(f"{name} generates other tokens than {NAMES[0]}.")
    return runs


def main(
    batch: Annotated[list[int], typer.Option(help="Prompts at once.")] = [1, 12],  # noqa: B006
    dim: int = 128,
    heads: int = 4,
    layers: int = 4,
    context: int = 64,
    repeats: Annotated[int, typer.Option(help="The most samples of each.")] = 25,
):
    """Tokens a second, of texts that fill the context from one token on."""
    whole, length = model(dim, heads, layers, context), context - 1
    print(provenance())
    for prompts in batch:
        start = np.random.default_rng(0).integers(0, VOCABULARY, (prompts, 1))
        times = in_turn(contest(whole, start, length), samples=Samples(3, repeats))
        first = statistics.median(times[NAMES[0]])
        print(f"\n{prompts} x {length} tokens, {layers} layers, dim {dim}\n")
        print("| rival | tokens a second | time over jaxflow's |\n|---|---|---|")
        for name, taken in times.items():
            median = statistics.median(taken)
            print(f"| {name} | {prompts * length / median:,.0f} | {median / first:.2f} |")


if __name__ == "__main__":
    typer.run(main)
