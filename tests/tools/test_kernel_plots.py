"""Plots of kernel benchmarks, from made-up measurements: nothing here was measured."""

import json
from xml.etree import ElementTree

import pytest

from torchlathe.ir import OptionError
from torchlathe.tools.kernels import plots
from torchlathe.tools.kernels.benching import Ceilings, Measurement
from torchlathe.tools.kernels.timing import Samples


def rows(ops=("w4a16", "w8a8"), shapes=((4096, 4096), (8192, 8192)), tokens=(1, 16, 64)):
    found = []
    ceilings = Ceilings(4e12, 8e14)
    for op in ops:
        for n, k in shapes:
            for m in tokens:
                moved = n * k / (2 if op == "w4a16" else 1)
                floor = ceilings.floor(moved, 2.0 * m * n * k, False)
                times = {"ours": 1.2 * floor, "library": 3 * floor, "fp16": 4 * floor}
                if op == "w4a16":
                    times["gemlite"] = 2 * floor
                samples = {name: Samples(t, 0.9 * t, 1.1 * t) for name, t in times.items()}
                one = Measurement(op, m, n, k, 0, 1e-4, True, samples, floor, None, moved, ceilings)
                found.append(json.loads(json.dumps(one.as_dict())))
    return found


def texts(path) -> set[str]:
    tree = ElementTree.parse(path)
    return {"".join(node.itertext()).strip() for node in tree.iter() if node.tag.endswith("text")}


def test_both_plots(tmp_path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"rows": rows()}))
    assert plots.main([str(path), str(tmp_path / "out")]) == 0
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == ["kernels_latency.svg", "kernels_roofline.svg"]
    latency, roofline = map(texts, files)
    assert {"w4a16 4096x4096", "w8a8 8192x8192", "ours", "library", "gemlite", "floor"} <= latency
    assert {"w4a16", "w8a8", "TFLOP/s", "16-bit products"} <= roofline


def test_the_same_numbers_make_the_same_files(tmp_path) -> None:
    one, two = (plots.draw(rows(), tmp_path / name) for name in ("a", "b"))
    for first, second in zip(one, two, strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_rows_of_an_older_file_have_no_roofline(tmp_path) -> None:
    old = [
        {key: value for key, value in row.items() if key not in {"moved", "ceilings"}}
        for row in rows()
    ]
    assert "w4a16" not in texts(plots.draw(old, tmp_path)[1])


def test_no_rows(tmp_path) -> None:
    with pytest.raises(OptionError, match="nothing to draw"):
        plots.draw([], tmp_path)
