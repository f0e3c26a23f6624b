"""Reading assembly, on texts as the disassemblers write them; needs no Triton."""

import pytest

from torchlathe.kernels.aot.assembly import main_loop
from torchlathe.kernels.aot.compiling import ARCHITECTURES, Binary
from torchlathe.kernels.aot.matrix import Limits, _problems

SASS = """\
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   LDG.E.U16 R1, desc[UR4][R2.64] ;
        /*0020*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0100*/                   LDGSTS.E.BYPASS.128 [R107], desc[UR24][R4.64], !P4 ;
        /*0110*/              @!P1 LDGSTS.E.BYPASS.128 [R107+0x800], desc[UR24][R6.64] ;
        /*0120*/                   LDG.E.U16 R1, desc[UR4][R2.64] ;
        /*0130*/                   HGMMA.64x16x16.F32 R48, R24, gdesc[UR24], RZ, !UPT ;
        /*0140*/                   HGMMA.64x16x16.F32 R48, {A}, R48, gsb0 ;
        /*0150*/                   I2F.U16 R3, R4 ;
        /*0160*/               @P1 BRA `(.L_x_1) ;
        /*0170*/                   EXIT ;
.L_x_2:
        /*0180*/                   BRA `(.L_x_2);
"""
GCN = """\
.LBB0_1:
\tglobal_load_dwordx4 v[2:5], v[2:3], off
\tv_and_b32_e32 v1, 15, v2
\ts_cbranch_vccnz .LBB0_3
.LBB0_2:
\tv_mfma_f32_16x16x16_f16 a[0:3], v[64:65], v[24:25], a[4:7]
.LBB0_3:
\tglobal_load_ushort v9, v[2:3], off
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
"""


def binary(arch: str, text: str) -> Binary:
    return Binary(ARCHITECTURES[arch], text, "", 32, 0, 1024, 128)


def test_sass() -> None:
    loop = main_loop(binary("sm_90", SASS.replace("{A}", "R28, gdesc[UR20]")))
    assert loop is not None
    assert len(loop.instructions) == 7
    assert loop.mma == "wgmma-registers"
    assert loop.load_bytes == 16
    assert loop.loaded == {16: 32, 2: 2}
    assert loop.conversions == 1
    assert loop.counts()["HGMMA"] == 2
    # 128 threads copy 4,096 bytes in an iteration, which is two steps of 2,048.
    assert loop.slots_per(1024, 4096) == 7 * 128 / 1024
    assert loop.slots_per(1024, 2048) == 7 * 128 / 2048


def test_one_operand_in_shared_memory_is_enough() -> None:
    loop = main_loop(binary("sm_90", SASS.replace("{A}", "gdesc[UR20]")))
    assert loop is not None
    assert loop.mma == "wgmma-shared"


def test_gcn() -> None:
    loop = main_loop(binary("gfx942", GCN))
    assert loop is not None
    assert loop.mma == "mfma"
    assert loop.load_bytes == 16
    assert len(loop.instructions) == 6


def test_no_loop() -> None:
    assert main_loop(binary("sm_90", "        /*0170*/                   EXIT ;\n")) is None


@pytest.mark.parametrize(
    ("slots", "mma", "width", "conversions", "text"),
    [
        (2.7, "wgmma-registers", 16, 0, "2.7 slots per weight, the limit is 2.6"),
        (None, "wgmma-registers", 16, 0, "None slots"),
        (2.6, "mma", 16, 0, "matrix instructions mma, wanted wgmma-registers"),
        (2.6, "wgmma-registers", 8, 0, "loads of 8 bytes, wanted 16"),
        (2.6, "wgmma-registers", 16, 1, "1 conversions from integers"),
        (2.6, "wgmma-registers", 16, 0, None),
    ],
    ids=["slots", "no-loop", "mma", "loads", "conversions", "good"],
)
def test_limits(slots, mma, width, conversions, text) -> None:
    limits = Limits(slots={"sm_90": 2.6}, mma={"sm_90": {"wgmma-registers"}}, conversions=0)
    found = list(_problems(limits, ARCHITECTURES["sm_90"], slots, mma, width, conversions))
    assert (found == []) if text is None else (len(found) == 1 and text in found[0])
