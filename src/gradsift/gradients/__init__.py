"""Per-example gradients of LoRA weights, and everything that is computed from them.

In: a model with its adapter, and encoded examples. Out: Gram matrices, subspaces, bases,
coordinates, products with the Hessian.
May import: `models` and what is beneath it.
"""

PUBLIC = {
    "basis": ("Basis", "fitting_basis"),
    "curvature": ("InverseFisher", "load_curvature", "measure_curvature", "save_curvature"),
    "distinct": ("distinct_examples", "merge_equal", "merge_rows"),
    "gram": ("fitting_gram", "row_bytes"),
    "hessian": (
        "Hessian",
        "check_eigenvectors",
        "entries",
        "leading_eigenpairs",
        "measure_coupling",
        "sines",
    ),
    "lanczos": ("lanczos_bytes",),
    "memory": ("memory_budget", "small_batch"),
    "per_example": ("blocks", "gradient_rows"),
    "projection": ("Projections", "project"),
    "random_projection": ("Projection", "has_kernel", "project_at_random"),
    "sketch": ("fit_sketch", "load_sketch", "quantize", "read_expected_error"),
    "subspace": (
        "Subspace",
        "describe",
        "fit_subspace",
        "load_gram",
        "load_subspace",
        "save_subspace",
    ),
}
