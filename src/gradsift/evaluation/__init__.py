"""Does it work for me? The same fine-tuning on what each method picks, against random picks.

In: a run and held-out examples. Out: tables, verdicts, and exhibits for the report.
May import: `pipeline` and what is beneath it, but no pool pass.
"""

PUBLIC = {
    "config": ("EvaluationConfig",),
    "evaluate": ("evaluate", "run_evaluation"),
    "results": ("Evaluation",),
    "tables": ("cost_table", "datamodeling_table", "dose_table", "method_table"),
}
