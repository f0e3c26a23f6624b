import io

import torch
from rich.console import Console

from tests.tools.nets import Net
from torchlathe.ir import capture
from torchlathe.passes import PassManager
from torchlathe.tools.cli.progress import Progress


def run(terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
    program = capture(Net(), (torch.randn(4, 16),))
    with Progress(console) as progress:
        PassManager("structured-erase", instruments=[progress.instrument()]).run(program)
        progress.say("loading [b]net[/b]")
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_a_terminal_is_told() -> None:
    shown = []

    class Listening(Progress):
        def say(self, text: object) -> None:
            shown.append(str(text))
            super().say(text)

    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    program = capture(Net(), (torch.randn(4, 16),))
    with Listening(console) as progress:
        PassManager("structured-erase", instruments=[progress.instrument()]).run(program)
    assert shown == [
        "pass 1 of 1: structured-erase",
        "pass 1 of 1 is done",
        "lowering and measuring",
    ]
    assert "[b]net[/b]" in run(terminal=True)


def test_counted_batches_have_a_bar() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with Progress(console) as progress:
        progress.say("statistics: batch 3 of 4 (5 MiB of matrices in files)")
    file = console.file
    assert isinstance(file, io.StringIO)
    assert "batch 3 of 4" in file.getvalue()
    assert "━" in file.getvalue()
    assert "━" not in run(terminal=True)


def test_everyone_else_is_not() -> None:
    assert run(terminal=False) == ""
