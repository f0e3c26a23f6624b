"""Each tile that the tuner would time compiles and keeps its bars: no time goes to waste."""

import pytest

from torchlathe.kernels.aot.candidates import TUNED, Tuned, candidate_cases, tiles_of
from torchlathe.kernels.aot.compiling import ARCHITECTURES
from torchlathe.kernels.aot.matrix import Case, check_case


def cases_of(tuned: Tuned) -> list[Case]:
    return [
        case for case in candidate_cases([tuned.op]) if f"candidate {tuned.kind} " in case.config
    ]


def name_of(tuned: Tuned) -> str:
    return f"{tuned.op}-{tuned.dtype}"


@pytest.mark.parametrize("tuned", TUNED, ids=name_of)
def test_a_sample(tuned: Tuned) -> None:
    """The first for 16 tokens and the last of all, which is the largest."""
    cases = cases_of(tuned)
    assert len(cases) == len(tiles_of(tuned))
    middle = next(case for case in cases if " BM16 " in case.config)
    for case in (middle, cases[-1]):
        row = check_case(case, ARCHITECTURES["sm_90"])
        assert not row.problems, row


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("tuned", TUNED, ids=name_of)
def test_all_of_them(tuned: Tuned, arch: str) -> None:
    broken = [
        row
        for case in cases_of(tuned)
        if arch in case.architectures
        if (row := check_case(case, ARCHITECTURES[arch])).problems
    ]
    assert not broken
