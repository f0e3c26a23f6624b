import sys
import types
from pathlib import Path

import pytest

from torchlathe import passes
from torchlathe.ir import SpecError
from torchlathe.passes import (
    Pass,
    all_passes,
    get_pass,
    load_plugin,
    parse_pipeline,
    pass_names,
    registry,
)

pytestmark = pytest.mark.usefixtures("own_registry")

PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar
from torchlathe.passes import Exactness, PassResult, RewritePass, StopAfter

@dataclass(frozen=True)
class {cls}(RewritePass):
    name: ClassVar[str] = "{name}"
    count: int = {count}

    def run(self, program, ctx):
        return PassResult(changed=False)
"""


def write(
    path: Path, cls: str = "Mine", name: str = "mine", count: int = 1, more: str = ""
) -> Path:
    path.write_text(PLUGIN.format(cls=cls, name=name, count=count) + more)
    return path


# --- the table -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", registry.TABLE)
def test_each_row_of_the_table_leads_to_its_pass(name: str) -> None:
    cls = get_pass(name)
    assert issubclass(cls, Pass)
    assert cls.name == name
    assert get_pass(name.replace("-", "_")) is cls
    assert getattr(passes, cls.__name__) is cls
    assert cls.__name__ in passes.__all__
    assert cls.__doc__


def test_every_public_name_resolves() -> None:
    for name in passes.__all__:
        assert getattr(passes, name) is not None
    assert set(passes.__all__) <= set(dir(passes))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = passes.Nothing


def test_names_are_listed_without_importing() -> None:
    assert set(registry.TABLE) <= set(pass_names())
    assert pass_names() == sorted(pass_names())
    assert list(all_passes()) == pass_names()


def test_a_row_must_lead_to_a_pass_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.TABLE, "other", registry.TABLE["structured-erase"])
    with pytest.raises(SpecError, match="is called structured-erase, not other"):
        get_pass("other")
    monkeypatch.setitem(registry.TABLE, "other", "pathlib:Path")
    with pytest.raises(SpecError, match="pathlib:Path is not a pass class"):
        get_pass("other")


# --- plugin files --------------------------------------------------------------------------------


def test_a_plugin_file_gives_the_passes_that_it_defines(tmp_path: Path) -> None:
    path = write(tmp_path / "json.py")  # a name that is taken is no trouble
    (cls,) = load_plugin(path)
    assert get_pass("mine") is cls
    assert "mine" in pass_names()
    assert parse_pipeline("mine{count=3}") == [cls(count=3)]  # type: ignore[call-arg]
    assert registry.plugin_of(cls) == str(path)
    assert "json" in sys.modules
    assert sys.modules["json"].__name__ == "json"


def test_loading_again_does_nothing_until_the_text_changes(tmp_path: Path) -> None:
    path = write(tmp_path / "plugin.py")
    first = load_plugin(path)
    assert load_plugin(str(path)) == first
    write(path, count=2)
    second = load_plugin(path)
    assert second != first
    assert get_pass("mine") is second[0]
    assert parse_pipeline("mine")[0].count == 2  # type: ignore[attr-defined]
    moved = write(tmp_path / "moved.py", count=2)
    assert load_plugin(moved) == second
    assert registry.plugin_of(second[0]) == str(moved)


def test_a_plugin_can_be_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "plugin_by_name.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    (cls,) = load_plugin("plugin_by_name")
    assert cls.__module__ == "plugin_by_name"
    assert load_plugin(sys.modules["plugin_by_name"]) == (cls,)
    assert registry.plugin_of(cls) == "plugin_by_name"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "{path} defines neither a pass nor RULES for axis terms"),
        ("RULES = {'my_op': 1}", "RULES of {path} has 'my_op': 1"),
        (
            "def",
            "the plugin {path} failed to load: SyntaxError: invalid syntax (plugin.py, line 1)",
        ),
        ("\nimport nowhere", "the plugin {path} failed to load: ModuleNotFoundError: No module"),
        (PLUGIN.format(cls="A", name="Bad Name", count=1), "A of {path} has the name 'Bad Name'"),
        (
            PLUGIN.format(cls="A", name="a", count=1).replace("@dataclass(frozen=True)", ""),
            "A of {path} is not a dataclass",
        ),
        (PLUGIN.format(cls="A", name="structured-erase", count=1), "{clash}"),
        (
            PLUGIN.format(cls="A", name="a", count=1) + PLUGIN.format(cls="B", name="a", count=1),
            "{path} defines two passes called a",
        ),
    ],
)
def test_plugins_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plugin.py"
    path.write_text(text)
    clash = (
        f"the pass structured-erase of {path} is defined by "
        f"{registry.TABLE['structured-erase']} as well"
    )
    modules = set(sys.modules)
    with pytest.raises(SpecError) as caught:
        load_plugin(path)
    assert caught.value.message.startswith(message.format(path=path, clash=clash))
    assert "a" not in pass_names()
    if "failed to load" in message:
        assert caught.value.where == f"{path}:{text.count(chr(10)) + 1}"
        assert set(sys.modules) == modules


def test_a_missing_plugin() -> None:
    with pytest.raises(SpecError, match=r"the plugin nowhere\.py cannot be read: No such file"):
        load_plugin("nowhere.py")
    with pytest.raises(SpecError, match="the plugin nowhere failed to load: ModuleNotFoundError"):
        load_plugin("nowhere")


def test_two_plugins_with_one_name_clash(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.py"), write(tmp_path / "b.py", count=2)
    load_plugin(first)
    with pytest.raises(SpecError) as caught:
        load_plugin(second)
    assert caught.value.message == f"the pass mine of {second} is defined by {first} as well"
    assert registry.plugin_of(get_pass("mine")) == str(first)


def test_abstract_passes_of_a_plugin_are_left_out(tmp_path: Path) -> None:
    base = "class Base(RewritePass):\n    pass\n"
    (cls,) = load_plugin(write(tmp_path / "plugin.py", more=base))
    assert cls.__name__ == "Mine"


# --- entry points --------------------------------------------------------------------------------


def install(folder: Path, entries: str, distribution: str = "extra") -> None:
    info = folder / f"{distribution}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[torchlathe.passes]\n{entries}\n")


def test_an_installed_distribution_brings_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "extra_passes.py")
    install(tmp_path, "mine = extra_passes:Mine\nbroken = extra_passes:Nothing")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert {"mine", "broken"} <= set(pass_names())
    assert "extra_passes" not in sys.modules
    (item,) = parse_pipeline("mine{count=2}")
    assert type(item).__module__ == "extra_passes"
    with pytest.raises(SpecError, match="the pass broken cannot be imported from extra_passes"):
        get_pass("broken")
    sys.modules.pop("extra_passes")


def test_entry_points_that_clash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "structured-erase = extra_passes:Mine")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SpecError) as caught:
        get_pass("structured-erase")
    assert caught.value.message == (
        "the pass structured-erase of extra_passes:Mine is defined by "
        f"{registry.TABLE['structured-erase']} as well"
    )


def test_a_plugin_may_not_take_the_name_of_an_installed_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "mine = extra_passes:Mine")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SpecError, match="is defined by extra_passes:Mine as well"):
        load_plugin(write(tmp_path / "plugin.py"))


def test_a_module_without_passes_is_refused() -> None:
    with pytest.raises(SpecError, match="empty defines neither a pass nor RULES"):
        load_plugin(types.ModuleType("empty"))
