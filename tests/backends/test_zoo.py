"""Each backend on models of other people's packages, erased and quantised, static and dynamic."""

from importlib.util import find_spec
from typing import Any

import pytest

from torchlathe.tools.bench.bench_backends import MODELS, PIPELINE, rows_of
from torchlathe.tools.bench.coverage.zoo import ENTRIES

RUNTIMES = [name for name in ("onnxruntime", "openvino") if find_spec(name) is not None]
PACKAGES = ("transformers", "timm", "torchvision")
missing = [name for name in PACKAGES if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def check(model: str, backends: list[str], passes: str = PIPELINE) -> list[dict[str, Any]]:
    """All rows agree in both modes; at another size too where dimensions are dynamic."""
    rows = list(rows_of(model, backends, passes))
    assert [(row["mode"], row["backend"]) for row in rows] == [
        (mode, backend) for mode in ("static", "dynamic") for backend in backends
    ]
    for row in rows:
        assert row["outcome"] == "agrees", row
        assert row["error"] <= row["tolerance"]
        assert row["sizes"] == (2 if row["mode"] == "dynamic" else 1)
    return rows


def test_the_table_has_models_enough() -> None:
    assert len(set(MODELS)) == len(MODELS) >= 30
    assert set(MODELS) <= set(ENTRIES)
    assert {name.partition("/")[0] for name in MODELS} == set(PACKAGES)


@pytest.mark.skipif("onnxruntime" not in RUNTIMES, reason="needs onnxruntime")
def test_an_encoder_in_onnx() -> None:
    rows = check("transformers/distilbert", ["onnx"])
    # The rounding is the program's own, so that hardly anything differs.
    assert max(row["error"] for row in rows) < 1e-3


@pytest.mark.skipif("openvino" not in RUNTIMES, reason="needs openvino")
def test_a_convolutional_model_in_openvino() -> None:
    check("transformers/resnet", ["openvino"])


def test_a_convolutional_model_as_a_module() -> None:
    check("transformers/resnet", ["module"], "structured-erase{sparsity=0.3}")


def test_what_a_backend_cannot_do_is_a_named_error_of_each_mode() -> None:
    rows = list(rows_of("transformers/resnet", ["executorch{largest=1}"], ""))
    assert [(row["mode"], row["outcome"]) for row in rows] == [
        ("static", "OptionError"),
        ("dynamic", "OptionError"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_all_models_in_the_runtimes(model: str) -> None:
    names = {"onnxruntime": "onnx", "openvino": "openvino"}
    check(model, [names[name] for name in RUNTIMES])


@pytest.mark.slow
@pytest.mark.cxx
@pytest.mark.parametrize(
    "model", ["transformers/bert", "transformers/llama", "transformers/vit", "timm/resnet10t"]
)
def test_some_models_in_the_compilers(model: str) -> None:
    check(model, ["inductor{freezing=true}", "aoti"])
