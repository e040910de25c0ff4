"""Ways to score a pool against targets, one file each, and what they are given.

In: a `Job`: settings, encoded data, models, executor, run folder. Out: what each leaves in the run
folder, and `Scores` by target.
May import: `scores`, `pool` and what is beneath them.
"""

PUBLIC = {
    "gist": ("align", "stored_subspace", "views"),
    "job": ("Inputs", "Job", "open_job"),
    "less": ("adam_direction",),
    "registry": ("METHODS",),
    "work": ("Sizes", "Work"),
}
