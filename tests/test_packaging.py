"""The package as a whole: what importing it loads, who may import whom, and what is installed."""

import ast
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import torchlathe

ROOT = Path(__file__).resolve().parent.parent
FACADE = ROOT / "torchlathe"
PACKAGES = ("ir", "passes", "kernels", "backends", "tools")

# The arrows of the architecture: which of the other packages each may import.
MAY_IMPORT = {
    "ir": set(),
    "kernels": {"ir"},
    "passes": {"ir", "kernels"},
    "backends": {"ir", "kernels"},
    "tools": {"ir", "kernels", "passes", "backends", "_compile", "_plan", ""},
}
HEAVY = ("triton", "networkx", "scipy", "matplotlib", "transformers", "torchvision", "timm")


def run_python(code: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def sources(package: str) -> Iterator[Path]:
    for path in sorted((FACADE / package).rglob("*.py")):
        if "__pycache__" not in path.parts:
            yield path


def imported_names(path: Path) -> Iterator[tuple[int, str]]:
    """Each imported module or name of a file, dotted, wherever in the file it is imported."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, f"{'.' * node.level}{node.module or ''}.{alias.name}"


# --- importing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        pytest.param("", id="import"),
        pytest.param("[getattr(torchlathe, name) for name in torchlathe.__all__]", id="all-names"),
    ],
)
def test_import_is_light(statement: str) -> None:
    loaded = json.loads(
        run_python(
            "import json, sys, torch\n"
            "before = set(sys.modules)\n"
            f"import torchlathe\n{statement}\n"
            "new = sorted({name.partition('.')[0] for name in set(sys.modules) - before})\n"
            "print(json.dumps([new, torch.cuda.is_initialized()]))"
        )
    )
    assert loaded[1] is False
    assert not set(HEAVY) & set(loaded[0])


def test_import_alone_loads_no_part_of_it() -> None:
    code = "import sys, torchlathe; print(*[m for m in sys.modules if m.startswith('torchlathe')])"
    assert set(run_python(code).split()) == {"torchlathe", "torchlathe._version"}


def test_every_public_name_resolves() -> None:
    for name in torchlathe.__all__:
        assert getattr(torchlathe, name) is not None
    assert set(torchlathe.__all__) <= set(dir(torchlathe))
    from torchlathe.ir import capture

    assert torchlathe.capture is capture
    assert callable(torchlathe.capture)
    assert callable(torchlathe.compile)
    assert issubclass(torchlathe.Error, Exception)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'torchlathe' has no attribute 'nothing'"):
        _ = torchlathe.nothing  # type: ignore[attr-defined]


@pytest.mark.skipif(not (ROOT / "ir").is_dir(), reason="not a checkout")
@pytest.mark.parametrize("package", [p for p in PACKAGES if p != "kernels"])
def test_a_package_refuses_its_bare_name(package: str) -> None:
    code = (
        f"try:\n    import {package}\n"
        "except ImportError as error:\n    print(error)\n"
        "else:\n    print('imported')"
    )
    expected = f"import torchlathe.{package}, not {package}"
    assert run_python(code).strip() == expected


@pytest.mark.skipif(not (ROOT / "ir").is_dir(), reason="not a checkout")
def test_the_bare_kernels_are_an_empty_package() -> None:
    """transformers imports any package of this name that it finds, so this one cannot refuse."""
    code = "import kernels, transformers; print(kernels.__version__, kernels.__path__)"
    assert run_python(code).strip() == "0 []"


@pytest.mark.skipif(not (ROOT / "ir").is_dir(), reason="not a checkout")
@pytest.mark.parametrize("package", PACKAGES)
def test_the_facade_links_to_the_folders(package: str) -> None:
    link = FACADE / package
    assert link.is_symlink()
    assert os.readlink(link) == f"../{package}"


def test_walking_finds_every_package() -> None:
    found = {module.name for module in pkgutil.walk_packages(torchlathe.__path__) if module.ispkg}
    assert set(PACKAGES) <= found


def test_every_folder_of_code_is_a_package() -> None:
    for package in PACKAGES:
        folders = {path.parent for path in sources(package)}
        missing = [str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").is_file()]
        assert not missing, "without __init__.py these would not be installed"


# --- structure -----------------------------------------------------------------------------------


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_go_one_way(package: str) -> None:
    allowed = MAY_IMPORT[package] | {package}
    wrong = []
    for path in sources(package):
        for line, name in imported_names(path):
            root, _, rest = name.partition(".")
            if root == "" or (root == "torchlathe" and not _permitted(rest, allowed)):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {name}")
    assert not wrong


def _permitted(rest: str, allowed: set[str]) -> bool:
    first = rest.partition(".")[0]
    if first in {"_version", "__version__"}:
        return True
    return first in allowed or ("" in allowed and first in torchlathe.__all__)


@pytest.mark.parametrize("package", [p for p in PACKAGES if p != "tools"])
def test_only_tools_know_model_libraries(package: str) -> None:
    unwanted = {"transformers", "torchvision", "timm", "torch_pruning", "sklearn"}
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sources(package)
        for line, name in imported_names(path)
        if name.partition(".")[0] in unwanted
    ]
    assert not wrong


def test_passes_never_edit_tensors_behind_the_graph() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources("passes")
        for node in ast.walk(ast.parse(path.read_text(), str(path)))
        if isinstance(node, ast.Attribute) and node.attr == "data"
    ]
    assert not wrong, "an edit through .data is seen by no version counter: replace the tensor"


def test_files_stay_small_and_have_a_name() -> None:
    wrong = []
    for folder in (*(FACADE / p for p in PACKAGES), ROOT / "tests"):
        limit = 700 if folder.name in {"kernels", "tests"} else 500
        for path in folder.rglob("*.py"):
            lines = len(path.read_text().splitlines())
            if lines > limit:
                wrong.append(f"{path.relative_to(ROOT)}: {lines} lines, the limit is {limit}")
            if path.name in {"utils.py", "util.py", "helpers.py", "misc.py"}:
                wrong.append(f"{path.relative_to(ROOT)}: the name says nothing")
    assert not wrong


# --- what is installed ---------------------------------------------------------------------------


def test_version_comes_from_one_place() -> None:
    held = [
        path
        for path in [*FACADE.glob("*.py"), *(p for name in PACKAGES for p in sources(name))]
        if re.search(r"^__version__\s*[:=]", path.read_text(), re.MULTILINE)
    ]
    assert held == [FACADE / "_version.py"]
    assert re.fullmatch(r"\d+\.\d+\.\d+([.a-z]\S*)?", torchlathe.__version__)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" in project["dynamic"]
    try:
        installed = metadata.version("torchlathe")
    except metadata.PackageNotFoundError:
        return
    assert installed == torchlathe.__version__


def test_optional_packages_are_not_needed_to_import() -> None:
    """Every module of the package imports without the extras (their imports are late)."""
    blocked = ["triton", "onnx", "onnxscript", "onnxruntime", "optuna", "ray", "transformers"]
    code = (
        "import importlib, pkgutil, sys\n"
        f"for name in {blocked!r}: sys.modules[name] = None\n"
        "import torchlathe\n"
        "for module in pkgutil.walk_packages(torchlathe.__path__, 'torchlathe.'):\n"
        "    last = module.name.rpartition('.')[2]\n"
        "    if last not in {'triton', '__main__'} and '.bench.' not in module.name:\n"
        "        importlib.import_module(module.name)\n"
    )
    run_python(code)


@pytest.mark.slow
def test_wheel_holds_every_package(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    # From a copy, so that nothing is left in the checkout, with links kept as links.
    subprocess.run(
        ["tar", "--null", "-cf", str(tmp_path / "source.tar"), "--no-recursion", "-T", "-"],
        input=listed.stdout,
        cwd=ROOT,
        check=True,
    )
    subprocess.run(["tar", "-xf", str(tmp_path / "source.tar"), "-C", str(source)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*command, "-w", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("torchlathe-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        path.relative_to(ROOT).as_posix() for package in PACKAGES for path in sources(package)
    }
    expected |= {f"torchlathe/{n}.py" for n in ("__init__", "__main__", "_version")}
    expected |= {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.j2", "*.html")
        for path in (FACADE / "tools").rglob(pattern)
    }
    assert expected | {"torchlathe/py.typed"} <= names
    assert {name.partition("/")[0] for name in names} == {
        "torchlathe",
        f"torchlathe-{torchlathe.__version__}.dist-info",
    }


def test_the_command_starts() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torchlathe", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for word in ("compile", "inspect", "passes"):
        assert word in done.stdout


def test_modules_are_known_by_one_name_only() -> None:
    """No class exists twice, once as torchlathe.ir.x and once as ir.x."""
    for package in PACKAGES:
        importlib.import_module(f"torchlathe.{package}")
    found = {name for name in sys.modules if name.partition(".")[0] in PACKAGES}
    assert found <= {"kernels"}  # which is empty under that name, see above
