"""README and docs: links lead somewhere, commands and settings exist, numbers are measured ones."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest
import typer

import evidence_page
import gradsift
from gradsift.cli.app import app
from gradsift.config import Config
from gradsift.evaluation.config import EvaluationConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HOME = Path(__file__).parents[1]
PAGES = sorted([*HOME.glob("*.md"), *HOME.glob("docs/*.md"), *HOME.glob("examples/**/*.md")])
_CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)")
_PATH = re.compile(r"`((?:tests|benchmarks|examples|docs)/[\w/.-]+)`")
_COMMAND = re.compile(r"(?:^|`|-m )gradsift ([a-z]+)\b((?:\\\n|[^`\n])*)", re.MULTILINE)
_SECTIONS = {**Config.model_fields, **EvaluationConfig.model_fields}
_SETTING = re.compile(rf"(?:--set '?|`)((?:{'|'.join(_SECTIONS)})\.[a-z_]+)")


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def problems(page: Path, text: str) -> list[str]:
    """Return the links of a text on a page that lead nowhere, and its paths that do not exist."""
    found = [f"{path} is not there" for path in _PATH.findall(text) if not (HOME / path).exists()]
    for target, anchor in _LINK.findall(_CODE.sub("", text)):
        file = (page.parent / target).resolve() if target else page
        if not file.exists():
            found.append(f"{target} is not there")
        elif anchor and anchor not in anchors(file):
            found.append(f"{target} has no heading #{anchor}")
    return found


def table(text: str, first: str) -> list[list[str]]:
    """Return the cells of the table whose header begins with `first`, row by row, header first."""
    head, _, *rows = text[text.index(f"| {first} |") :].partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in (head, *rows)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    assert problems(page, page.read_text("utf-8")) == []


def test_dead_links_are_found() -> None:
    page = HOME / "README.md"
    dead = "[a](docs/none.md) [b](docs/faq.md#none) `tests/none.py` `[c](d.md)` [e](LICENSE)"
    assert problems(page, dead) == [
        "tests/none.py is not there",
        "docs/none.md is not there",
        "docs/faq.md has no heading #none",
    ]


def unknown(text: str) -> list[str]:
    """Return the verbs, flags and settings of a text that do not exist."""
    verbs, found = typer.main.get_command(app).commands, []  # type: ignore[attr-defined]
    for code in _CODE.findall(text):
        for verb, rest in _COMMAND.findall(code):
            if verb not in verbs:
                found.append(verb)
                continue
            known = {flag for option in verbs[verb].params for flag in option.opts}
            flags = re.findall(r"(?<!\S)--[a-z-]+", re.sub(r"#.*", "", rest))
            found += [f"{verb} {flag}" for flag in flags if flag not in known]
    for setting in _SETTING.findall(text):
        section, _, key = setting.partition(".")
        fields = getattr(_SECTIONS[section].annotation, "model_fields", {})
        if key not in fields and key not in ("md", "parquet", "py"):  # names of files
            found.append(setting)
    return found


def test_every_page_has_its_place_on_the_site() -> None:
    places = re.findall(r'= "([\w-]+\.md)"', (HOME / "zensical.toml").read_text("utf-8"))
    assert sorted(places) == sorted(page.name for page in HOME.glob("docs/*.md"))


def test_every_place_names_the_same_version() -> None:
    places = {
        "CITATION.cff": r"^version: (\S+)$", "README.md": r"version = +\{(\S+)\}",
        "CHANGELOG.md": r"^## (\S+)", "zensical.toml": r'site_dir = "site/(\S+)"',
    }  # fmt: skip
    for file, pattern in places.items():
        found = re.search(pattern, (HOME / file).read_text("utf-8"), re.MULTILINE)
        assert found, file
        assert found[1] == gradsift.__version__, file


def test_command_line_page_is_made_from_the_code() -> None:
    made = runpy.run_path(str(HOME / "docs/command_line.py"))
    assert made["PAGE"].read_text("utf-8") == made["render"](), "run python docs/command_line.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_flags_and_settings_exist(page: Path) -> None:
    assert unknown(page.read_text("utf-8")) == []


def test_wrong_commands_flags_and_settings_are_found() -> None:
    text = """```
gradsift select --model m \\
  --none x   # --comment
gradsift nothing
```
`--set lora.none=3`, `--set lora.rank=3`, `policy.no`"""
    assert unknown(text) == ["select --none", "nothing", "lora.none", "policy.no"]


def test_requirements_are_those_computed() -> None:
    computed = runpy.run_path(str(HOME / "benchmarks" / "requirements.py"))
    page = (HOME / "docs" / "requirements.md").read_text("utf-8")
    assert computed["hours_table"]() in page
    assert computed["memory_table"]() in page
    assert computed["summary_table"]() in (HOME / "README.md").read_text("utf-8")


def test_results_in_the_readme_are_those_measured() -> None:
    readme = (HOME / "README.md").read_text("utf-8")
    results = (HOME / "docs" / "results.md").read_text("utf-8")
    columns, *rows = table(results, "method")
    measured = {  # without the interval: "**-0.0638 [-0.0740, -0.0536]**" is "**-0.0638**"
        (target, row[0]): re.sub(r" \[.*\]", "", cell)
        for row in rows
        for target, cell in zip(columns[1:], row[1:], strict=True)
    }
    methods, *rows = table(readme, "target")
    assert len(rows) == 4
    for target, *cells in rows:
        for method, cell in zip(methods[1:], cells, strict=True):
            assert cell == measured[target, method]


def test_results_on_the_page_are_those_kept_beside_it() -> None:
    page = (HOME / "docs" / "results.md").read_text("utf-8")
    kept = {name: pd.read_parquet(HOME / "docs" / "evidence" / f"{name}.parquet")
            for name in ("table", "trainings", "lds", "doses")}  # fmt: skip
    assert evidence_page.effects(kept["table"]) in page
    assert evidence_page.references(kept["table"]) in page
    assert evidence_page.against_gist(kept["trainings"]) in page
    assert evidence_page.datamodeling(kept["lds"]) in page
    assert evidence_page.responses(kept["doses"]) in page


def tiny(layers: int) -> tuple[Any, PreTrainedModel]:
    """Return a small Llama, and its shape as `benchmarks/requirements.py` describes it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = runpy.run_path(str(HOME / "benchmarks" / "requirements.py"))["Shape"]
    config = AutoConfig.for_model(
        "llama", hidden_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=96, vocab_size=50,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config, dtype="bfloat16")
    return shape("tiny", 64, layers, kv=32, mlp=96, vocabulary=50), base


def test_the_bytes_of_weights_and_lora_are_those_of_the_model() -> None:
    from gradsift.config import LoraConfig
    from gradsift.gradients.per_example import blocks
    from gradsift.models.lora import attach_lora

    shape, base = tiny(layers=2)
    norms = sum(p.numel() for name, p in base.named_parameters() if "norm" in name)
    assert shape.weight_bytes == 2 * (base.num_parameters() - norms)
    found = blocks(attach_lora(base, LoraConfig(), seed=0)).values()
    assert sorted(out * width for out, width in found) == sorted(shape.blocks)


def kept_bytes(layers: int, num_tokens: int) -> int:
    """Return what a forward pass that measures gradients keeps for its way back, LoRA's h aside."""
    import torch

    from gradsift.config import LoraConfig
    from gradsift.models.lora import attach_lora, lora_pairs

    model = attach_lora(tiny(layers)[1], LoraConfig(rank=1), seed=0).requires_grad_(False).eval()
    model.to(torch.bfloat16)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    def hook(_: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        keep(inputs[0].detach())
        return output if output.requires_grad else output.detach().requires_grad_()

    for pair in lora_pairs(model).values():
        pair.a.register_forward_hook(hook)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model.model.model(torch.zeros(1, num_tokens, dtype=torch.long), use_cache=False)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for pointer, size in storages.items() if pointer not in weights)


def test_the_bytes_of_activations_are_those_that_autograd_keeps() -> None:
    per_layer = (kept_bytes(4, num_tokens=128) - kept_bytes(2, num_tokens=128)) / 2 / 128
    assert per_layer == pytest.approx(tiny(1)[0].activation_bytes, rel=0.05)
