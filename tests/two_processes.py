"""Run by test_devices.py in each process of a training: FOLDER STEPS DEVICES [resume].

Prints the losses of its steps as JSON, from the first process; after SIGTERM each process says at
which step it ended."""

import json
import sys
import time
from pathlib import Path

import jax

import jaxflow as jf
from jaxflow import training
from jaxflow.training import processes

processes.LOST = 10
FOLDER, STEPS, DEVICES, *RESUME = sys.argv[1:]
DIGITS = training.image_data(batch_size=8)


class Slow:
    """Batches that take a while, once the first steps are made, and say where they are."""

    validation_batches = staticmethod(DIGITS.validation_batches)
    describe = staticmethod(DIGITS.describe)

    def batch(self, step: int):
        Path(FOLDER, f"at-{jax.process_index()}").write_text(str(step))
        if jax.process_count() > 1 and step > 2:
            time.sleep(1)
        return DIGITS.batch(step)


if __name__ == "__main__":
    training.join()
    model = jf.models.ResidualNetwork(64, 10, 8, 2, width=8, key=jax.random.key(0))
    fitted = training.fit(
        model,
        Slow(),
        steps=int(STEPS),
        optimiser=training.adamw(100),  # whose rate does not know the last step of this call
        log_every=1,
        evaluate_every=100,
        evaluation_batches=1,
        checkpoint_every=2,
        devices=training.FullySharded(int(DEVICES)),
        run=Path(FOLDER, "run"),
        resume=bool(RESUME),
        progress=False,
    )
    if fitted.reason == "SIGTERM":
        print(fitted.reason, fitted.step)
        raise SystemExit(143)
    if training.is_first():
        print(json.dumps([row["loss"] for row in fitted.history]))
