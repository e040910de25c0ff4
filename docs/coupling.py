"""Adam against Newton on one bowl in two positions: figure 5 of Min et al., 2026, arXiv 2602.18584.

    python docs/coupling.py [FIGURE.html]

prints where both end, and draws their paths. On diag(20, 1) a diagonal preconditioner can hold all
of the curvature; turned by 45 degrees, the same bowl has 9.5 beside its diagonal of 10.5.
"""

from __future__ import annotations

import sys

import numpy as np
from plotly.subplots import make_subplots

START, STEPS, RATE = np.array([-2.5, 0.0]), 45, 0.25
BOWLS = {
    "diag(20, 1)": np.diag([20.0, 1.0]),
    "the same, turned by 45°": np.array([[10.5, 9.5], [9.5, 10.5]]),
}


def newton(hessian: np.ndarray) -> np.ndarray:
    """Return the path of x ← x − η H⁻¹ ∇f, η falling linearly to zero; (step, coordinate)."""
    path = [START]
    for step in range(STEPS):
        rate = RATE * (1 - step / STEPS)
        path.append(path[-1] - rate * np.linalg.solve(hessian, hessian @ path[-1]))
    return np.array(path)


def adam(hessian: np.ndarray) -> np.ndarray:
    """Return the path of Adam (β 0.9 and 0.999, ε 1e-8) with the same learning rates."""
    path, first, second = [START], np.zeros(2), np.zeros(2)
    for step in range(STEPS):
        rate, gradient = RATE * (1 - step / STEPS), hessian @ path[-1]
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        mean, square = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        path.append(path[-1] - rate * mean / (np.sqrt(square) + 1e-8))
    return np.array(path)


def main() -> None:
    """Print the ends and, where a file is named, draw the paths."""
    figure = make_subplots(cols=2, subplot_titles=[*BOWLS])
    grid = np.linspace(-3, 3, 121)
    for column, (name, hessian) in enumerate(BOWLS.items(), start=1):
        points = np.stack(np.meshgrid(grid, grid), axis=-1)
        heights = np.einsum("yxi,ij,yxj->yx", points, hessian, points) / 2
        figure.add_contour(
            x=grid, y=grid, z=np.sqrt(heights), showscale=False, colorscale="Greys",
            contours_coloring="lines", row=1, col=column,
        )  # fmt: skip
        diagonal = np.diag(hessian)
        off = 1 - (diagonal**2).sum() / (hessian**2).sum()
        sys.stdout.write(f"{name}: {off:.1%} of ‖H‖² is off the diagonal\n")
        for method, colour in ((newton, "#1f77b4"), (adam, "#d62728")):
            path = method(hessian)
            losses = np.einsum("ti,ij,tj->t", path, hessian, path) / 2
            length = np.linalg.norm(np.diff(path, axis=0), axis=1).sum()
            below = np.flatnonzero(losses < 1e-3 * losses[0])
            told = f"after {below[0]} steps" if len(below) else "never"
            sys.stdout.write(
                f"  {method.__name__:6} ends at ({path[-1][0]:+.4f}, {path[-1][1]:+.4f}), loss "
                f"{losses[-1]:.2e} of {losses[0]:.1f}, path {length:.2f} long; below a thousandth "
                f"of the loss {told}\n"
            )
            figure.add_scatter(
                x=path[:, 0], y=path[:, 1], mode="lines+markers", name=method.__name__,
                marker_size=4, line_color=colour, showlegend=column == 1, row=1, col=column,
            )  # fmt: skip
    figure.update_layout(template="none", width=1000, height=520)
    figure.update_yaxes(scaleanchor="x", col=1)
    figure.update_yaxes(scaleanchor="x2", col=2)
    if len(sys.argv) > 1:
        figure.write_html(sys.argv[1])


if __name__ == "__main__":
    main()
