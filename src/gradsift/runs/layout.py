"""Names of the files in a run folder, each decided here and nowhere else.

All are relative to the folder, `/` between their parts. A stage has the name of what it stores.
"""

from __future__ import annotations

CONFIG = "config.yaml"
REJECTED = "rejected.jsonl"
REJECTED_SUFFIX = f".{REJECTED}"  # of the same, by set
REPORT = "report.html"
LOG = "log.txt"
MANIFESTS = "manifests"
OWNER = ".owner"  # which process works in the folder, for people
LOCK = ".lock"  # by which other processes of this machine are kept out
PARTIAL = ".partial"  # the suffix of files that are still being written
REMOTE_LOCK = ".lock.json"  # by which other machines are kept out of a remote folder
REMOTE_STATES = ".mirror"  # in the copy of such a folder: what is the same on both sides
GIVEN = "given"  # pool and targets that were held in memory
ENCODED = "data"  # pool and targets, encoded
POOL = "pool"
WARMUP = "warmup"
LESS_WARMUP = "less/warmup"
CHECKPOINTS = "checkpoints.json"  # of a warm-up: its adapters' labels and weights
TRAINING_LOG = "log.json"  # of a warm-up
TRACKED = "trainings"  # what trackers such as TensorBoard keep on this machine
GIVEN_ADAPTER, FRESH_ADAPTER = "adapter", "fresh"  # of a warm-up that trains none
OPTIMIZER_STATE = "optimizer.safetensors"  # Adam's moments, in the folder of an adapter
INDEX = "index/pool"  # a sketch of every gradient
SKETCHES = "index/sketches"  # what gradients are multiplied with
INDEX_CONFIG = f"index/{CONFIG}"
BASE_FORWARD, LESS, EMBED = "base", "less", "embed"  # measurements of pool and targets
TARGET_PATH = "target-path"
SELECTED = "selected"
LLAMA_FACTORY_ENTRIES = f"{SELECTED}/dataset_info.json"
AXOLOTL_ENTRIES = f"{SELECTED}/axolotl.yaml"
EVALUATION = "evaluation"
EVALUATION_CONFIG = f"{EVALUATION}/config.yaml"
EVALUATION_REPORT = f"{EVALUATION}/report.md"
TESTS = f"{EVALUATION}/data"  # held-out examples, encoded
FINE_TUNINGS = f"{EVALUATION}/cells"
MEASURED = f"{EVALUATION}/measured"  # with other settings or target examples than the run's
GEOMETRY = "geometry"
GEOMETRY_NUMBERS = f"{GEOMETRY}/geometry.json"


def manifest(stage: str) -> str:
    """Return the manifest of a stage."""
    return f"{MANIFESTS}/{stage}.json"


def target_set(target: str) -> str:
    """Return the name of a target's encoded set."""
    return f"target.{target}"


def test_set(target: str) -> str:
    """Return the name of the encoded set of a target's held-out examples."""
    return f"test.{target}"


def encoded(name: str, folder: str = ENCODED) -> str:
    """Return an encoded set."""
    return f"{folder}/{name}.parquet"


def rejected(name: str, folder: str = ENCODED) -> str:
    """Return the rows of a set that could not be encoded, and why."""
    return f"{folder}/{name}{REJECTED_SUFFIX}"


def epoch(number: int) -> str:
    """Return the adapter that a warm-up had after an epoch."""
    return f"epoch-{number}"


def target_folder(target: str) -> str:
    """Return the folder of a target's subspaces."""
    return f"targets/{target}"


def subspace(target: str, checkpoint: str) -> str:
    """Return a target's subspace at a checkpoint."""
    return f"{target_folder(target)}/{checkpoint}.safetensors"


def spectrum(target: str) -> str:
    """Return the singular values of a target at every checkpoint."""
    return f"{target_folder(target)}/spectrum.json"


def coordinates(target: str) -> str:
    """Return the pool's coordinates in a target's subspace."""
    return f"coordinates/{target}"


def cosine_products(target: str) -> str:
    """Return the pool's inner products with a target's gradients at length 1."""
    return f"cosine/{target}"


def curvatures(target: str) -> str:
    """Return the folder of what makes the inverse Fisher matrix of a target."""
    return f"influence/curvature/{target}"


def curvature(target: str, checkpoint: str) -> str:
    """Return the inner products that make the inverse Fisher matrix at a checkpoint."""
    return f"{curvatures(target)}/{checkpoint}.safetensors"


def influence_products(target: str) -> str:
    """Return the pool's inner products with F⁻¹q of a target's examples."""
    return f"influence/pool/{target}"


def stability(target: str) -> str:
    """Return the stage that measures a sample of the pool in further directions of a target."""
    return f"stability/{target}"


def stability_sample(target: str) -> str:
    """Return what that stage stores."""
    return f"{stability(target)}.safetensors"


def from_index(name: str) -> str:
    """Return where what an index says of the pool is kept, beside what a pass would."""
    return f"index/{name}"


def sketch(checkpoint: str) -> str:
    """Return what gradients at a checkpoint are multiplied with for the index."""
    return f"{SKETCHES}/{checkpoint}.safetensors"


def measured_pool(name: str) -> str:
    """Return what a measurement found of the pool."""
    return f"{name}/pool"


def measured_target(name: str, target: str) -> str:
    """Return what a measurement found of a target: a folder, or a file less its suffix."""
    return f"{name}/targets/{target}"


def target_tensors(name: str, target: str, checkpoint: str = "") -> str:
    """Return the file of what a measurement found of a target, at a checkpoint if it has any."""
    inner = f"/{checkpoint}" if checkpoint else ""
    return f"{measured_target(name, target)}{inner}.safetensors"


def target_warmup(target: str) -> str:
    """Return the adapter that was trained on a target's own examples."""
    return f"{TARGET_PATH}/{target}/warmup"


def losses_after(target: str) -> str:
    """Return the losses of the pool with that adapter."""
    return f"{TARGET_PATH}/{target}/pool"


def scoring(method: str) -> str:
    """Return the stage that scores the pool by a method."""
    return f"scores/{method}"


def scores(method: str) -> str:
    """Return the scores of the whole pool by a method."""
    return f"{scoring(method)}.parquet"


def selection(key: str) -> str:
    """Return the stage of a selection, whose key is `TARGET` or, of a named one, `TARGET.NAME`."""
    return f"{SELECTED}/{key}"


def picks(key: str) -> str:
    """Return the picks of a selection, byte for byte as they came in."""
    return f"{selection(key)}.jsonl"


def messages(key: str) -> str:
    """Return the picks of a selection in the one schema that every trainer reads."""
    return f"{selection(key)}.messages.jsonl"


def reasons(key: str) -> str:
    """Return why each of the picks of a selection was picked, and by which policy."""
    return f"{selection(key)}.parquet"


def refusals(key: str) -> str:
    """Return what was passed over for a selection, and why."""
    return f"{selection(key)}.refused.parquet"


def exhibiting(part: str) -> str:
    """Return the stage that stores what a part of the run has for the report."""
    return f"{part}/exhibits"


def exhibits(part: str) -> str:
    """Return what a part of the run, such as `evaluation`, has for the report."""
    return f"{exhibiting(part)}.json"


def evaluation_table(name: str) -> str:
    """Return a table of the evaluation."""
    return f"{EVALUATION}/{name}.parquet"


def geometry_at(target: str, adapter: str) -> str:
    """Return what was measured of a target's loss at one adapter."""
    return f"{GEOMETRY}/{target}/{adapter.replace(' ', '-')}.json"
