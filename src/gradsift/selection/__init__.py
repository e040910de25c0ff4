"""From scores to picks, why each was picked, and how sure the choice is.

In: a `Job` and the scores of its method. Out: tables of scores, picks, refusals, explanations.
May import: `methods` and what is beneath it.
"""

PUBLIC = {
    "directions": ("leading_directions", "read_spectra"),
    "explanation": ("Explanation", "explain"),
    "export": ("export_entries",),
    "picks": (
        "Selection",
        "candidates",
        "jaccard",
        "kept_targets",
        "list_selections",
        "overlap",
        "read_selection",
        "read_selections",
        "write_selection",
    ),
    "policies": ("Candidates", "check_policy", "describe_policy", "pick", "shorten_policy"),
    "run_result": ("RunResult", "collect_result", "open_run"),
    "score_table": (
        "describe_rows",
        "read_scores",
        "read_scores_in",
        "scores_of",
        "write_scores",
    ),
    "source_shares": ("SourceShare", "source_shares"),
    "stability": (
        "Change",
        "Noise",
        "can_compare_twice_the_rank",
        "changes",
        "compare_with_twice_the_rank",
        "measure_sample",
        "noise_at_cut",
        "sampling_stage",
    ),
    "stages": ("RunStages",),
}
