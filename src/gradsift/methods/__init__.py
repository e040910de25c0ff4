"""Ways to score a pool against targets, one file each, and what they are given.

In: a `Job`: settings, encoded data, models, executor, run folder. Out: what each leaves in the run
folder, and `Scores` by target.
May import: `scores`, `pool` and what is beneath them.
"""

PUBLIC = {
    "gist": ("COORDINATES", "align", "stored_subspace", "views"),
    "job": ("Inputs", "Job", "open_job"),
    "less": ("adam_direction",),
    "pool_index": (
        "check_index",
        "expected_error",
        "index_stages",
        "measure_index",
        "stages_of_index",
        "take_from_index",
    ),
    "registry": ("METHODS",),
    "work": ("Sizes", "Work"),
}
