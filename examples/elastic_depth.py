"""One model at any depth: trained at one number of steps, or at numbers drawn for each batch.

    python examples/elastic_depth.py [FILE]

A small language model of characters (default text: Python's own manual), whose parameters are a
smooth curve in time, is trained at one depth, at depths drawn anew for each step, and so with a
cost of what halved steps change: with Lie-Trotter splitting, a transformer's residual stream, and
with Strang's, of order 2. Each model is then evaluated at depths, solvers and tolerances that it
was not trained at; runs/elastic_depth.png draws the loss against evaluations.

Of one seed on the tiny Shakespeare, at the defaults, the validation loss was

    evaluations                   2      3      4      6      8      12     Tsit5 to 0.001
    trained at 4                  2.490  2.436  2.435  2.482  2.556  2.719  3.210
    trained at 2, 3, 4 and 6      2.461  2.459  2.465  2.479  2.495  2.545  2.944

Drawn depths flatten the loss, beyond those drawn too; adaptive steps cannot use either model.
"""

import sys
from pathlib import Path

import diffrax
import jax

import jaxflow as jf
from jaxflow.models import Depth, LanguageModel, smooth
from jaxflow.solvers import LieTrotter, Strang
from jaxflow.training import Chars, Elastic, FlowLoss, cross_entropy, evaluate, fit, text_data

T = 4.0
LIE, STRANG = LieTrotter(), Strang()
# The model's own depth, those that are drawn in training, and the weight of consistency.
TRAININGS = {
    "Lie-Trotter 4": (Depth(T, 4, solver=LIE), None, 0.0),
    "Lie-Trotter 2-6": (Depth(T, 4, solver=LIE), Elastic((2, 3, 4, 6)), 0.0),
    "Lie-Trotter 2-6, consistent": (Depth(T, 4, solver=LIE), Elastic((2, 3, 4, 6)), 1.0),
    "Strang 2": (Depth(T, 2, solver=STRANG), None, 0.0),
    "Strang 1-3": (Depth(T, 2, solver=STRANG), Elastic((1, 2, 3)), 0.0),
    "Strang 1-3, consistent": (Depth(T, 2, solver=STRANG), Elastic((1, 2, 3)), 1.0),
}
DEPTHS = {
    **{f"Lie-Trotter {n}": Depth(T, n, solver=LIE) for n in (2, 3, 4, 6, 8, 12)},
    **{f"Strang {n}": Depth(T, n, solver=STRANG) for n in (1, 2, 3, 4, 6)},
    **{f"Heun {n}": Depth(T, n, solver=diffrax.Heun()) for n in (4, 8)},
    **{f"Tsit5 {tol:g}": Depth(T, tolerance=tol, solver=diffrax.Tsit5()) for tol in (1e-1, 1e-3)},
}


def main(
    path: str | None = None, steps=400, dim=64, trainings=tuple(TRAININGS), depths=tuple(DEPTHS)
) -> dict:
    data = text_data(path, tokenizer=Chars(), context=64, batch_size=12)
    held_out = list(data.validation_batches(10))
    losses: dict[str, dict[str, tuple[float, float]]] = {}
    for name in trainings:
        depth, drawn, consistency = TRAININGS[name]
        model = LanguageModel(
            data.vocab_size, dim, 4, 4, 64, curve=smooth, depth=depth, key=jax.random.key(0)
        )
        fitted = fit(
            model,
            data,
            steps=steps,
            loss=FlowLoss(cross_entropy, consistency=consistency),
            depths=drawn,
            evaluate_every=steps,
            evaluation_batches=1,
        )
        print(f"\n{name}: {fitted.history[-1]['total_evaluations'] / steps:.1f} evaluations a step")
        losses[name] = {}
        for label in depths:
            found = evaluate(fitted.model.with_depth(DEPTHS[label]), held_out)
            losses[name][label] = found["num_evaluations"], found["loss"]
            print(f"  {label:14} {found['num_evaluations']:6.1f} evaluations, {found['loss']:.3f}")
    draw(losses)
    return losses


def draw(losses: dict):
    """The loss of each model against evaluations, at the depths of the solver it was trained by."""
    pairs = {}
    for name, found in losses.items():
        own = [value for at, value in found.items() if at.split()[0] == name.split()[0]]
        pairs[name] = [count for count, _ in own], [loss for _, loss in own]
    axes = jf.viz.curves(pairs, xlabel="evaluations of the field", ylabel="validation loss")
    for line in axes.lines:
        line.set_marker("o")
    figure = axes.get_figure(root=True)
    assert figure is not None
    Path("runs").mkdir(exist_ok=True)
    figure.savefig("runs/elastic_depth.png", dpi=150)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
