"""Passes over the whole pool: shard by shard, by all workers, stored and read back.

In: the encoded pool, and what to measure of some examples. Out: tensors with a row per pool
example.
May import: `gradients` and what is beneath it.
"""

PUBLIC = {
    "coordinates": (
        "Directions",
        "StoredCoordinates",
        "by_target",
        "losses_and_norms",
        "make_projection_measure",
        "read_coordinates",
        "to_store",
    ),
    "examples": ("Measure", "MeasureFactory", "check_finite", "measure_examples", "not_finite"),
    "hidden_states": ("make_forward_measure", "make_loss_measure"),
    "pool_pass": ("FactoriesByCheckpoint", "PoolPass", "run_together", "store_together"),
    "shards": ("Shard", "StoredTensor", "save_shard", "shard_size", "window_size"),
    "sketches": ("StoredSketches", "make_sketch_measure", "sketch_combinations"),
}
