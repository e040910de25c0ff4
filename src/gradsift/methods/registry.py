"""All methods by name."""

from gradsift.methods import (
    bm25,
    cosine,
    embed,
    gist,
    influence,
    length,
    less,
    perplexity,
    random,
    rds,
)
from gradsift.methods.base import Method

METHODS: dict[str, Method] = {
    "gist": gist.METHOD,
    "less": less.METHOD,
    "cosine": cosine.METHOD,
    "influence": influence.METHOD,
    "rds": rds.METHOD,
    "embed": embed.METHOD,
    "bm25": bm25.METHOD,
    "perplexity": perplexity.METHOD,
    "length": length.METHOD,
    "random": random.METHOD,
}
