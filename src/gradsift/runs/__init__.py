"""The run folder: stages that are done once, atomic files, copies on other file systems.

In: stages with all that they depend on. Out: whether each is still to do, and a manifest when it is
done.
May import: settings and errors alone.
"""

PUBLIC = {
    "atomic": ("room_for", "write_atomically"),
    "folder": ("Run",),
    "hashing": ("HASH_THREADS", "hash_tensors"),
    "indexes": ("AskedIndex", "ask_index", "index_settings", "read_index_config", "take_over"),
    "layout": ("*",),
    "manifests": ("Manifests",),
    "opening": ("local_folder", "locked_run", "read_config"),
    "provenance": ("package_versions", "peak_memory"),
    "remote": ("cache_folder",),
    "stage": ("Stage",),
}
