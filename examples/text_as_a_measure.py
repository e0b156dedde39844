"""A text as a measure of words: repetitions meet first, then different words share clusters.

    python examples/text_as_a_measure.py [FILE]

A word is a random unit vector in R^32 plus a quarter of its position code, and the words attend to
one another on the sphere at beta = 9. At t = 0 almost every word is alone. Repetitions of a word
start close and collapse first: at t = 2 there must be exactly as many clusters as different words,
one each (166, from 359 words, for the text that comes with Python 3.11). Then different words meet,
by the chance of their random vectors, and the heavy clusters, those of frequent words, draw in the
light ones: some 70 clusters are left at t = 10, and some 15 at t = 20.

runs/text.html plays the flow, with each word under the pointer.
"""

import re
import sys
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import diffrax
import jax
import jax.numpy as jnp

import jaxflow as jf


def main(path: str | None = None) -> dict:
    text = Path(path).read_text() if path else topics["exceptions"]
    text = re.sub(r"[^\w\s]", " ", text).lower()  # no punctuation: it would be the largest cluster
    mu0, words = jf.measure.from_text(
        text, d=32, key=jax.random.key(0), position_scale=0.25, max_tokens=512
    )
    sol = jf.flow(
        jf.SelfAttention(beta=9.0), mu0, t1=20.0, saveat=diffrax.SaveAt(ts=jnp.linspace(0, 20, 81))
    )

    different, clusters, pairs = len(set(words)), [], []
    print(f"{len(words)} words, {different} different")
    for k in (0, 8, 40, 80):
        labels = jf.observables.cluster_labels(sol.measures[k], threshold=0.99).tolist()
        clusters.append(max(labels) + 1)
        # As many as there are clusters and different words: then each cluster is one word.
        pairs.append(len(set(zip(words, labels, strict=True))))
        print(f"t = {sol.ts[k]:4.1f}: {clusters[-1]} clusters, {pairs[-1]} pairs (word, cluster)")

    print("The largest clusters at the end, by their most frequent words:")
    for label, size in Counter(labels).most_common(5):
        inside = Counter(w for w, own in zip(words, labels, strict=True) if own == label)
        print(f"{size:5d} ", ", ".join(f"{word} {times}" for word, times in inside.most_common(8)))

    page = Path("runs/text.html")
    page.parent.mkdir(exist_ok=True)
    jf.viz.sphere(sol, labels=words, threshold=0.99).write_html(page)
    print(f"wrote {page}")
    return {"different": different, "clusters": clusters, "pairs": pairs}


if __name__ == "__main__":
    main(*sys.argv[1:])
