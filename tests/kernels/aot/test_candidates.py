"""Each tile that the tuner would time compiles without spilling, so that no time goes to waste."""

import pytest

from torchlathe.kernels.aot.compiling import ARCHITECTURES
from torchlathe.kernels.aot.matrix import check_case
from torchlathe.kernels.tuning.tiles import BUCKETS, Problem, Tile, candidates
from torchlathe.kernels.w4a16.cases import _case


def tiles(bucket: int):
    """Distinct binaries: those of all splits are one but for whether there is a split."""
    found: dict[tuple[int | bool, ...], Tile] = {}
    for n, k in ((4096, 4096), (14336, 4096)):
        for tile in candidates(Problem("w4a16", "float16", bucket, n, k, 128), 132):
            key = (tile.BM, tile.BN, tile.warps, tile.stages, tile.split > 1)
            found.setdefault(key, tile)
    return list(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("bucket", BUCKETS)
def test_no_candidate_spills(bucket: int) -> None:
    for tile in tiles(bucket):
        case = _case(
            tile.BM, tile.BN, split=tile.split, warps=tile.warps, stages=tile.stages, limit=9.0
        )
        row = check_case(case, ARCHITECTURES["sm_90"])
        problems = [p for p in row.problems if "matrix instructions" not in p]
        assert not problems, (tile, row)
