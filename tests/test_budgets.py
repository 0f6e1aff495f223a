"""Budgets of the code: sizes, nesting, import time, and which way imports may point."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src"
PACKAGE = SOURCE / "trimtab"
METHODS = PACKAGE / "methods"

# Layers above the core (0). A new file or folder counts as core until it is named here, on purpose.
KINDS, METHODS_LAYER, CONTRACT, CAPABILITY = 1, 2, 3, 4
LAYERS = {
    "kinds": KINDS, "routing": KINDS, "guards": KINDS, "planning": KINDS, "extras": KINDS, "methods": METHODS_LAYER,
    "check": CONTRACT, "contract": CONTRACT,
    **dict.fromkeys(("interop", "training", "cli", "compare", "search", "merging", "decoding", "federated", "privacy",
                     "demo", "tasks", "vision"), CAPABILITY),
}  # fmt: skip
# The catalogue lists the folder of methods; the package binds its name and the public names; neither names a method.
NAMES_ABOVE = {
    PACKAGE / "method.py": {"trimtab.methods"},
    PACKAGE / "__init__.py": {
        "trimtab.methods", "trimtab.check.ContractViolation", "trimtab.check.check_method",
        "trimtab.extras.MissingExtraError", "trimtab.guards", "trimtab.planning.plan", "trimtab.routing.route",
    },
}  # fmt: skip
NOT_COUNTED = {"quantized.py"}
CORE_LINES_ALLOWED = 2500
QUANTIZATION_PACKAGES = {"bitsandbytes", "torchao"}  # optional, and known to quantized.py alone
PICKLE_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
# Proves that models with adapters survive pickling, on bytes that it made itself.
PICKLES = {PACKAGE / "contract" / "life.py"}
COMPOUND = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def layer_of(path: Path) -> int:
    return LAYERS.get(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), 0)


FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
CORE = [path for path in FILES if layer_of(path) == 0]
METHOD_FILES = [path for path in FILES if path.is_relative_to(METHODS)]


def line_count(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, FUNCTION))


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, docstring included, decorators not."""
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def nesting(node: ast.AST, depth: int = 0) -> int:
    """Depth of compound statements in a function; `elif` is no deeper than its `if`, inner functions start anew."""
    deepest = depth
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*FUNCTION, ast.ClassDef, ast.Lambda)):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deepest = max(deepest, nesting(child, depth + (isinstance(child, COMPOUND) and not is_elif)))
    return deepest


def imported(tree: ast.AST) -> set[str]:
    """Dotted names that a file imports anywhere; `from a import b` counts as `a.b`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def is_within(name: str, layer: int) -> bool:
    """Whether a dotted `trimtab.…` name is defined by a module of that layer or a lower one, not by the package."""
    if "." not in name:
        return False
    first = name.split(".")[1]
    exists = (PACKAGE / f"{first}.py").is_file() or (PACKAGE / first).is_dir()
    return exists and LAYERS.get(first, 0) <= layer


def foreign(tree: ast.AST, layer: int, allowed: set[str]) -> set[str]:
    """Imports that are neither the standard library, torch, safetensors, `allowed`, nor of that layer or below."""
    permitted = {*sys.stdlib_module_names, "torch", "safetensors", *allowed}
    return {
        name
        for name in imported(tree)
        if not (is_within(name, layer) if name.split(".")[0] == "trimtab" else name.split(".")[0] in permitted)
    }


def test_there_is_something_to_measure() -> None:
    assert len(CORE) >= 5
    assert PACKAGE / "__init__.py" in CORE
    assert any(path.name == "lora.py" for path in METHOD_FILES)


def test_method_files_have_at_most_120_lines() -> None:
    assert {name_of(path): line_count(path) for path in METHOD_FILES if line_count(path) > 120} == {}


def test_other_files_have_at_most_300_lines() -> None:
    others = set(FILES) - set(METHOD_FILES)
    assert {name_of(path): line_count(path) for path in others if line_count(path) > 300} == {}


def test_the_core_has_at_most_2500_lines() -> None:
    sizes = {name_of(path): line_count(path) for path in CORE if path.name not in NOT_COUNTED}
    assert sum(sizes.values()) <= CORE_LINES_ALLOWED, sizes


def test_functions_have_at_most_40_lines() -> None:
    long = {
        f"{name_of(path)}:{function.lineno} {function.name}": length(function)
        for path, tree in TREES.items()
        for function in functions(tree)
        if length(function) > 40
    }
    assert long == {}


def test_nesting_is_at_most_3() -> None:
    deep = {
        f"{name_of(path)}:{function.lineno} {function.name}": nesting(function)
        for path, tree in TREES.items()
        for function in functions(tree)
        if nesting(function) > 3
    }
    assert deep == {}


def test_the_core_imports_torch_and_safetensors_only_and_never_upwards() -> None:
    wrong = {}
    for path in CORE:
        names = foreign(TREES[path], 0, QUANTIZATION_PACKAGES if path.name == "quantized.py" else set())
        names -= NAMES_ABOVE.get(path, set())
        if names:
            wrong[name_of(path)] = names
    assert wrong == {}


def test_kinds_stand_on_the_core_and_methods_on_both_but_never_on_each_other() -> None:
    kinds = [path for path in FILES if layer_of(path) == KINDS]
    assert len(kinds) >= 5
    wrong = {name_of(path): names for path in (*kinds, *METHOD_FILES) if (names := foreign(TREES[path], KINDS, set()))}
    assert wrong == {}


def test_no_pickle_and_no_torch_load() -> None:
    wrong = {}
    for path, tree in TREES.items():
        modules = set() if path in PICKLES else PICKLE_MODULES
        names = {name for name in imported(tree) if name.split(".")[0] in modules or name == "torch.load"}
        names |= {
            "torch.load"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load"
        }
        if names:
            wrong[name_of(path)] = names
    assert wrong == {}


IMPORT_TIME = """
import sys, time, torch
before = set(sys.modules)
start = time.process_time()
import trimtab
print(time.process_time() - start)
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))
"""


def test_import_adds_at_most_300_ms_to_torch_and_loads_nothing_optional() -> None:
    seconds, loaded = [], set()
    for _ in range(5):
        output = subprocess.run([sys.executable, "-c", IMPORT_TIME], capture_output=True, text=True, check=True).stdout
        duration, modules = output.splitlines()
        seconds.append(float(duration))
        loaded |= set(modules.split())
    assert statistics.median(seconds) <= 0.3, seconds
    assert loaded <= {"trimtab", "safetensors", "torch"}, loaded


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return 1", 0),
        ("if a:\n  pass\n elif b:\n  pass\n elif c:\n  pass", 1),
        ("for a in b:\n  with a:\n   while a:\n    try:\n     pass\n    finally:\n     pass", 4),
        ("if a:\n  def inner():\n   if a:\n    for b in c:\n     pass", 1),
        ("if a:\n  pass\n else:\n  if b:\n   pass\n  c()", 2),
        ("match a:\n  case 1:\n   if b:\n    pass", 2),
    ],
)
def test_the_measure_of_nesting(body: str, expected: int) -> None:
    assert nesting(ast.parse(f"def f():\n {body}").body[0]) == expected


def test_the_measure_of_length_leaves_decorators_out() -> None:
    assert [length(f) for f in functions(ast.parse("@one\n@two\ndef f():\n    '''Doc.'''\n    return 1"))] == [3]


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("import torch.nn.functional as F\nfrom torch import nn\nimport math\nimport safetensors.torch", set()),
        ("from trimtab.method import Method", set()),
        ("from trimtab import errors", set()),
        ("def f():\n    import transformers", {"transformers"}),
        ("from trimtab.methods.weight.lora import LoRA", {"trimtab.methods.weight.lora.LoRA"}),
        ("from trimtab import methods", {"trimtab.methods"}),
        ("from trimtab import LoRA", {"trimtab.LoRA"}),
        ("import trimtab", {"trimtab"}),
        ("import trimtab.cli.main", {"trimtab.cli.main"}),
        ("import torchvision", {"torchvision"}),
        ("from trimtab.kinds.weight import WeightMethod", {"trimtab.kinds.weight.WeightMethod"}),
    ],
)
def test_the_measure_of_imports(statement: str, expected: set[str]) -> None:
    assert foreign(ast.parse(statement), 0, set()) == expected
