"""Draws the pictures of the gallery: `make gallery`, some ten minutes on two cores.

    docs/gallery/NAME.png         of `jaxflow reproduce` and of examples, small enough to be kept
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

ROOT = Path(__file__).parents[1]
RUNS = Path("runs")
WIDTH = 1000  # pixels
COLOURS = 64
KEPT = ("name", "arxiv", "line", "passed", "rows", "schemes")


def main():
    FOLDER.mkdir(exist_ok=True)
    reproduced = RUNS / "reproduce"
    _run("-m", "jaxflow", "reproduce", "all", "--quick", "--out", str(reproduced))
    records = [json.loads(path.read_text()) for path in sorted(reproduced.glob("*.json"))]
    records = [{key: r[key] for key in KEPT} for r in records if "arxiv" in r]
    REPRODUCED.write_text(json.dumps(records, indent=1) + "\n")
    for record in records:
        _shrink(reproduced / f"{record['name']}.png", record["name"])
    for name, picture in EXAMPLES.items():
        drawn = RUNS / picture
        if not drawn.exists():
            _run(str(ROOT / "examples" / f"{name}.py"))
        _shrink(drawn, name)


def _run(*command: str):
    print("python", *command, flush=True)
    paths = {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    subprocess.run([sys.executable, *command], check=True, env=os.environ | paths)


def _shrink(picture: Path, name: str):
    """At most WIDTH wide, in few colours: figures have not many."""
    with Image.open(picture) as image:
        height = round(image.height * min(1, WIDTH / image.width))
        small = image.convert("RGB").resize(
            (min(WIDTH, image.width), height), Image.Resampling.LANCZOS
        )
        small.quantize(COLOURS).save(FOLDER / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
