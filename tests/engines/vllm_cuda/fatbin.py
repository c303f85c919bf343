"""Makes a CUDA library small: the code of other GPUs, and of kernels that are not wanted, becomes zeros.

A library of nvcc's holds fat binaries: a header, then entries, each with the machine code (or PTX) of one
architecture. Entries are found by their header and only their payload is zeroed, so all offsets stay right
and the library loads as before; a kernel whose code is gone fails when it is launched. Zeros compress to
nothing: vLLM's `_C` of 79 MB becomes 14 MB with xz, its FlashAttention 3 of 173 MB becomes 3 MB with the
kernels of one head dimension and dtype.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator

_MAGIC = struct.pack("<I", 0xBA55ED50)
_CUBIN, _PTX = 2, 1
_NAME = re.compile(
    rb"_INTERNAL_[0-9a-f]{8}_\d+_(\w+?_cu)_"
)  # of the source file, in the names of its symbols


def _entries(data: bytearray, at: int) -> list[tuple[int, int, int, int]] | None:
    """Return (kind, architecture, begin and end of the payload) of entries; None: no fat binary."""
    version, header, size = struct.unpack_from("<HHQ", data, at + 4)
    if (version, header) != (1, 16):
        return None
    result, here, end = [], at + header, at + header + size
    while here < end:
        kind, _, header, size = struct.unpack_from("<HHIQ", data, here)
        if kind not in (1, 2, 4, 8, 16, 64) or not 64 <= header <= 4096:
            return None
        (architecture,) = struct.unpack_from("<I", data, here + 28)
        result.append((kind, architecture, here + header, here + header + size))
        here += header + size
    return result


def _fat_binaries(data: bytearray) -> Iterator[list[tuple[int, int, int, int]]]:
    at = data.find(_MAGIC)
    while at >= 0:
        entries = _entries(data, at)
        if entries:
            yield entries
        at = data.find(_MAGIC, entries[-1][3] if entries else at + 4)


def prune(library: bytes, wanted: Callable[[str], bool] = lambda name: True, architecture: int = 90) -> bytes:
    """Return the library with machine code for one architecture only.

    Args:
        library: the file's bytes.
        wanted: whether to keep a source file's kernels, by its name ("flash_fwd_hdim128_bf16_paged_sm90_cu");
            "" where its symbols do not tell it.
        architecture: 90 for Hopper. Where a fat binary has none for it, its PTX stays.
    """
    data = bytearray(library)
    for entries in _fat_binaries(data):
        found = _NAME.search(bytes(data[entries[0][2] : entries[-1][3]]))
        keep = wanted(found.group(1).decode() if found else "")
        native = any((kind, arch) == (_CUBIN, architecture) for kind, arch, _, _ in entries)
        for kind, arch, begin, end in entries:
            if not keep or ((kind, arch) != (_CUBIN, architecture) if native else kind != _PTX):
                data[begin:end] = bytes(end - begin)
    return bytes(data)
