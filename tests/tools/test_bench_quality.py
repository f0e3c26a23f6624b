"""The quality benchmark: its nets and contestants at work once, and the page of its results."""

from __future__ import annotations

import json

import pytest
import torch

from torchlathe.ir import capture
from torchlathe.tools.bench import bench_quality
from torchlathe.tools.bench.quality import contestants, nets, page, peer


@pytest.mark.skipif(not page.RESULTS.exists(), reason="not measured yet")
def test_the_page_is_what_the_results_say() -> None:
    result = json.loads(page.RESULTS.read_text(encoding="utf-8"))
    assert page.PAGE.read_text(encoding="utf-8") == page.quality_page(result)
    for net in dict.fromkeys(row["net"] for row in result["rows"]):
        assert page.PAGE.with_name(f"quality_{page.slug(net)}.svg").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(nets.NETS))
def test_both_sides_reach_the_sizes(name: str) -> None:
    pytest.importorskip("torch_pruning")
    data = nets.digits(0)
    model = nets.NETS[name]().eval()
    program = capture(model, (data.test[0][:64],))
    task = contestants.Task(program, data.batches[:2], None, lambda p: nets.accuracy(p.run, data))
    both = contestants.erase(task, contestants.scored(task, "l2"), "global", (0.6,))
    for (point,) in (*both, peer.prune(model, data, "l2", "global", (0.6,), steps=12)):
        # One unit of the widest family is 3 %, and half a step of Torch-Pruning about 6 %.
        assert abs(point["left"] - 0.6) < 0.08
        assert 0 <= point["metric"] <= 1
    assert torch.equal(model(data.test[0][:64]), model(data.test[0][:64]))


def test_verdict_names_where_the_peer_is_ahead() -> None:
    def row(who: str, refit: bool, metric: float) -> dict[str, object]:
        points = [{"size": 0.5, "left": 0.5, "metric": metric}]
        return {
            "net": "digits CNN",
            "seed": 0,
            "who": who,
            "importance": "l2",
            "scope": "global",
            "refit": refit,
            "whole": 0.98,
            "points": points,
        }

    result = {
        "cpu": "a processor",
        "threads": 1,
        "torch": "2",
        "processor_seconds": 1.0,
        "rows": [
            row("torchlathe", False, 0.4),
            row("torchlathe", True, 0.9),
            row("torch-pruning", False, 0.5),
        ],
    }
    text = page.quality_page(result)
    assert "l2, global, as erased: 40.0 against 50.0 at 50%" in text
    assert "l2, global, refitted:" not in text
    assert "| 50% | 90.0 (l2, global) | 40.0 (l2, global) | 50.0 (l2, global) |" in text


def test_an_unknown_net_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_quality.main(["--nets", "digits CNN,alexnet"])
    assert "unknown nets alexnet" in capsys.readouterr().err
