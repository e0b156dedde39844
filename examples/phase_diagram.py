"""When do tokens meet? The phase transition in (beta, t) (Geshkovski et al., arXiv 2312.10794).

    dx_i/dt = P_{x_i} ( sum_j softmax_j(beta <x_i, x_j>) x_j ),    32 uniform tokens on S^{d-1}
    p(beta, t) = P( <x_i(t), x_j(t)> >= 0.999 )

goes from 0 to 1. Tokens at right angles to each other all meet at one time, when rho of

    rho' = 2 (1 - rho) ((n-1) rho + 1) / (e^{beta (1 - rho)} + n - 1),    rho(0) = 0    (section 6)

is 0.999: t = 5.2703, 5.8976 and 9.5443 for beta = 1, 3 and 5. In high dimension uniform tokens are
nearly at right angles, and the time at which p = 1/2 must come near: with d = 1024 to 0.1, the step
of the times, and e^{beta^2 / (2 d)} - 1 of the time, 1.2 % for beta = 5. In d = 8, some tokens
start near each other and hold the others up: p = 1/2 comes 3 to 5 units of time later for beta = 5.
"""

import importlib.util
from pathlib import Path

import jax
import numpy as np

import jaxflow as jf

BETAS = [1.0, 3.0, 5.0]


def main() -> dict:
    boundaries = {}
    print("  d   " + "".join(f"  beta = {beta:g}" for beta in BETAS))
    for d in (8, 128, 1024):
        diagram = jf.phase_diagram(
            BETAS, np.linspace(0, 20, 201), n=32, d=d, systems=32, key=jax.random.key(0)
        )
        boundaries[d] = diagram.boundary()
        print(f"{d:5d} " + "".join(f"{t:10.4f}" for t in boundaries[d]))
    print("curve " + "".join(f"{t:10.4f}" for t in diagram.curve))

    if importlib.util.find_spec("matplotlib"):
        betas = np.linspace(0.2, 8.0, 14)
        few = jf.phase_diagram(
            betas, np.linspace(0, 20, 101), n=32, d=128, systems=8, key=jax.random.key(1)
        )
        picture = Path("runs/phase.png")
        picture.parent.mkdir(exist_ok=True)
        figure = jf.viz.phase_diagram(few).get_figure(root=True)
        assert figure is not None
        figure.savefig(picture, dpi=120)
        print(f"wrote {picture}")
    return {"boundaries": boundaries, "curve": diagram.curve}


if __name__ == "__main__":
    main()
