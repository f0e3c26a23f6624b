import json
from dataclasses import replace

import pytest

from torchlathe.kernels.aot.compiling import ARCHITECTURES
from torchlathe.kernels.aot.matrix import CONTROL, OPS, all_cases, check_case
from torchlathe.tools.cli import main

SM_90 = ARCHITECTURES["sm_90"]


def first(op: str):
    return next(iter(all_cases([op])))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("op", OPS)
def test_one_case_of_each_op(op: str, arch: str) -> None:
    case = next((c for c in all_cases([op]) if arch in c.architectures), None)
    if case is None:
        pytest.skip(f"{op} is not for {arch}")
    row = check_case(case, ARCHITECTURES[arch])
    assert not row.problems
    assert row.registers > 0
    assert row.stack == 0


def test_the_control_breaks_limits() -> None:
    row = check_case(first(CONTROL), SM_90)
    text = " ".join(row.problems)
    assert "slots per weight" in text
    assert "wanted wgmma-registers" in text
    assert "conversions from integers" in text


def test_a_missing_hint_is_noticed() -> None:
    """A stride of which nothing is known makes the loads narrow."""
    case = first("w4a16")
    worse = replace(case, divisible=[n for n in case.divisible if n != "stride_weight"])
    assert any(problem.startswith("loads of") for problem in check_case(worse, SM_90).problems)


def test_spilled_registers_are_noticed() -> None:
    case = next(c for c in all_cases(["w4a16"]) if "BM64" in c.config)
    row = check_case(replace(case, num_warps=4), SM_90)
    assert any("bytes of stack" in problem for problem in row.problems)


def test_too_much_shared_memory_is_noticed() -> None:
    case = next(c for c in all_cases(["w4a16"]) if "BM64" in c.config)
    row = check_case(replace(case, num_stages=8), SM_90)
    assert any("bytes of shared memory" in problem for problem in row.problems)


def test_what_does_not_compile_is_a_row() -> None:
    case = first("w4a16")
    constants = dict(case.constants(SM_90))
    row = check_case(replace(case, constants=lambda _: constants | {"BN": 48}), SM_90)
    assert row.problems[0].startswith("does not compile: ")


def test_command(capsys, tmp_path) -> None:
    path = tmp_path / "facts.json"
    line = [
        "kernels",
        "check",
        "--arch",
        "sm_90",
        "--op",
        "norm_quantise",
        "--json",
        "-o",
        str(path),
    ]
    assert main(line) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(path.read_text())
    assert {row["arch"] for row in found["rows"]} == {"sm_90"}
    assert set(found["rows"][0]) >= {
        "op", "arch", "config", "registers", "stack", "shared", "slots_per_weight", "mma",
        "load_bytes",
    }  # fmt: skip
    assert found["control"][0]["problems"]
