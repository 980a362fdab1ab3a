# SPDX-License-Identifier: Apache-2.0
"""The rules of CONTRIBUTING.md that a program can check, on the source's syntax trees.

Nothing is imported, so the rules are checked whatever packages a machine has.
"""

import ast
import functools
import re
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]

LAYERS = {
    0: "batch checks config config_moe config_task sampling types",
    1: "ambient auxiliary cache choice context hlo launch ledger mesh nn ops paths pipeline remat rollcall sharding tensorfiles tiles topology",
    2: "agreement checkpoint data deepspeed_json deepspeed_keys deepspeed_rules frozen gguf_files gguf_tokenizers hf loss_scale "
    "losses metrics objectives offload optim precision progress report schedules",
    3: "generate lora peft program state step",
    4: "__init__ __main__ cli cli_text doctor embedding engine loop plan pretrained profile tasks upcycle writing",
}
"""Modules and packages of jaxspeed. Each imports its own layer and lower ones only."""

LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names.split()}

FLAX = {"jaxspeed.nn"}
"""The only module of the library that imports flax (ADR 0003)."""

MODELS_MAY_IMPORT = {
    "jax",
    "jaxtyping",
    "flax",
    "jaxspeed.config",
    "jaxspeed.hf",
    "jaxspeed.nn",
    "jaxspeed.ops",
    "jaxspeed.sharding",
    "jaxspeed.types",
    "models.heads",
    "models.llama",
}

LAZY = {
    "datasketch",
    "pyarrow",
    "safetensors",
    "sklearn",
    "tensorboard",
    "tensorflow_datasets",
    "tokenizers",
    "wandb",
}
"""Imported inside the function that needs them: slow to import, or optional."""

FORBIDDEN = {"cloudpickle", "dill", "marshal", "pickle", "shelve"}
"""A file that is read by these can run code."""

READ_BY_METHOD = {
    "at_rest": {"MoeConfig": {"eval_capacity_factor"}},
    "sizes": {"MeshConfig": {"stage", "data", "fsdp", "expert", "context", "tensor"}},
    "validate": {"RunConfig": {"global_batch_size", "micro_batch_size", "accumulate"}},
}
"""Methods of config.py that read these fields on behalf of whoever calls them."""

CONFIG_FILES = ("config.py", "config_moe.py", "config_task.py")
"""Where the configuration's classes are."""

MAX_FILE_LINES = 800
MAX_FUNCTION_LINES = 80

SOURCES = sorted(
    path
    for folder in ("jaxspeed", "models", "configs", "tests", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
) + [path for path in [ROOT / "train.py"] if path.exists()]

Function = ast.FunctionDef | ast.AsyncFunctionDef


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def name_of(path: Path) -> str:
    """Returns the module's dotted name; a package is named by its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def under(*folders: str) -> list[Path]:
    return [p for p in SOURCES if p.relative_to(ROOT).parts[0] in folders]


def by_path(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=relative)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def imports(path: Path) -> Iterator[tuple[str, ast.stmt]]:
    """Yields each imported module with its statement."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                package = name_of(path).split(".")
                package = package if path.stem == "__init__" else package[:-1]
                package = package[: len(package) - node.level + 1]
                module = ".".join([*package, module]).rstrip(".")
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                yield whole if is_module(whole) else module, node


def belongs(module: str, names: set[str]) -> bool:
    """Whether the module is one of these, or inside one of them."""
    parts = module.split(".")
    return any(".".join(parts[:n]) in names for n in range(1, len(parts) + 1))


def layer_of(module: str) -> int:
    name = (module.split(".") + ["__init__"])[1]
    assert name in LAYER_OF, f"give {module} a layer in {relative(Path(__file__))}"
    return LAYER_OF[name]


@by_path(under("jaxspeed"))
def test_module_has_a_layer(path: Path) -> None:
    name = path.relative_to(ROOT / "jaxspeed").parts[0].removesuffix(".py")
    assert name in LAYER_OF, (
        f"give {relative(path)} a layer in {relative(Path(__file__))}"
    )


@by_path(under("jaxspeed"))
def test_module_imports_its_own_layer_and_lower(path: Path) -> None:
    mine = layer_of(name_of(path))
    higher = {
        module
        for module, _ in imports(path)
        if module.split(".")[0] == "jaxspeed" and layer_of(module) > mine
    }
    assert not higher, f"layer {mine} imports a higher one: {higher}"


@by_path(under("jaxspeed"))
def test_library_does_not_import_models_or_recipes(path: Path) -> None:
    outside = {"models", "configs", "train", "tests", "benchmarks"}
    assert not [m for m, _ in imports(path) if m.split(".")[0] in outside]


@by_path(
    [p for p in under("jaxspeed", "configs", "train.py") if name_of(p) not in FLAX]
)
def test_flax_stays_at_the_model_boundary(path: Path) -> None:
    assert not [m for m, _ in imports(path) if belongs(m, {"flax"})]


@by_path(under("jaxspeed", "models", "configs", "train.py"))
def test_torch_stays_in_tests_and_benchmarks(path: Path) -> None:
    torch = {"torch", "transformers", "tensorflow", "deepspeed"}
    assert not [m for m, _ in imports(path) if belongs(m, torch)]


@by_path(under("jaxspeed"))
def test_optional_packages_are_imported_where_they_are_needed(path: Path) -> None:
    early = {m for m, node in imports(path) if not node.col_offset and belongs(m, LAZY)}
    assert not early, f"import inside the function that needs it: {early}"


@by_path(
    [
        ROOT / "jaxspeed" / f"{name}.py"
        for name in ("batch", "checks", "config", "config_moe", "config_task")
    ]
)
def test_config_needs_only_the_standard_library(path: Path) -> None:
    ours = {"jaxspeed.batch", "jaxspeed.checks"}
    ours |= {"jaxspeed.config_moe", "jaxspeed.config_task"}
    others = {m for m, _ in imports(path)} - ours
    assert {m.split(".")[0] for m in others} <= sys.stdlib_module_names


@by_path(under("models"))
def test_model_family_stands_alone(path: Path) -> None:
    standard = set(sys.stdlib_module_names)
    others = {
        m for m, _ in imports(path) if not belongs(m, MODELS_MAY_IMPORT | standard)
    }
    assert not others, f"a model file may not import {others}"


@by_path(under("configs"))
def test_recipe_names_one_family(path: Path) -> None:
    local = {m for m, _ in imports(path) if m.split(".")[0] in {"jaxspeed", "models"}}
    assert {m for m in local if m.startswith("jaxspeed")} <= {"jaxspeed.config"}
    assert len({m for m in local if m.startswith("models")}) <= 1


@by_path(SOURCES)
def test_source_reads_no_code_from_data(path: Path) -> None:
    assert not [m for m, _ in imports(path) if belongs(m, FORBIDDEN)]
    assert not list(calls(tree_of(path), {"eval", "exec"}))


@by_path(under("jaxspeed", "models", "configs", "train.py"))
def test_source_does_not_print(path: Path) -> None:
    assert not list(calls(tree_of(path), {"print"}))


def calls(tree: ast.AST, names: set[str]) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in names:
                yield node


@by_path(SOURCES)
def test_source_starts_with_licence_and_docstring(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert ast.get_docstring(tree_of(path)), "no module docstring"
    assert text.isascii()


@by_path(SOURCES)
def test_source_is_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, f"{lines} lines"
    functions = [n for n in ast.walk(tree_of(path)) if isinstance(n, Function)]
    long = {f.name: n for f in functions if (n := length(f)) > MAX_FUNCTION_LINES}
    assert not long, f"functions over {MAX_FUNCTION_LINES} lines: {long}"


def length(function: Function) -> int:
    """Returns the lines of a function, without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    first = body[0].lineno if body else function.lineno
    return (function.end_lineno or 0) - first + 1


@by_path(under("jaxspeed", "models", "configs", "train.py"))
def test_public_names_have_docstrings(path: Path) -> None:
    bare = [name for name, node in public(tree_of(path)) if not ast.get_docstring(node)]
    assert not bare, f"no docstring: {bare}"


def public(
    node: ast.Module | ast.ClassDef, prefix: str = ""
) -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Yields public functions, classes and their methods, with dotted names."""
    for child in node.body:
        if isinstance(child, Function | ast.ClassDef) and child.name[0] != "_":
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from public(child, f"{child.name}.")


@functools.cache
def config_classes() -> dict[str, set[str]]:
    """Returns the fields of each configuration class."""
    return {
        node.name: {
            s.target.id
            for s in node.body
            if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)
        }
        for name in CONFIG_FILES
        for node in tree_of(ROOT / "jaxspeed" / name).body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config")
    }


@functools.cache
def section_classes() -> dict[str, str]:
    """Returns the class of each section of a run, by the section's field name."""
    for node in ast.walk(tree_of(ROOT / "jaxspeed" / "config.py")):
        if isinstance(node, ast.ClassDef) and node.name == "RunConfig":
            return {
                s.target.id: s.annotation.id
                for s in node.body
                if isinstance(s, ast.AnnAssign)
                and isinstance(s.target, ast.Name)
                and isinstance(s.annotation, ast.Name)
                and s.annotation.id.endswith("Config")
            }
    raise AssertionError("config.py has no RunConfig")


@functools.cache
def fields_read(path: Path) -> set[tuple[str, str]]:
    """Returns (class, field) of each configuration field that the file reads.

    The last name of an expression tells what it holds: a section (`run.optim.lr`),
    a name annotated with the class (`optim: OptimConfig`) or set from a section
    (`c = run.optim`), or `config` and `run` for the whole.
    """
    tree, classes = tree_of(path), config_classes()
    read = set()
    holds = {name: {kind} for name, kind in section_classes().items()}
    holds |= {"config": {"RunConfig"}, "run": {"RunConfig"}}
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation:
            name = node.arg if isinstance(node, ast.arg) else last_name(node.target)
            written = set(re.findall(r"\w+Config", ast.unparse(node.annotation)))
            if found := written & set(classes):
                holds[name] = (holds.get(name, set()) - {"RunConfig"}) | found
        elif isinstance(node, ast.Assign):
            for name in map(last_name, node.targets):
                if name not in holds and (found := holds.get(last_name(node.value))):
                    holds[name] = found
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            for kind in holds.get(last_name(node.value), set()):
                if node.attr in classes[kind]:
                    read.add((kind, node.attr))
            for kind, fields in READ_BY_METHOD.get(node.attr, {}).items():
                read |= {(kind, field) for field in fields}
    return read


def last_name(node: ast.AST) -> str:
    """Returns the name that an expression ends in, without a leading underscore."""
    if isinstance(node, ast.Name):
        return node.id.lstrip("_")
    return node.attr.lstrip("_") if isinstance(node, ast.Attribute) else ""


@pytest.mark.parametrize("kind", config_classes())
def test_every_config_field_is_read(kind: str) -> None:
    readers = [p for p in under("jaxspeed", "train.py") if p.name not in CONFIG_FILES]
    read = {field for path in readers for k, field in fields_read(path) if k == kind}
    unread = sorted(config_classes()[kind] - read)
    assert not unread, f"nothing outside config.py reads {kind} {unread}"


def test_every_public_module_is_on_the_api_page() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^::: (\S+)", page, re.MULTILINE))
    modules = {
        name_of(p)
        for p in under("jaxspeed")
        if not any(part.startswith("_") for part in name_of(p).split("."))
    }
    assert not listed ^ modules, (
        f"add to, or remove from, docs/api.md: {listed ^ modules}"
    )


def test_every_documentation_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"[\w./-]+\.md\b", text))
    pages = (ROOT / "docs").rglob("*.md")
    other = named ^ {p.relative_to(ROOT / "docs").as_posix() for p in pages}
    assert not other, f"add to, or remove from, the nav of mkdocs.yml: {other}"


def test_pytest_visits_every_folder_of_tests(pytestconfig: pytest.Config) -> None:
    passed_over = pytestconfig.getini("norecursedirs")
    folders = {path.parent for path in under("tests")}
    unseen = sorted(f for f in folders if any(fnmatch(f.name, x) for x in passed_over))
    assert not unseen, f"norecursedirs of pyproject.toml names {unseen}"
