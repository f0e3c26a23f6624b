"""The errors that a user can cause.

Each says what was wrong, where, and what to do next. ``Error`` is the base that callers catch;
anything else that escapes from torchlathe is a defect in torchlathe.
"""

__all__ = [
    "ArtifactError",
    "BackendError",
    "CaptureError",
    "Error",
    "InputError",
    "OptionError",
    "PassError",
    "PreconditionError",
    "SpecError",
    "UnsupportedError",
    "VerifyError",
]


class Error(Exception):
    """Base of all errors that torchlathe raises on purpose.

    Args:
        message: What was wrong, in one sentence with the values that matter.
        where: Module path, node, source line or place in a text.
        hint: What to do next.
    """

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.message]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.hint:
            lines.append(f"  next:  {self.hint}")
        return "\n".join(lines)


class SpecError(Error):
    """A text pipeline, or a name in it, that cannot be read."""


class OptionError(Error):
    """An option of a pass, a backend or a command with an impossible value."""


class CaptureError(Error):
    """A model that could not be captured into a graph."""


class InputError(Error):
    """Inputs that do not fit the program: structure, shape, dtype or range."""


class UnsupportedError(Error):
    """Something legal that this version cannot do."""


class PreconditionError(Error):
    """A pass whose requirements do not hold at its place in the pipeline."""


class VerifyError(Error):
    """A program that breaks an invariant, or a pass that broke its promise."""


class PassError(Error):
    """A pass that failed; the program is as it was before the pass."""


class ArtifactError(Error):
    """A saved file that is truncated, tampered with, or of another version."""


class BackendError(Error):
    """A backend that could not lower the program."""
