"""Draws the pictures of the gallery: `make gallery`, some ten minutes on two cores.

    docs/gallery/NAME.png         of `jaxflow reproduce`, small enough to be kept
    docs/gallery/examples/...     of examples
    docs/gallery/reproduce.json   what `jaxflow reproduce` measured, and what theory expects

`reproduce` goes on where it was cut off, in runs/reproduce; an example whose picture is in runs/ is
not run again.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from gallery import EXAMPLES, FOLDER, REPRODUCED
from PIL import Image

from jaxflow.reproduce import RESULTS

ROOT = Path(__file__).parents[1]
RUNS = Path("runs")
WIDTH = 1000  # pixels
COLOURS = 64
KEPT = ("name", "arxiv", "line", "passed", "rows", "schemes")


def main():
    reproduced = RUNS / "reproduce"
    _run("-m", "jaxflow", "reproduce", "all", "--quick", "--out", str(reproduced))
    keep_reproduced(reproduced)
    for name, picture in EXAMPLES.items():
        drawn = RUNS / picture
        if not drawn.exists():
            _run(str(ROOT / "examples" / f"{name}.py"))
        _shrink(drawn, FOLDER / "examples" / f"{name}.png")


def keep_reproduced(runs: Path):
    """The records and pictures of a folder of `jaxflow reproduce`, in the order of its list."""
    records = [json.loads((runs / f"{name}.json").read_text()) for name in RESULTS]
    kept = [{key: record[key] for key in KEPT} for record in records]
    for name in RESULTS:
        _shrink(runs / f"{name}.png", FOLDER / f"{name}.png")
    REPRODUCED.write_text(json.dumps(kept, indent=1) + "\n")


def _run(*command: str):
    print("python", *command, flush=True)
    paths = {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    subprocess.run([sys.executable, *command], check=True, env=os.environ | paths)


def _shrink(picture: Path, to: Path):
    """At most WIDTH wide, in few colours: figures have not many."""
    with Image.open(picture) as image:
        height = round(image.height * min(1, WIDTH / image.width))
        small = image.convert("RGB").resize(
            (min(WIDTH, image.width), height), Image.Resampling.LANCZOS
        )
        to.parent.mkdir(parents=True, exist_ok=True)
        small.quantize(COLOURS).save(to, optimize=True)


if __name__ == "__main__":
    main()
