"""What users install: the wheel, its metadata, the stub for editors, and the entry of the command line."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import trimtab as tt

ROOT = Path(__file__).resolve().parents[1]
METHODS = ROOT / "src" / "trimtab" / "methods"
METHOD_FILE = """
from dataclasses import dataclass

@dataclass(frozen=True)
class {name}:
    rank: int = 8
"""


def load_build_hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hatch_build = load_build_hook()


def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A source tree with one method, as small as the stub generator accepts."""
    folder = tmp_path / "trimtab" / "methods" / "weight"
    folder.mkdir(parents=True)
    (folder / "lora.py").write_text(METHOD_FILE.format(name="LoRA"))
    (tmp_path / "trimtab" / "__init__.py").write_text(
        "from trimtab.core import attach, _private\n"
        "__version__: str = '1'\n"
        "__all__ = ['__version__', 'attach', 'double']\n"
        "def double(x: int = 2) -> int:\n    return 2 * x\n"
        "def __getattr__(name: str) -> object:\n    return name\n"
    )
    return tmp_path


def test_stub_states_names_signatures_and_methods(package: Path) -> None:
    assert hatch_build.stub_text(package).splitlines() == [
        '"""Generated from the source at build time: do not edit."""',
        "",
        "from trimtab.core import attach as attach, _private",
        "__version__: str",
        "def double(x: int=2) -> int:",
        "    ...",
        "from trimtab.methods.weight.lora import LoRA as LoRA",
        "",
        "__all__ = ['LoRA', '__version__', 'attach', 'double']",
    ]


def test_stub_grows_with_a_file(package: Path) -> None:
    folder = package / "trimtab" / "methods" / "weight"
    (folder / "dora.py").write_text(METHOD_FILE.format(name="DoRA"))
    (folder / "_schedule.py").write_text("x = 1")
    assert "from trimtab.methods.weight.dora import DoRA as DoRA" in hatch_build.stub_text(package)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (METHOD_FILE.format(name="A") + METHOD_FILE.format(name="B"), r"exactly one public .* found \['A', 'B'\]"),
        (METHOD_FILE.format(name="_Hidden"), "exactly one public frozen dataclass, found none"),
        (METHOD_FILE.format(name="LoRA"), "define 'LoRA': trimtab.methods.weight.lora and trimtab.methods.weight.new"),
        (METHOD_FILE.format(name="attach"), "'attach' is both a name in trimtab/__init__.py and a method"),
    ],
)
def test_stub_refuses_method_files_of_another_form(package: Path, text: str, message: str) -> None:
    (package / "trimtab" / "methods" / "weight" / "new.py").write_text(text)
    with pytest.raises(hatch_build.StubError, match=message):
        hatch_build.stub_text(package)


def test_stub_and_runtime_agree_on_every_name() -> None:
    stated = set(public_names_of_stub())
    builtin = {name for name, method in tt.methods().items() if method.__module__.startswith("trimtab.methods.")}
    assert builtin <= stated
    assert builtin == set(hatch_build.method_classes(METHODS))
    for name in stated:
        assert getattr(tt, name) is not None


def public_names_of_stub() -> list[str]:
    stub: dict[str, Any] = {}
    exec(hatch_build.stub_text(ROOT / "src").splitlines()[-1], stub)
    return list(stub["__all__"])


def test_loading_methods_does_not_replace_public_functions() -> None:
    script = "import trimtab as tt; tt.methods(); tt.LoRA; tt.methods(); from trimtab import methods; methods()"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_an_unknown_name_is_an_attribute_error_with_the_nearest_name() -> None:
    with pytest.raises(AttributeError, match="LoRA"):
        tt.LoRa  # noqa: B018


def test_wheel_carries_stub_marker_and_every_module(wheel: Path) -> None:
    files = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*.py")}
    packaged = {name for name in files if not name.startswith("trimtab-")}
    assert packaged - modules == {"trimtab/__init__.pyi", "trimtab/py.typed", "trimtab/demo/support_messages.csv"} | {
        path.relative_to(ROOT / "src").as_posix() for path in METHODS.rglob("*.md")
    }
    assert modules <= packaged


def test_wheel_needs_torch_and_safetensors_only(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = archive.read(name).decode().splitlines()
    requirements = [Requirement(line.split(": ", 1)[1]) for line in lines if line.startswith("Requires-Dist: ")]
    assert {r.name for r in requirements if r.marker is None} == {"torch", "safetensors"}


def test_every_direct_dependency_is_pinned_within_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}
    assert pins[0].name == "torch"
    table = project()
    texts = [*table["dependencies"], *(text for texts in table["optional-dependencies"].values() for text in texts)]
    wanted = [requirement for text in texts if (requirement := Requirement(text)).name != "trimtab"]
    assert len(wanted) > 10
    for requirement in wanted:
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


def test_extras_name_each_other_rightly() -> None:
    extras = project()["optional-dependencies"]
    named = {e for texts in extras.values() for text in texts for e in Requirement(text).extras if "trimtab" in text}
    assert named <= extras.keys()
    assert set(Requirement(extras["all"][0]).extras) == extras.keys() - {"all", "dev"}


@pytest.mark.parametrize("absent", ["typer", "rich"])
def test_command_line_without_its_extra_says_how_to_install_it(absent: str) -> None:
    script = f"import sys; sys.modules[{absent!r}] = None; from trimtab.cli.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.rstrip() == (
        f"trimtab: this needs the package {absent!r}, which is not installed; "
        "install it with: pip install 'trimtab[cli]'"
    )


USER_SCRIPT = """
import trimtab as tt

method: tt.LoRA = tt.LoRA(rank=8)
tt.LoRA(rnak=8)
tt.LoRA(rank="eight")
tt.NoSuchMethod()
names = sorted(tt.methods())
reveal_type(names)
"""


@pytest.mark.slow
def test_a_type_checker_knows_methods_and_their_settings(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    (tmp_path / "script.py").write_text(USER_SCRIPT)
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nmypy_path = {site}\nfollow_imports = silent\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--hide-error-context", "--no-pretty", "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    reports = [line for line in done.stdout.splitlines() if line.startswith("script.py:")]
    expected = [
        'script.py:5: error: Unexpected keyword argument "rnak" for "LoRA"',
        'script.py:6: error: Argument "rank" to "LoRA" has incompatible type "str"; expected "int"',
        'script.py:7: error: Module has no attribute "NoSuchMethod"',
        'script.py:9: note: Revealed type is "list[str]"',
    ]
    assert len(reports) == len(expected), done.stdout + done.stderr
    for report, start in zip(reports, expected, strict=True):
        assert report.replace("builtins.", "").startswith(start)
