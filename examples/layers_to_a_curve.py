"""The layers of a trained transformer as a smooth curve in time, and what a short training makes of
it.

    python examples/layers_to_a_curve.py [FILE]

A small language model of characters (default text: Python's own manual) with 6 layers is trained,
its layers are replaced by the nearest curve of 6, 4, 3 and 2 Legendre polynomials
(`model.smoothed`), and each curve is trained for 100 steps more, at 3, 6 and 12 steps of the solver
drawn anew for each.
"""

import sys

import jax

import jaxflow as jf
from jaxflow.models import LanguageModel
from jaxflow.training import Chars, Elastic, adamw, evaluate, fit, text_data

LAYERS = 6
DEPTHS = 3, 6, 12  # steps of the solver; the layers have one each


def main(path: str | None = None, steps=300, more=100, dim=64, kept=(6, 4, 3, 2)) -> dict:
    data = text_data(path, tokenizer=Chars(), context=64, batch_size=12)
    held_out = list(data.validation_batches(10))

    def losses(model, depths=DEPTHS):
        at = lambda n: evaluate(model.with_depth(model.depth.with_steps(n)), held_out)["loss"]
        return {n: at(n) for n in depths}

    def trained(model, steps, **options):
        fitted = fit(
            model, data, steps=steps, evaluate_every=steps, evaluation_batches=1, **options
        )
        return fitted.model

    model = LanguageModel(data.vocab_size, dim, 4, LAYERS, 64, key=jax.random.key(0))
    layers = trained(model, steps)
    found = {"layers": losses(layers, (LAYERS,))}
    for coefficients in kept:
        curve = layers.smoothed(coefficients)
        lost = jf.fields.time.relative_distance(
            layers.field.curve, curve.field.curve, t1=layers.depth.t1
        )
        print(f"{coefficients} polynomials: {float(lost):.2f} of the layers' size away from them")
        found[f"{coefficients}, smoothed"] = losses(curve)
        optimiser = adamw(more, learning_rate=5e-4)
        curve = trained(curve, more, depths=Elastic(DEPTHS), optimiser=optimiser)
        found[f"{coefficients}, trained on"] = losses(curve)
    for name, row in found.items():
        print(f"{name:14}" + "".join(f"  {n} steps {loss:.3f}" for n, loss in row.items()))
    return found


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
