"""The benchmark of the collector, at a size that only shows that it works."""

import json
from typing import Any

import torch

from torchlathe.tools.bench import bench_calibration
from torchlathe.tools.bench.bench_calibration import WAYS, main, measured_section

SIZE = {"layers": 1, "width": 16, "tokens": 4, "batch": 2, "batches": 1}


def test_a_way_is_measured(capsys: Any) -> None:
    threads = torch.get_num_threads()
    try:
        words = [f"--{name}={value}" for name, value in SIZE.items()]
        assert main([*words, "--rounds=1", "--way=files-64"]) == 0
    finally:
        torch.set_num_threads(threads)
    assert json.loads(capsys.readouterr().out)["seconds"] > 0
    # Embeddings are none of the layers; queries, keys and values are one.
    squares = 2 * 16**2 + 48**2 + 2 * 16**2 + 2 * 64**2 + 16**2 + 16**2 + 1000**2
    assert bench_calibration._check(SIZE) == 8 * squares


def test_the_page_has_what_was_measured() -> None:
    data = json.loads(bench_calibration.RESULTS.read_text(encoding="utf-8"))
    assert data["ways"].keys() == WAYS.keys()
    assert measured_section(data) in bench_calibration.PAGE.read_text(encoding="utf-8")
