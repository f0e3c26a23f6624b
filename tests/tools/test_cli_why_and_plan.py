"""``inspect --why``, ``--meta``, and ``plan`` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tools import nets
from torchlathe.tools import pretrained
from torchlathe.tools.cli import main
from torchlathe.tools.report import Report

PLAN = "structured-erase{importance=random,scope=local}"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nets.py").write_text(Path(nets.__file__).read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 0
    return capsys.readouterr().out


def test_why_names_what_goes_together(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "inspect", "nets.py:pair", "--why", "up.weight:0[3]")
    for part in (
        "the index up.weight:0[3]",
        "index 3 is unit 3 of up.weight:0",
        "reads   down.weight:1",
        "joined by %linear_1",
        "through up.weight -> %linear",
    ):
        assert part in text
    assert "Families" not in text


def test_why_can_be_asked_for_several_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["inspect", "nets.py:pair", "--why", "up.weight", "--why", "down", "--json"]
    data = json.loads(shown(capsys, *words))
    assert [found["kind"] for found in data["why"]] == ["parameter", "module"]
    assert data["why"][0]["families"][0]["coupled"][0]["tensor"] == "up.weight"
    assert "families" not in data
    both = json.loads(shown(capsys, *words, "--pins"))
    assert {"why", "pins"} <= set(both)


def test_why_draws_its_families_only(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["inspect", "nets.py:pair", "--why", "up.weight:0", "--graph", "why.dot"]
    assert "wrote the picture to why.dot" in shown(capsys, *words)
    text = Path("why.dot").read_text()
    assert '"up.weight:0" [shape=box' in text
    assert text.count("shape=box") == 1


def test_a_wrong_name_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "nets.py:pair", "--why", "up.weigth"]) == 2
    error = capsys.readouterr().err
    assert "nothing in Net is called 'up.weigth'" in error
    assert "did you mean up.weight" in error


def test_plan_reports_without_measuring(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "nets.py:pair", "-p", "structured-erase", "--report", "plan.json"]
    text = shown(capsys, *words)
    assert "· plan" in text
    assert "wrote the plan to plan.json" in text
    assert "latency" not in text
    report = Report.load("plan.json")
    assert report.after.parameters < report.before.parameters


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_meta_makes_a_model_without_values(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    passes = ["-p", PLAN] if command == "plan" else []
    real = json.loads(shown(capsys, command, "nets.py:pair", *passes, "--json"))
    meta = json.loads(shown(capsys, command, "nets.py:pair", "--meta", *passes, "--json"))
    assert any("meta device" in note for note in meta["notes"])
    for key in ("families", "pins", "totals", "before", "after", "parameters"):
        assert meta.get(key) == real.get(key)


def test_ranking_without_values_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "nets.py:pair", "--meta", "-p", "structured-erase"]) == 2
    error = capsys.readouterr().err
    assert "importance=l2 ranks units by values" in error
    assert "importance=random" in error


def test_a_file_with_values_is_not_made_on_meta(capsys: pytest.CaptureFixture[str]) -> None:
    shown(capsys, "compile", "nets.py:pair", "--no-latency", "-o", "net.tl")
    assert main(["inspect", "net.tl", "--meta"]) == 2
    assert "net.tl holds values" in capsys.readouterr().err


def test_a_config_too_large_is_made_on_meta(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    config |= {"intermediate_size": 48, "vocab_size": 64, "dtype": "bfloat16"}
    Path("config.json").write_text(json.dumps(config))
    words = ["plan", "config.json", "-p", PLAN, "--json"]
    small = json.loads(shown(capsys, *words))
    assert any("random" in note for note in small["notes"])
    monkeypatch.setattr(pretrained, "_memory", lambda: 1000)
    large = json.loads(shown(capsys, *words))
    assert any("meta device in bfloat16" in note for note in large["notes"])
    assert large["after"]["parameters"] == small["after"]["parameters"]
    # The weights take half; the buffer of positions stays in float32.
    assert large["before"]["bytes"] < 0.51 * small["before"]["bytes"]
    assert main(["compile", "config.json", "-p", PLAN]) == 2
    assert "torchlathe.plan" in capsys.readouterr().err
