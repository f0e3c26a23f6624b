import json

import pytest
import torch

from torchlathe.kernels.tuning import table as tables
from torchlathe.kernels.tuning.table import TileTable, tile_for, using
from torchlathe.kernels.tuning.tiles import BUCKETS, Problem, Tile, candidates, default_tile

PROBLEMS = [
    Problem(op, "float16", m, n, k, 128)
    for op in ("w4a16", "w8a16", "w4a8", "w8a8", "fp8")
    for m in (1, 2, 3, 8, 9, 16, 33, 64)
    for n, k in ((4096, 4096), (14336, 4096), (100, 200))
]


@pytest.mark.parametrize("m", [1, 2, 3, 8, 9, 64, 65, 4096])
def test_buckets(m: int) -> None:
    bucket = Problem("w4a16", "float16", m, 8, 8).bucket
    assert bucket == 0 if m > max(BUCKETS) else m <= bucket <= max(2, 4 * m)


def test_tiles_are_ones_that_the_kernels_take() -> None:
    for problem in PROBLEMS:
        found = list(candidates(problem, 132))
        assert found[0] == default_tile(problem, 132)
        assert len(found) == len(set(found)) <= 12
        for tile in found:
            assert 128 % tile.BN == 0
            assert min(problem.bucket, 16) <= tile.BM
            assert tile.split in {1, 2, 4, 8, 16, 32}
            assert tile.warps in {4, 8}


def test_more_tokens_than_a_tile_go_to_the_library() -> None:
    problem = Problem("w4a16", "float16", 65, 4096, 4096, 128)
    assert default_tile(problem, 132) is None
    assert list(candidates(problem, 132)) == []


@pytest.mark.parametrize(
    ("n", "k", "split"), [(4096, 4096, 4), (14336, 4096, 1), (128, 256, 1)], ids=str
)
def test_few_rows_are_split(n: int, k: int, split: int) -> None:
    tile = default_tile(Problem("w4a16", "float16", 1, n, k, 128), 132)
    assert tile is not None
    assert tile.split == split


def test_a_table_comes_back(tmp_path) -> None:
    problem = Problem("w4a16", "float16", 5, 4096, 4096, 128)
    table = TileTable("NVIDIA H200", "3.6.0", tmp_path)
    assert table.tile(problem, 132) == default_tile(problem, 132)
    table.entries[problem.key] = Tile(8, 128, 2)
    table.entries["other"] = None
    table.save()
    again = TileTable("NVIDIA H200", "3.6.0", tmp_path)
    assert again.entries == table.entries
    assert again.tile(problem, 132) == Tile(8, 128, 2)
    assert TileTable("NVIDIA H200", "3.7.0", tmp_path).entries == {}
    assert [path.name for path in tmp_path.iterdir()] == ["NVIDIA_H200_triton_3.6.0.json"]


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"format": 1}', '{"format": 1, "entries": {"a": {"BX": 1}}}', "{"],
    ids=["empty", "list", "no-entries", "unknown-field", "cut"],
)
def test_a_bad_table_is_ignored(tmp_path, caplog, text: str) -> None:
    table = TileTable("gpu", "3.6.0", tmp_path)
    table.path.write_text(text)
    assert TileTable("gpu", "3.6.0", tmp_path).entries == {}
    assert "ignored the tuning table" in caplog.text


def test_another_format_is_ignored(tmp_path) -> None:
    table = TileTable("gpu", "3.6.0", tmp_path)
    table.path.write_text(json.dumps({"format": 99, "entries": {"a": None}}))
    assert TileTable("gpu", "3.6.0", tmp_path).entries == {}


def test_using_a_table(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCHLATHE_CACHE", str(tmp_path))
    tables.forget()
    problem = Problem("w4a16", "float16", 5, 4096, 4096, 128)
    table = TileTable("gpu", "3.6.0", tmp_path)
    table.entries[problem.key] = None
    with using(table, 1):
        assert tile_for(problem, "cuda") is None
    if not torch.cuda.is_available():
        assert tile_for(problem, "cuda") == default_tile(problem, 132)
    tables.forget()
