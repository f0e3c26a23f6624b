"""Lowering as it is done for a compiled model: what the backend needs, its work, and the check."""

from __future__ import annotations

from torchlathe.backends.agreeing import Agreement, check_agreement
from torchlathe.backends.base import Backend, FlatCallable, Lowerable, capabilities_of
from torchlathe.backends.frozen import FrozenRun
from torchlathe.backends.needs import check_capabilities

__all__ = ["lowered"]


def lowered(
    backend: Backend, source: Lowerable, *, check: bool = True
) -> tuple[FlatCallable, Agreement | None]:
    """Let a backend lower a program, and hold the result against the eager program.

    Args:
        backend: What lowers it.
        source: The program with its tensors.
        check: Whether the result is compared with the eager program, if the backend asks for it.

    Returns:
        A function of flat inputs that gives flat outputs, and how well it agrees.

    Raises:
        BackendError: What the backend cannot do, or could not.
        DisagreementError: It made something that computes another function.
    """
    check_capabilities(backend, source)
    able = capabilities_of(backend)
    run = backend.lower(source)
    if not getattr(run, "live", able.live):
        run = FrozenRun(backend.lower, source, run)
    agreement = check_agreement(backend, source, run) if check and able.checked else None
    return run, agreement
