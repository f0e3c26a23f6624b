from pathlib import Path

import pytest
import torch

from tests.tools.nets import Net
from torchlathe.ir import capture
from torchlathe.passes import ZeroInvariantGroups
from torchlathe.tools.graph_picture import save_picture

HEADS = {".svg": b"<?xml", ".png": b"\x89PNG", ".pdf": b"%PDF", ".dot": b"graph families {"}


@pytest.fixture(scope="module")
def families():
    return capture(Net(), (torch.randn(4, 16),)).analysis(ZeroInvariantGroups)


@pytest.mark.parametrize("suffix", HEADS)
def test_formats(families, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / "folder" / f"families{suffix}"
    save_picture(families, path)
    assert path.read_bytes().startswith(HEADS[suffix])


def test_dot_names_roles_and_states(families, tmp_path: Path) -> None:
    path = tmp_path / "families.dot"
    save_picture(families, path)
    text = path.read_text()
    assert (
        '"up.weight:0" [shape=box, color="#1a7f4b", label="up.weight:0\\n64 units, exact"]' in text
    )
    assert '"up.weight:0" -- "tensor up.weight" [style=solid, label="0"]' in text
    assert '"up.weight:0" -- "tensor down.weight" [style=dashed, label="1"]' in text
    assert "pinned" in text


def test_a_limit_keeps_what_can_shrink(families, tmp_path: Path) -> None:
    path = tmp_path / "families.dot"
    save_picture(families, path, limit=1)
    text = path.read_text()
    assert "up.weight:0" in text
    assert "pinned" not in text
    save_picture(families, tmp_path / "families.svg", limit=1)
    assert "1 of 3" in (tmp_path / "families.svg").read_text()
