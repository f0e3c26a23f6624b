import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.passes.sample_passes import Colour, Everything, Picky, small_net
from torchlathe.ir import Error, OptionError, SpecError
from torchlathe.passes import Pass, parse_pipeline, pipeline_text
from torchlathe.passes.options import expected, options_of

pytestmark = pytest.mark.usefixtures("samples")

# --- round trip ----------------------------------------------------------------------------------

numbers = st.floats(allow_nan=False)
texts = st.text() | st.sampled_from(
    ["none", "true", "1", "0.5", "nan", "l2", "<x>", "a:b", "#", ""]
)
everything = st.builds(
    Everything,
    flag=st.booleans(),
    count=st.integers(),
    ratio=numbers,
    text=texts,
    scope=st.sampled_from(["global", "local"]),
    bits=st.sampled_from([4, 8, None]),
    colour=st.sampled_from(Colour),
    names=st.lists(texts).map(tuple),
    pair=st.tuples(st.integers(), numbers),
    items=st.lists(st.integers()),
    by_name=st.dictionaries(texts, numbers),
    nested=st.dictionaries(texts, st.lists(st.integers()).map(tuple)),
    mixed=st.none() | st.booleans() | st.integers() | numbers | texts | st.lists(texts).map(tuple),
    share=numbers | st.dictionaries(texts, numbers),
)
picky = st.builds(Picky, round_to=st.integers(min_value=1))


def same(a: object, b: object) -> bool:
    """Equal, and of equal types all the way down: True is not 1, nor is 1 equal to 1.0."""
    return repr(a) == repr(b)


@given(st.lists(everything | picky, max_size=3))
def test_text_reads_back_as_the_passes(passes: list[Pass]) -> None:
    text = pipeline_text(passes)
    back = parse_pipeline(text)
    assert back == passes
    assert same(back, passes)
    assert pipeline_text(back) == text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("item", "text"),
    [
        (Everything(), "everything"),
        (Everything(flag=True, count=-3), "everything{flag=true,count=-3}"),
        (Everything(ratio=1), "everything{ratio=1.0}"),
        (Everything(ratio=math.inf), "everything{ratio=inf}"),
        (Everything(text="a b"), 'everything{text="a b"}'),
        (Everything(text="blocks.*.mlp"), "everything{text=blocks.*.mlp}"),
        (Everything(text='"\\\n'), r'everything{text="\"\\\n"}'),
        (Everything(bits=8), "everything{bits=8}"),
        (Everything(colour=Colour.DARK_BLUE), "everything{colour=dark-blue}"),
        (Everything(names=["a", "b"]), "everything{names=[a,b]}"),  # type: ignore[arg-type]
        (Everything(by_name={"a:b": 1, "w[0]": 2}), 'everything{by-name={a:b:1.0,"w[0]":2.0}}'),
        (Everything(nested={"a": [1, 2], "b": ()}), "everything{nested={a:[1,2],b:[]}}"),
        (Everything(mixed="none"), 'everything{mixed="none"}'),
        (Everything(mixed="1"), 'everything{mixed="1"}'),
        (Everything(mixed=1), "everything{mixed=1}"),
        (Everything(mixed=1.0), "everything{mixed=1.0}"),
        (Everything(mixed=True), "everything{mixed=true}"),
        (Everything(share={"a": 0.1}), "everything{share={a:0.1}}"),
        (Everything(share={"a.b:0/1": 0.1}), "everything{share={a.b:0/1:0.1}}"),
        (Everything(share={":": 1, "a:": 2}), "everything{share={::1.0,a::2.0}}"),
        (Everything(nested={"a:0": [1, 2]}), "everything{nested={a:0:[1,2]}}"),
        (Everything(function=len), "everything{function=<len>}"),
        (Everything(function=small_net()[0].weight), "everything{function=<Parameter>}"),
        (Picky(4), "picky{round-to=4}"),
    ],
    ids=str,
)
def test_text_form(item: Pass, text: str) -> None:
    assert str(item) == text


@pytest.mark.parametrize(
    ("text", "item"),
    [
        ("everything{}", Everything()),
        ("everything{flag}", Everything(flag=True)),
        ("everything{flag=false,by_name={a:1}}", Everything(by_name={"a": 1.0})),
        (
            " everything { count = 1 , # comment, {\n names=[ a , b ] } ",
            Everything(count=1, names=("a", "b")),
        ),
        ('everything{text="a\\u00e9"}', Everything(text="aé")),
        ("everything{text=a:b/c+d@1}", Everything(text="a:b/c+d@1")),
        ("everything{colour=DARK_BLUE}", Everything(colour=Colour.DARK_BLUE)),
        ('everything{scope="local"}', Everything(scope="local")),
        ("everything{pair=[+3,1e-3]}", Everything(pair=(3, 1e-3))),
        ("everything{mixed=[a]}", Everything(mixed=("a",))),
        ("picky{round_to=2}", Picky(2)),
    ],
)
def test_text_can_be_written_in_other_ways(text: str, item: Pass) -> None:
    (found,) = parse_pipeline(text)
    assert found == item
    assert same(found, item)


def test_several_passes() -> None:
    assert parse_pipeline("") == parse_pipeline(" # nothing\n") == []
    text = "picky{round-to=1},everything,picky{round-to=1}"
    assert parse_pipeline(text) == [Picky(1), Everything(), Picky(1)]


# --- what is refused -----------------------------------------------------------------------------


def error_cases() -> Iterator[tuple[str, str, str, str | None]]:
    """Text, carets, ``Kind: message`` and hint of each paragraph of spec_errors.txt."""
    for paragraph in Path(__file__).with_name("spec_errors.txt").read_text().split("\n\n"):
        text, carets, message, *hint = paragraph.rstrip("\n").split("\n")
        yield text, carets, message, hint[0].removeprefix("next: ") if hint else None


@pytest.mark.parametrize(("text", "carets", "message", "hint"), list(error_cases()))
def test_errors_point_into_the_text(text: str, carets: str, message: str, hint: str | None) -> None:
    with pytest.raises(Error) as caught:
        parse_pipeline(text)
    error = caught.value
    assert f"{type(error).__name__}: {error.message}" == f"{message}\n    {text}\n    {carets}"
    assert error.hint == hint


def test_errors_show_the_line_of_a_longer_text() -> None:
    with pytest.raises(SpecError) as caught:
        parse_pipeline("everything{\n\tcount=1,  # one\n\tcuont=2\n}\n")
    assert str(caught.value) == (
        "everything has no option cuont, line 3\n"
        "     cuont=2\n"
        "     ^^^^^\n"
        "  next:  did you mean count?"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flag": 1}, "flag of everything: expected true or false, got 1 of type int"),
        ({"count": True}, "count of everything: expected an integer, got True of type bool"),
        ({"count": 1.0}, "count of everything: expected an integer, got 1.0 of type float"),
        ({"ratio": "1"}, "ratio of everything: expected a number, got '1' of type str"),
        ({"names": "ab"}, "names of everything: expected a list [text, ...], got 'ab' of type str"),
        ({"names": ["a", 1]}, "names of everything: expected text, got 1 of type int"),
        ({"by_name": {1: 1}}, "by_name of everything: expected text, got 1 of type int"),
        ({"scope": "all"}, "scope of everything: expected global or local, got 'all' of type str"),
        (
            {"colour": "red"},
            "colour of everything: expected red or dark-blue, got 'red' of type str",
        ),
    ],
)
def test_values_from_python_are_held_to_their_types(options: dict, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        Everything(**options)
    assert str(caught.value) == message


def test_values_from_python_take_their_text_form() -> None:
    item = Everything(ratio=1, names=["a"], nested={"a": [1]})  # type: ignore[arg-type]
    assert same(item, Everything(ratio=1.0, names=("a",), nested={"a": (1,)}))
    assert Everything(function=len).function is len


def test_options_describe_themselves() -> None:
    options = {option.key: option for option in options_of(Everything)}
    share = options["share"]
    assert (share.name, share.required, share.help) == ("share", False, "how much")
    assert share.type_text == "a number or a mapping {text: a number}"
    assert share.default_text == "0.5"
    assert options["names"].default_text == "[]"
    assert [o.required for o in options_of(Picky)] == [True, False]
    assert expected(int | None) == "none or an integer"


def test_an_annotation_must_resolve() -> None:
    cls = dataclasses.make_dataclass("Lost", [("where", "Nowhere", 1)])
    cls.__module__ = __name__
    with pytest.raises(OptionError, match=r"annotation of Lost\.where cannot be resolved: Nowhere"):
        options_of(cls)


def test_a_pipeline_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.txt"
    path.write_text("picky{round-to=2},  # first\neverything\n")
    assert parse_pipeline(path.read_text()) == [Picky(2), Everything()]
