"""Passes over the whole pool: shard by shard, by all workers, stored and read back.

In: the encoded pool, and what to measure of some examples. Out: tensors with a row per pool
example.
May import: `gradients` and what is beneath it.
"""

PUBLIC = {
    "coordinates": ("by_target", "coordinates_key", "losses_and_norms", "make_projection_measure"),
    "examples": ("Measure", "MeasureFactory", "check_finite", "measure_examples", "not_finite"),
    "hidden_states": ("make_forward_measure", "make_loss_measure"),
    "pool_pass": ("FactoriesByCheckpoint", "PoolPass"),
    "shards": ("StoredTensor", "save_shard", "shard_size", "window_size"),
}
