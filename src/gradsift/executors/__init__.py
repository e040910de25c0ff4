"""Where work runs: in this process, in those of `torchrun`, or on a Ray cluster.

In: functions and tasks. Out: what they return, once each is done.
May import: settings, progress and errors alone.
"""

PUBLIC = {
    "base": ("Executor",),
    "choice": ("choose_executor",),
    "environment": ("set_environment",),
    "local": ("Local",),
    "processes": ("decided_by_first", "first_claim", "is_distributed", "is_first"),
    "torchrun": ("launched_processes",),
}
