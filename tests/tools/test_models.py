import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tools import nets
from torchlathe.backends import CompiledModel
from torchlathe.ir import ArtifactError, Error, InputError, Program, SpecError, capture
from torchlathe.tools.models import load_model

NETS = "tests.tools.nets"


@pytest.mark.parametrize("place", [NETS, "nets.py"], ids=["module", "file"])
@pytest.mark.parametrize(
    ("function", "args", "kwargs"), [("module", 0, 0), ("pair", 1, 0), ("triple", 1, 1)]
)
def test_functions(
    place: str, function: str, args: int, kwargs: int, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "nets.py").write_text(Path(nets.__file__).read_text())
    monkeypatch.chdir(tmp_path)
    named = load_model(f"{place}:{function}")
    assert type(named.model).__name__ == "Net"
    assert (len(named.args), len(named.kwargs)) == (args, kwargs)
    if args:
        assert isinstance(named.capture(), Program)


def test_modules_and_classes_themselves() -> None:
    assert load_model(f"{NETS}:MODULE").model is nets.MODULE
    assert type(load_model(f"{NETS}:Net").model) is nets.Net


def test_a_file_may_import_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_model.py").write_text("WIDTH = 5\n")
    (tmp_path / "made.py").write_text(
        "from torch import nn\nfrom neighbour_of_model import WIDTH\n"
        "def f(): return nn.Linear(WIDTH, 2)\n"
    )
    try:
        model = load_model(f"{tmp_path}/made.py:f").model
        assert isinstance(model, torch.nn.Linear)
        assert model.in_features == 5
    finally:
        sys.path.remove(str(tmp_path))


def test_given_inputs_replace_those_of_the_function() -> None:
    named = load_model(f"{NETS}:triple", inputs="float32[batch=3,16]")
    assert (named.args[0].shape, named.kwargs) == ((3, 16), {})
    program = named.capture()
    assert program.run(torch.randn(7, 16)).shape == (7, 10)
    static = load_model(f"{NETS}:pair", inputs="float32[batch=3,16]", dynamic="none").capture()
    with pytest.raises(InputError, match="static"):
        static.run(torch.randn(7, 16))
    auto = load_model(f"{NETS}:pair", dynamic="auto").capture()
    assert auto.run(torch.randn(7, 16)).shape == (7, 10)


def test_the_seed_decides_random_inputs() -> None:
    one, two, other = (load_model(f"{NETS}:pair", seed=seed).args[0] for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("org/name", "there is no model org/name here, and none is downloaded", "name a model"),
        ("no.such.module:f", "there is no module no", "name a model"),
        (f"{NETS}:pare", "tests.tools.nets has no pare", "did you mean pair?"),
        (f"{NETS}:Net.nothing", "Net has no nothing", None),
        (f"{NETS}:NUMBER", "NUMBER is int, not a function", "name a model"),
        (f"{NETS}:number", "returned (int)", "return a module"),
        (f"{NETS}:failing", "failed: ValueError: no weights here", None),
        ("nothing.py:f", "there is no file nothing.py", "relative to where you are"),
        ("nothing.pt2", "there is no file nothing.pt2", "name a model"),
        ("nothing.tl", "there is no file nothing.tl", "name a model"),
        ("nothing.json", "there is no nothing.json", "save_pretrained"),
        ("bad.json", "bad.json is not JSON", None),
        ("other.json", "model type 'nothing', which transformers", "Python function"),
        ("empty", "the folder empty has no config.json", "save_pretrained"),
        ("net.py", "which function makes the model?", "write net.py:function"),
        ("net.py:f", "net.py cannot be imported: ZeroDivisionError", None),
    ],
)
def test_what_is_no_model(
    name: str, message: str, hint: str | None, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "net.py").write_text("1 / 0\n")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "other.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(InputError) as caught:
        load_model(name)
    assert message in caught.value.message
    assert hint is None or hint in (caught.value.hint or "")


def test_an_error_says_where(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_model(f"{NETS}:failing")
    assert "nets.py" in (caught.value.where or "")
    assert "(failing)" in (caught.value.where or "")


def test_no_function_after_the_colon() -> None:
    with pytest.raises(SpecError, match="names no function after the colon"):
        load_model(f"{NETS}:")


def test_exported_programs_and_saved_models(tmp_path: Path) -> None:
    model, args = nets.pair()
    exported = torch.export.export(model, args)
    torch.export.save(exported, tmp_path / "net.pt2")
    CompiledModel(capture(model, args)).save(tmp_path / "net.tl")
    for name in ("net.pt2", "net.tl"):
        program = load_model(str(tmp_path / name)).capture()
        torch.testing.assert_close(program.run(*args), model(*args))
        with pytest.raises(InputError, match="captured already"):
            load_model(str(tmp_path / name), inputs="float32[4,16]")


def test_files_that_are_not_what_they_are_called(tmp_path: Path) -> None:
    for name in ("net.pt2", "net.tl"):
        (tmp_path / name).write_text("nonsense")
        with pytest.raises(ArtifactError):
            load_model(str(tmp_path / name))


# -- transformers ------------------------------------------------------------------------------

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 99,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert", "architectures": ["BertForMaskedLM"], **TINY},
    "llama": {"model_type": "llama", "num_key_value_heads": 2, **TINY},
    "t5": {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 1,
        "num_heads": 4,
        "vocab_size": 99,
    },
    "vit": {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "image_size": 32,
        "patch_size": 8,
        **TINY,
    },
}


def write_config(folder: Path, kind: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[kind]))
    return str(folder)


@pytest.mark.parametrize("kind", CONFIGS)
def test_transformers_configs(kind: str, tmp_path: Path) -> None:
    named = load_model(write_config(tmp_path, kind), seed=3)
    assert type(named.model).__name__ == CONFIGS[kind].get("architectures", ["LlamaModel"])[0]
    assert named.notes == ("the weights are random, for the config comes without any",)
    program = named.capture()
    model: Any = named.model
    inputs = dict(named.kwargs)
    # Another batch and, for text, another length go through what was captured.
    for name, tensor in inputs.items():
        inputs[name] = torch.cat([tensor] * 3)
        if tensor.dim() == 2:
            inputs[name] = inputs[name][:, :11]
    found, expected = program.run(**inputs), model(**inputs)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    same: Any = load_model(str(tmp_path / "config.json"), seed=3).model
    for a, b in zip(model.parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)


def test_weights_of_a_folder_are_loaded(tmp_path: Path) -> None:
    model: Any = load_model(write_config(tmp_path / "config", "bert")).model
    model.save_pretrained(tmp_path / "saved")
    again = load_model(str(tmp_path / "saved"), seed=9)
    assert again.notes == ()
    loaded: Any = again.model
    for a, b in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_config_that_cannot_be_made(tmp_path: Path) -> None:
    data = {**CONFIGS["bert"], "num_attention_heads": 5}
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="transformers cannot make the model"):
        load_model(str(tmp_path))


def test_all_of_these_are_errors_of_torchlathe() -> None:
    assert issubclass(InputError, Error)
