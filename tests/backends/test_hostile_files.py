"""Files that are damaged, changed or made to do harm: each gives an ArtifactError, none runs."""

import json
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.backends.small_models import Perceptron, dynamic_perceptron, erase_by_hand
from torchlathe.backends import CompiledModel, Eager, load, manifest
from torchlathe.backends.container import Member, read_container, write_container
from torchlathe.backends.encoding import decode, encode, resolve_op
from torchlathe.backends.structure import decode_structure
from torchlathe.ir import ArtifactError

NAMES = ("weights.safetensors", "graph.json", "report.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "model.tl"
    program = erase_by_hand(dynamic_perceptron(Perceptron().eval()))
    CompiledModel(program, report={"value": 1}).save(path)
    return path


def rewritten(whole: Path, path: Path, **changed: Callable[[bytes], bytes]) -> Path:
    """A file with other members whose hashes are all as they should be."""
    with read_container(whole, frozenset(NAMES)) as container:
        contents = {name: container.read(name) for name in NAMES}
        about = dict(container.manifest)
    for name, change in changed.items():
        key = next(n for n in NAMES if n.startswith(name))
        contents[key] = change(contents[key])
    members = [Member(name, len(content), [content]) for name, content in contents.items()]
    write_container(path, about, members)
    return path


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def apply(content: bytes) -> bytes:
        data = json.loads(content)
        change(data)
        return json.dumps(data).encode()

    return apply


# -- damage ---------------------------------------------------------------------------------------


def refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ArtifactError):
        load(path)


@settings(max_examples=150)
@given(data=st.data())
def test_a_changed_byte_is_found_wherever_it_is(whole: Path, data: st.DataObject) -> None:
    content = bytearray(whole.read_bytes())
    where = data.draw(st.integers(0, len(content) - 1))
    content[where] ^= data.draw(st.integers(1, 255))
    refused(whole.with_name("flipped.tl"), bytes(content))


def test_a_changed_byte_of_the_structure_is_found(whole: Path) -> None:
    """Every byte that is not the content of a member, which hashes cover anyway."""
    content = whole.read_bytes()
    with read_container(whole, frozenset(NAMES)) as container:
        inside = {
            i for start, size, _ in container.members.values() for i in range(start, start + size)
        }
    for where in set(range(len(content))) - inside:
        changed = bytearray(content)
        changed[where] ^= 1
        path = whole.with_name("structure.tl")
        path.write_bytes(bytes(changed))
        with pytest.raises(ArtifactError):
            manifest(path)


@settings(max_examples=100)
@given(data=st.data())
def test_a_truncated_file_is_found(whole: Path, data: st.DataObject) -> None:
    content = whole.read_bytes()
    refused(whole.with_name("short.tl"), content[: data.draw(st.integers(0, len(content) - 1))])


@settings(max_examples=50)
@given(data=st.data())
def test_inserted_and_removed_bytes_are_found(whole: Path, data: st.DataObject) -> None:
    content = whole.read_bytes()
    start = data.draw(st.integers(0, len(content)))
    stop = data.draw(st.integers(start, min(start + 100, len(content))))
    middle = data.draw(st.binary(max_size=50))
    if content[start:stop] != middle:
        refused(whole.with_name("spliced.tl"), content[:start] + middle + content[stop:])


@settings(max_examples=50)
@given(content=st.binary(max_size=300))
def test_any_other_file_is_refused(whole: Path, content: bytes) -> None:
    refused(whole.with_name("other.tl"), content)
    refused(whole.with_name("other.tl"), b"PK\x03\x04" + content)


def test_errors_say_what_is_wrong(whole: Path, tmp_path: Path) -> None:
    content = whole.read_bytes()
    for name, data, text in (
        ("empty", b"", "the file is empty"),
        ("text", b"hello", "not a saved torchlathe model"),
        ("short", content[:-9], "truncated"),
        ("long", content + b"x", "truncated, or is not"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ArtifactError, match=text) as caught:
            load(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert caught.value.hint
    with pytest.raises(ArtifactError, match="No such file"):
        load(tmp_path / "none")
    with pytest.raises(ArtifactError, match="Is a directory"):
        load(tmp_path)
    torch.save({"a": torch.ones(3)}, tmp_path / "model.pt")
    with pytest.raises(ArtifactError, match="not a saved torchlathe model"):
        load(tmp_path / "model.pt")
    where = content.index(b"fc1.weight")
    (tmp_path / "t").write_bytes(content[:where] + b"fc9" + content[where + 3 :])
    with pytest.raises(ArtifactError, match=r"weights.safetensors was changed or damaged"):
        load(tmp_path / "t")


# -- the archive ----------------------------------------------------------------------------------


def archive(path: Path, seal: bool = True, **how: Any) -> zipfile.ZipFile:
    made = zipfile.ZipFile(path, "w", **how)
    made.comment = b"torchlathe sha256:" + b"0" * 64 if seal else b""
    return made


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        pytest.param({"../evil.py": b"x"}, "'../evil.py' does not belong there", id="traversal"),
        pytest.param({"/etc/cron": b"x"}, "'/etc/cron' does not belong there", id="absolute"),
        pytest.param({"graph.json": None}, "graph.json is missing", id="missing"),
    ],
)
def test_members_are_exactly_those(whole: Path, tmp_path: Path, extra: dict, text: str) -> None:
    with zipfile.ZipFile(whole) as source, archive(tmp_path / "m.tl") as target:
        contents: dict[str, Any] = {n: source.read(n) for n in source.namelist()} | extra
        for name, content in contents.items():
            if content is not None:
                target.writestr(name, content)
    with pytest.raises(ArtifactError, match=text):
        load(tmp_path / "m.tl")
    assert not (tmp_path.parent / "evil.py").exists()


def test_a_zip_bomb_is_refused(tmp_path: Path) -> None:
    with archive(tmp_path / "m.tl", compression=zipfile.ZIP_DEFLATED) as target:
        for name in (*NAMES, "manifest.json"):
            target.writestr(name, b"0" * 10_000_000)
    with pytest.raises(ArtifactError, match="compressed"):
        load(tmp_path / "m.tl")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_twice_is_refused(tmp_path: Path) -> None:
    with archive(tmp_path / "m.tl") as target:
        for name in (*NAMES, "manifest.json", "graph.json"):
            target.writestr(name, b"{}")
    with pytest.raises(ArtifactError, match="there twice"):
        load(tmp_path / "m.tl")


def test_an_archive_without_a_seal_is_refused(tmp_path: Path) -> None:
    with archive(tmp_path / "m.tl", seal=False) as target:
        target.writestr("manifest.json", b"{}")
    with pytest.raises(ArtifactError, match="truncated, or is not a saved"):
        load(tmp_path / "m.tl")


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("format_version", 2, "format version 2, this torchlathe reads 1"),
        ("format_version", None, "format version None"),
        ("format", "other", "does not describe"),
        ("members", [], "lists no members"),
        ("members", {}, "another size"),
    ],
)
def test_another_version_is_named(
    whole: Path, tmp_path: Path, monkeypatch, key: str, value: Any, text: str
) -> None:
    real = json.dumps
    monkeypatch.setattr(json, "dumps", lambda data, **how: real({**data, key: value}, **how))
    rewritten(whole, tmp_path / "m.tl")
    monkeypatch.undo()
    with pytest.raises(ArtifactError, match=text):
        load(tmp_path / "m.tl")


# -- the graph ------------------------------------------------------------------------------------

PAYLOAD = "__import__('pathlib').Path('pwned').touch()"


def op(name: Any) -> Callable[[dict[str, Any]], object]:
    return lambda data: data["nodes"][0].update(op=name)


def node(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda data: data["nodes"][0].update(fields)


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "os": (op("os.system"), "may not call 'os.system'"),
    "os-3": (op("os.path.join"), "not registered here"),
    "eval": (op("builtins.eval"), "may not call"),
    "code": (op(PAYLOAD), "may not call"),
    "number": (op(3), "names no op"),
    "load-library": (op("load_library.x.y"), "not registered here"),
    "dunder": (op("__class__.__init__.__globals__"), "not registered here"),
    "namespace-attribute": (op("aten.__dict__.default"), "not registered here"),
    "overload-attribute": (op("aten.relu.__call__"), "not registered here"),
    "file": (op("aten.from_file.default"), "more than compute"),
    "save": (op("aten.save.default"), "(more than compute|not registered)"),
    "in-place": (op("aten.relu_.default"), "more than compute"),
    "out": (op("aten.relu.out"), "more than compute"),
    "profiler": (op("profiler._record_function_enter.default"), "may not call"),
    "process": (op("_c10d_functional.all_reduce.default"), "may not call"),
    "missing-op": (op("aten.no_such_op.default"), "load the model with the version"),
    "missing-library": (op("mylib.fused.default"), r"import the package .* mylib::\*"),
    "attrgetter": (op("operator.attrgetter"), "may not call"),
    "name-code": (node(name=f"x, {PAYLOAD}"), "is not a name"),
    "name-line": (node(name="x\nimport os"), "is not a name"),
    "name-keyword": (node(name="class"), "is not a name"),
    "name-twice": (node(name="x"), "two nodes are called x"),
    "keyword-code": (node(kwargs=[[f"a={PAYLOAD}, b", 1]]), "is not a name"),
    "no-node": (node(args=[{"node": "nowhere"}]), "names the node 'nowhere'"),
    "two-kinds": (node(args=[{"node": "x", "float": "inf"}]), "cannot be read"),
    "no-kind": (node(args=[{"pickle": "gASV"}]), "cannot be read"),
    "no-device": (node(args=[{"device": "cuda"}]), "names the device"),
    "no-dtype": (node(args=[{"dtype": "load"}]), "names the dtype"),
    "power": (node(op="operator.pow", args=[9, 999999]), "does not compute a size"),
    "product": (node(op="operator.mul", args=["a", 10**12]), "does not compute a size"),
    "huge": (node(op="operator.add", args=[10**30, 1]), "does not compute a size"),
    "tensor-code": (lambda d: d["tensors"][0].update(name=f'"]{PAYLOAD}'), "names the tensor"),
    "tensor-twice": (lambda d: d["tensors"].append(d["tensors"][0]), "two nodes"),
    "alias": (lambda d: d.update(aliases=[["a", "b"]]), "tied name has no tensor"),
    "alias-clash": (lambda d: d.update(aliases=[["fc1.bias", "fc1.weight"]]), "clashes"),
    "alias-code": (lambda d: d.update(aliases=[['x"y', "fc1.weight"]]), "cannot be the name"),
    "model-code": (lambda d: d.update(model=PAYLOAD), "is not the name of a model"),
    "kind": (lambda d: d["tensors"][0].update(kind="module"), "is not a graph"),
    "symbol": (lambda d: d["symbols"][0].update(hint=-1), "is not a size"),
    "symbol-huge": (lambda d: d["symbols"][0].update(hint=10**40), "is not a size"),
    "shape-code": (lambda d: d["inputs"][0].update(shape=["s0", 4]), "is not a size"),
    "shape-symbol": (lambda d: d["inputs"][0].update(shape=[{"symbol": "t"}, 4]), "the size 't'"),
    "input-huge": (
        lambda d: d["inputs"].__setitem__(
            0,
            {
                "node": "x",
                "dtype": "float32",
                "shape": [4],
                "random": {"size": [2**40], "of": [0, 1]},
            },
        ),
        "too large",
    ),
    "spec": (lambda d: d.update(out_spec={"type": "registered", "children": []}), "cannot be read"),
    "spec-size": (
        lambda d: d.update(out_spec={"type": "tuple", "children": [None, None]}),
        "do not have the structure",
    ),
    "stride": (lambda d: d["tensors"][0].update(stride=[1000, 1000]), "strides"),
    "indices": (lambda d: d["kept"][0].__setitem__(2, "fc1.weight"), "indices that are none"),
    "no-nodes": (lambda d: d.pop("nodes"), "is not a graph"),
    "nodes-text": (lambda d: d.update(nodes="x"), "is not a graph"),
    "outputs": (lambda d: d.update(outputs=[{"node": "later"}]), "names the node"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_graph_is_refused(
    name: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, text = HOSTILE[name]
    monkeypatch.chdir(tmp_path)
    rewritten(whole, tmp_path / "m.tl", graph=edited(change))
    with pytest.raises(ArtifactError, match=text):
        load(tmp_path / "m.tl")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.tl"]


@pytest.mark.parametrize(
    "content", [b"[]", b"null", b"{", b"\xff", b"[" * 100_000, b"1" * 10_000, b'{"a": NaN}']
)
@pytest.mark.parametrize("name", ["graph", "report"])
def test_members_that_are_no_json_are_refused(
    name: str, content: bytes, whole: Path, tmp_path: Path
) -> None:
    if name == "report" and content in (b"null", b'{"a": NaN}'):
        return
    rewritten(whole, tmp_path / "m.tl", **{name: lambda _: content})
    with pytest.raises(ArtifactError):
        load(tmp_path / "m.tl")


def test_a_graph_that_does_not_fit_is_found_when_shapes_are(whole: Path, tmp_path: Path) -> None:
    rewritten(whole, tmp_path / "m.tl", graph=edited(op("aten.cumsum.default")))
    with pytest.raises(ArtifactError, match="loaded graph does not work here"):
        _ = load(tmp_path / "m.tl").program


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["node", "tuple", "dict", "symbol", "x"]), inner, max_size=2
        )
    ),
    max_leaves=6,
)
FIELDS = [
    ("model",),
    ("nodes",),
    ("nodes", 0),
    ("nodes", 0, "name"),
    ("nodes", 0, "op"),
    ("nodes", 1, "args"),
    ("nodes", 0, "args", 0),
    ("nodes", 0, "module"),
    ("tensors",),
    ("tensors", 1, "name"),
    ("tensors", 1, "kind"),
    ("tensors", 1, "stride"),
    ("inputs", 0),
    ("inputs", 0, "shape"),
    ("inputs", 0, "example"),
    ("inputs", 0, "dtype"),
    ("symbols", 0),
    ("symbols", 0, "range"),
    ("symbols", 0, "hint"),
    ("outputs",),
    ("in_spec",),
    ("in_spec", "children"),
    ("out_spec",),
    ("kept",),
    ("kept", 0),
    ("zeroed", 0, 1),
    ("aliases",),
    ("carried",),
    ("dropped",),
    ("history",),
]


@pytest.mark.filterwarnings("ignore:.*is not known here")
@settings(max_examples=300)
@given(field=st.sampled_from(FIELDS), value=JSON)
def test_any_other_value_is_read_or_refused(
    whole: Path, field: tuple[Any, ...], value: Any
) -> None:
    """Whatever stands in a field, loading ends with a model or with an ArtifactError."""

    def change(data: dict[str, Any]) -> None:
        place: Any = data
        for key in field[:-1]:
            place = place[key]
        place[field[-1]] = value

    path = rewritten(whole, whole.with_name("fuzzed.tl"), graph=edited(change))
    with suppress(ArtifactError):
        _ = load(path).program


# -- the weights ----------------------------------------------------------------------------------


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def apply(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        text = edited(change)(content[8 : 8 + length])
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    return apply


WEIGHTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "none": (lambda c: b"", "ends too early"),
    "header-size": (lambda c: b"\xff" * 8 + c[8:], "larger than the member"),
    "header": (lambda c: c[:8] + b"x" + c[9:], "not JSON"),
    "short": (lambda c: c[:-4], "do not fill"),
    "long": (lambda c: c + b"0000", "do not fill"),
    "dtype": (header(lambda h: h["fc1.bias"].update(dtype="OBJECT")), "impossible dtype"),
    "shape": (header(lambda h: h["fc1.bias"].update(shape=[5])), "size of its shape"),
    "negative": (header(lambda h: h["fc1.bias"].update(shape=[-4])), "impossible"),
    "huge": (header(lambda h: h["fc1.bias"].update(shape=[2**61, 2**61])), "size of its shape"),
    "overlap": (
        header(lambda h: h["fc1.bias"].update(data_offsets=h["fc2.bias"]["data_offsets"])),
        "(size of its shape|does not start)",
    ),
    "missing": (header(lambda h: h.pop("fc1.bias")), "does not start"),
    "text": (header(lambda h: h.update({"fc1.bias": "x"})), "no description"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_not_what_they_say(name: str, whole: Path, tmp_path: Path) -> None:
    change, text = WEIGHTS[name]
    rewritten(whole, tmp_path / "m.tl", weights=change)
    with pytest.raises(ArtifactError, match=text):
        load(tmp_path / "m.tl")


# -- single parts ---------------------------------------------------------------------------------


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([torch.float16, torch.int8, torch.strided, torch.channels_last, 3 - 2j])
    | st.slices(5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(value=VALUES)
def test_values_come_back_as_they_were(value: Any) -> None:
    text = json.dumps(encode(value), allow_nan=False)
    assert repr(decode(json.loads(text), {})) == repr(value)


def test_values_that_have_no_place_in_a_file() -> None:
    for value in (object(), torch.ones(2), {1, 2}, lambda: None, torch.Generator()):
        with pytest.raises(ArtifactError, match="cannot be saved"):
            encode(value)


def test_plain_ops_are_found() -> None:
    assert resolve_op("aten.linear.default") is torch.ops.aten.linear.default
    assert resolve_op("operator.floordiv")(7, 2) == 3
    assert resolve_op("torch.sym_max")(2, 3) == 3


@pytest.mark.parametrize(
    "data",
    [
        {"type": "registered", "class": "collections:defaultdict", "context": [1], "children": []},
        {"type": "registered", "class": "os:system", "context": None, "children": [None]},
        {"type": "registered", "class": "transformers.models.x:Y", "context": [], "children": []},
        {"type": "namedtuple", "class": "subprocess:Popen", "keys": ["a"], "children": [None]},
        {"type": "namedtuple", "class": "builtins:eval", "keys": ["a"], "children": [None]},
    ],
)
def test_types_that_a_file_may_not_make(data: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="is not known here"):
        spec = decode_structure(data)
    assert spec.type in (tuple, dict)


def test_the_seal_of_large_members_is_that_of_small_ones(tmp_path: Path, monkeypatch) -> None:
    """Members beyond 2 GiB get another header; here the limit is lower."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    program = dynamic_perceptron(Perceptron(64))
    compiled = CompiledModel(program)
    compiled.save(tmp_path / "m.tl")
    loaded = load(tmp_path / "m.tl", Eager())
    with read_container(tmp_path / "m.tl", frozenset(NAMES)) as container:
        assert all(start % 64 == 0 for start, _, _ in container.members.values())
    assert torch.equal(loaded.get_parameter("fc1.weight"), compiled.get_parameter("fc1.weight"))
    with zipfile.ZipFile(tmp_path / "m.tl") as made:
        assert made.testzip() is None
