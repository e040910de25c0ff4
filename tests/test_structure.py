"""The house: sizes of files and functions, what folders take from each other, names in one place.

Run as a program it prints the sizes: `python tests/test_structure.py`.
"""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "gradsift"
MEDIAN_FILE, LONGEST_FILE, FUNCTION_P90 = 170, 350, 40
FOLDERS = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
Imported = tuple[str, str, str]
"""Folder, module, and name."""


def trees() -> dict[Path, ast.Module]:
    """Return the syntax of every file."""
    return {path: ast.parse(path.read_text("utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def file_sizes() -> dict[str, int]:
    """Return the lines of every file that holds code."""
    return {
        str(path.relative_to(PACKAGE)): len(path.read_text("utf-8").splitlines())
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    }


def function_sizes() -> dict[str, int]:
    """Return the lines of every function, its docstring among them."""
    return {
        f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.end_lineno
    }


def p90(sizes: dict[str, int]) -> int:
    return sorted(sizes.values())[int(0.9 * len(sizes))]


def imports_across_folders() -> Iterator[tuple[Path, Imported]]:
    """Yield what files take from folders that are not their own."""
    for path, tree in trees().items():
        own = path.relative_to(PACKAGE).parts[0]
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(
                "gradsift."
            ):
                continue
            folder, _, module = str(node.module).removeprefix("gradsift.").partition(".")
            if folder in FOLDERS and folder != own:
                for alias in node.names:  # of a name in a module, or of a whole module
                    yield path, (folder, module or alias.name, alias.name if module else "")


def public() -> dict[str, dict[str, tuple[str, ...]]]:
    """Return what each folder says is public: names by module."""
    found = {}
    for folder in FOLDERS - {"cli"}:  # that has a function alone
        tree = ast.parse((PACKAGE / folder / "__init__.py").read_text("utf-8"))
        [value] = [node.value for node in tree.body if isinstance(node, ast.Assign)]
        found[folder] = ast.literal_eval(value)
    return found


def test_files_and_functions_are_small() -> None:
    files, functions = file_sizes(), function_sizes()
    assert statistics.median(files.values()) < MEDIAN_FILE
    assert {name: size for name, size in files.items() if size > LONGEST_FILE} == {}
    assert p90(functions) <= FUNCTION_P90


def test_no_two_files_share_a_name_but_for_the_same_thing() -> None:
    names = [Path(name).stem for name in file_sizes()]
    # settings, figures, and the verbs of the command line beside what they do
    shared = {"config", "figures", "base", "evaluate", "picks"}
    assert {name for name in names if names.count(name) > 1} == shared


def test_each_folder_says_what_comes_in_and_goes_out() -> None:
    for folder in FOLDERS:
        text = ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text("utf-8")))
        assert text
        assert re.search(r"In: .*Out: .*\nMay import: ", text, re.DOTALL), folder


def test_folders_take_from_each_other_what_is_public() -> None:
    known = public()
    for path, (folder, module, name) in imports_across_folders():
        if folder == "cli":
            assert path.name == "__main__.py"
            continue
        names = known[folder].get(module, ())
        assert name in names or names == ("*",) or (names and not name), (
            path,
            folder,
            module,
            name,
        )


def test_what_is_public_is_there_and_is_used() -> None:
    taken = {imported for _, imported in imports_across_folders()}
    whole = {(folder, module) for folder, module, name in taken if not name}
    api = (PACKAGE / "__init__.py").read_text("utf-8")
    for folder, modules in public().items():
        for module, names in modules.items():
            source = (PACKAGE / folder / f"{module}.py").read_text("utf-8")
            for name in names:
                assert name == "*" or re.search(rf"^(class|def) {name}\b|^{name}\b", source, re.M)
                used = (folder, module, name) in taken or (folder, module) in whole
                assert used or f"gradsift.{folder}.{module} import" in api, (folder, module, name)


def texts(tree: ast.Module) -> set[str]:
    constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return {value for value in constants if isinstance(value, str)}


def test_names_of_the_run_folder_stand_in_its_layout_alone() -> None:
    files = trees()
    layout = files.pop(PACKAGE / "runs" / "layout.py")
    names = {n.lstrip("/") for n in texts(layout) if re.fullmatch(r"/?[\w.]+\.\w{3,}", n)}
    assert {"config.yaml", "report.html", "log.txt", "rejected.jsonl", "spectrum.json"} <= names
    for path, tree in files.items():
        also_of_saved_data_sets = {"dataset_info.json"} if path.name == "sources.py" else set()
        assert not (names & texts(tree)) - also_of_saved_data_sets, path


if __name__ == "__main__":
    for kind, sizes in (("files", file_sizes()), ("functions", function_sizes())):
        longest = sorted(sizes.items(), key=lambda item: -item[1])[:5]
        print(
            f"{len(sizes)} {kind}: median {statistics.median(sizes.values()):.0f} lines, ", end=""
        )
        print(f"p90 {p90(sizes)}, longest: ", ", ".join(f"{n} {size}" for n, size in longest))
