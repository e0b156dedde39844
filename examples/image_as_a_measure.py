"""An image as a measure: its patches are tokens, and attention groups them.

A drawn scene, 96 x 96 pixels of sky, sea and sand with some noise, is cut into patches of 8 x 8,
centred and put on the sphere S^63. Self-attention at a high beta gathers patches that look
alike: the clusters are a segmentation of the scene, with no parameter learned.

Expected: the 144 patches end in three clusters, the three regions of the scene.
"""

from collections import Counter

import jax
import numpy as np

import jaxflow as jf

SIDE, PATCH, BETA = 96, 8, 30.0


def scene(key) -> tuple[np.ndarray, np.ndarray]:
    """The pixels, and the region of each: 0 sky, 1 sea, 2 sand."""
    row, column = np.mgrid[0:SIDE, 0:SIDE]
    region = np.where(row < 48, 0, np.where(row < 72, 1, 2))
    stripes = 0.2 * np.sin(2 * np.pi * row / 4)
    dots = 0.25 * ((row + column) % 2)
    brightness = np.choose(region, [0.9 - 0.002 * row, 0.45 + stripes, 0.5 + dots])
    noise = 0.05 * np.asarray(jax.random.normal(key, (SIDE, SIDE)))
    return brightness + noise, region


def main() -> dict:
    pixels, region = scene(jax.random.key(0))
    mu0 = jf.measure.from_image(pixels, PATCH)
    regions = region.reshape(SIDE // PATCH, PATCH, SIDE // PATCH, PATCH)[:, 0, :, 0].ravel()
    sol = jf.flow(jf.SelfAttention(beta=BETA), mu0, t1=30.0)
    labels = np.asarray(jf.observables.cluster_labels(sol.measures[-1], 0.9))
    print(f"{mu0.n} patches in R^{mu0.d}: {labels.max() + 1} clusters")
    agreement = []
    for number, name in enumerate(("sky", "sea", "sand")):
        cluster, size = Counter(labels[regions == number].tolist()).most_common(1)[0]
        agreement.append(size / (regions == number).sum())
        print(f"{name:>5}: {agreement[-1]:.0%} of its patches in cluster {cluster}")
    return {"labels": labels, "regions": regions, "agreement": agreement}


if __name__ == "__main__":
    main()
