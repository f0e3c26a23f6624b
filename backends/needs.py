"""What a program needs of a backend, held against what the backend says that it can do."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from torchlathe.backends.base import Backend, Lowerable, backend_text, capabilities_of
from torchlathe.ir import BackendError

__all__ = ["check_capabilities", "missing_packages"]

_EAGER = 'backend="eager" runs every program'


def missing_packages(backend: Backend) -> list[str]:
    """Packages that the backend imports and that are not installed."""
    return [name for name in capabilities_of(backend).packages if find_spec(name) is None]


def check_capabilities(backend: Backend, source: Lowerable) -> None:
    """Refuse what the backend cannot do, before any work.

    Raises:
        BackendError: A package that is not installed, or a dtype, device or dynamic dimension
            that the backend does not have.
    """
    able = capabilities_of(backend)
    if missing := missing_packages(backend):
        extra = f'pip install "torchlathe[{able.extra}]"' if able.extra else "install it"
        raise BackendError(
            f"the backend {backend.name!r} needs {', '.join(missing)}, which is not installed",
            hint=extra,
        )
    if able.dtypes is None and able.devices is None and able.dynamic_shapes:
        return
    for name, dtype, device in _values(source):
        if able.dtypes is not None and dtype.is_floating_point and dtype not in able.dtypes:
            known = ", ".join(str(d).removeprefix("torch.") for d in able.dtypes)
            raise BackendError(
                f"{name} is {str(dtype).removeprefix('torch.')}, and the backend "
                f"{backend.name!r} has {known}",
                hint=_EAGER,
            )
        if able.devices is not None and device.type not in able.devices:
            raise BackendError(
                f"{name} is on {device}, and the backend {backend.name!r} runs on "
                f"{', '.join(able.devices)}",
                hint="move the model with .to(...) first",
            )
    if source.dynamic and not able.dynamic_shapes:
        raise BackendError(
            f"{backend_text(backend)} takes one size, and the program has dynamic dimensions",
            hint=f"compile without dynamic_shapes, or {_EAGER}",
        )


def _values(source: Lowerable) -> list[tuple[str, torch.dtype, torch.device]]:
    found = []
    for name, node in source.program.tensor_nodes.items():
        value = node.meta["val"]
        # Scales of stored numbers are converted where they are read, whatever they are stored in.
        if not all(str(user.target) == "torchlathe.dequantize.default" for user in node.users):
            found.append((name, value.dtype, value.device))
    for node in source.program.input_nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            found.append((node.name, value.dtype, value.device))
    return found
