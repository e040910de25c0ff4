"""The paper's claims, measured on the user's own model and targets.

In: a run with an adapter. Out: spectrum, curvature and coupling, and exhibits for the report.
May import: `pipeline` and what is beneath it, but no pool pass.
"""

PUBLIC = {
    "config": ("GeometryConfig",),
    "measure": ("measure_geometry",),
}
