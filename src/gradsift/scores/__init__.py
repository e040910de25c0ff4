"""How well each pool example suits a target; higher is better.

In: stored rows of pool and target examples. Out: scores, the target example that won, rankings for
a policy.
May import: nothing but settings and errors.
"""

PUBLIC = {
    "alignment": ("Alignment",),
    "ranking": ("Ranking", "Scores", "refuse_turns"),
    "similarity": ("Cosines", "Directions", "PerNorm", "RowStore", "Rows", "Table", "View"),
}
