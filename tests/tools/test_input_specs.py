import pytest
import torch

from torchlathe.ir import SpecError
from torchlathe.tools.input_specs import InputSpec, parse_inputs, read_specs


def test_specs() -> None:
    assert read_specs("float32[2,3, 4]") == [InputSpec(None, torch.float32, (2, 3, 4))]
    assert read_specs("int64[2]<9, mask = bool[batch=2]") == [
        InputSpec(None, torch.int64, (2,), below=9),
        InputSpec("mask", torch.bool, (2,), {0: "batch"}),
    ]
    assert read_specs("float16[], n=bfloat16[s = 16 <= 512]") == [
        InputSpec(None, torch.float16, ()),
        InputSpec("n", torch.bfloat16, (16,), {0: "s"}, {"s": 512}),
    ]


def test_values() -> None:
    given = parse_inputs("ids=int64[50,4]<7,attention_mask=int64[50,4],x=float64[3]", seed=1)
    assert given.args == ()
    assert set(given.kwargs["ids"].unique().tolist()) == set(range(7))
    assert bool((given.kwargs["attention_mask"] == 1).all())
    assert given.kwargs["x"].dtype is torch.float64
    again = parse_inputs("ids=int64[50,4]<7", seed=1)
    assert torch.equal(again.kwargs["ids"], given.kwargs["ids"])
    assert set(parse_inputs("uint8[99]").args[0].unique().tolist()) == {0, 1}


def test_dynamic_dimensions_with_one_name_are_one() -> None:
    given = parse_inputs("a=int64[batch=2,sequence=16<=512],b=float32[batch=2,3]")
    a, b = given.dynamic_shapes["a"], given.dynamic_shapes["b"]
    assert (a[0].__name__, a[1].__name__, a[1].max) == ("batch", "sequence", 512)
    assert a[0] is b[0]
    assert list(b) == [0]
    assert parse_inputs("a=int64[2]").dynamic_shapes is None
    mixed = parse_inputs("float32[batch=2],float32[2],scale=float32[]").dynamic_shapes
    assert [shape and list(shape) for shape in mixed] == [[0], None, None]


@pytest.mark.parametrize(
    ("text", "message", "place"),
    [
        ("float3[2]", "known types are float64", 0),
        ("float32[2", "expected name=dtype[shape]", 0),
        ("float32[2],", "", None),
        ("float32[2] x", "expected name=dtype[shape]", 0),
        ("a=int64[2,x]", "expected an extent such as 16", 10),
        ("a=int64[b=1]", "a dynamic dimension needs an example of 2 or more", 8),
        ("a=int64[b=16<=8]", "a maximum is for a named dimension", 8),
        ("a=int64[16<=18]", "a maximum is for a named dimension", 8),
        ("a=int64[2]<0", "the bound must be above 0", 11),
        ("", "no inputs are given", None),
        ("a=int64[2],a=int64[2]", "named twice", None),
        ("a=int64[2],int64[2]", "a positional input stands after a named one", None),
    ],
)
def test_errors_point_at_the_place(text: str, message: str, place: int | None) -> None:
    if not message:
        assert len(read_specs(text)) == 1
        return
    with pytest.raises(SpecError) as caught:
        read_specs(text)
    assert message in caught.value.message
    if place is not None:
        assert caught.value.message.splitlines()[-1] == " " * (2 + place) + "^"
