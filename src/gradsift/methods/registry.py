"""All methods by name."""

from gradsift.methods import (
    bm25,
    cosine,
    embed,
    fuse,
    gist,
    influence,
    length,
    less,
    perplexity,
    random,
    rds,
    target_path,
)
from gradsift.methods.base import Method

_FUSED: dict[str, Method] = {
    "gist": gist.METHOD,
    "less": less.METHOD,
    "cosine": cosine.METHOD,
    "influence": influence.METHOD,
    "rds": rds.METHOD,
    "embed": embed.METHOD,
    "bm25": bm25.METHOD,
    "target-path": target_path.METHOD,
    "perplexity": perplexity.METHOD,
    "length": length.METHOD,
    "random": random.METHOD,
}
METHODS: dict[str, Method] = {**_FUSED, "fuse": fuse.make_method(_FUSED)}
