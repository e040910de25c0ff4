"""The embedded default: made-up skills, a small model trained on all of them, the real pipeline.

In: a folder. Out: a run in it, and a table that says whether the picks helped.
May import: everything but `cli`.
"""

PUBLIC = {
    "run_demo": ("run_demo",),
}
