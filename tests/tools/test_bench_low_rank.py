"""The measured part of docs/low_rank.md is what the result file says."""

import json
from pathlib import Path

from torchlathe.tools.bench.bench_low_rank import RESULTS
from torchlathe.tools.bench.low_rank_page import measured
from torchlathe.tools.bench.markdown import MARK

PAGE = Path(__file__).resolve().parents[2] / "docs" / "low_rank.md"


def test_the_page_is_made_of_the_results() -> None:
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    _, mark, text = PAGE.read_text(encoding="utf-8").partition(MARK)
    assert mark
    assert text == "\n" + measured(result)
