"""What this build of the library has, and what of it runs on this machine."""

from __future__ import annotations

from dataclasses import dataclass

from . import _abi

__all__ = ["Backend", "backends", "library_path", "library_version", "thread_runtime"]


@dataclass(frozen=True)
class Backend:
    """A backend of this build.

    Attributes:
        name: what the keyword ``backend`` of the verbs takes.
        available: whether it can run here.
        description: one line about it on this machine, or why it can't run.
        targets: instruction sets for the keyword ``target``, best first.
    """

    name: str
    available: bool
    description: str
    targets: tuple[str, ...]


def backends() -> list[Backend]:
    """Return the backends of this build."""
    found: list[Backend] = []
    while (name := _abi.lib.fp_backend_name(len(found))) is not None:
        found.append(
            Backend(
                name.decode(),
                bool(_abi.lib.fp_backend_available(name)),
                _abi.text_of(_abi.lib.fp_backend_describe, name),
                tuple(_abi.text_of(_abi.lib.fp_backend_targets, name).split()),
            )
        )
    return found


def thread_runtime() -> str:
    """Return the name of the OpenMP runtime that CPU threads come from."""
    return _abi.text_of(_abi.lib.fp_thread_runtime)


def library_version() -> str:
    """Return the version of the loaded library."""
    return str(_abi.lib.fp_version().decode())


def library_path() -> str:
    """Return where the library was loaded from."""
    return str(_abi.library_path)
