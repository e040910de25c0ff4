"""Pool and target files: found, read, understood, encoded once, and compared with each other.

In: paths, Hub ids and settings. Out: encoded examples (tokens, masks, raw bytes), rejected rows,
duplicates.
May import: `runs`, `executors`.
"""

PUBLIC = {
    "conversations": ("Message", "as_text", "text_of"),
    "duplicates": ("DedupColumns", "DuplicateFinder", "Refusal", "dedup_columns"),
    "encoded": ("EncodedSet",),
    "encoding": ("Encoded", "Encoder"),
    "given": ("Data", "keep_given", "keep_targets"),
    "groups": ("GroupEncoder",),
    "sets": ("check_first_rows", "count_rows", "data_sets", "encode_sets", "encoding_stages"),
}
