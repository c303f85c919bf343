"""Packs vLLM for a machine with a Hopper GPU where nothing can be installed: python archive.py FOLDER

Writes FOLDER/site.tar.xz (40 MB), a whole site-packages for Python 3.12 on Linux x86-64. That machine needs
torch for CUDA, Transformers and what they bring. With the archive unpacked and in PYTHONPATH, `import vllm`
works there, and run.sh of this folder runs the tests. Wheels named after FOLDER go in too: flashprefill's.

Downloads 350 MB and takes 1 GB in FOLDER and some minutes. Left out are FlashAttention 2, kernels of
DeepSeek's models and of mixtures of experts, the Rust front end, tokenizers and translations that come as
data, and machine code for other GPUs and for head dimensions and types that the tests do not use (fatbin.py).
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from fatbin import prune

HERE = Path(__file__).resolve().parent
# pip matches these exactly.
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (17, 24, 26, 27, 28, 31, 34, 35)] + [
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
]
LIBRARIES = {  # of vLLM's wheel, and what of their kernels is kept
    "vllm/_C_stable_libtorch.abi3.so": "",
    "vllm/_moe_C_stable_libtorch.abi3.so": None,  # no kernel: the library only has to load
    "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so": r"fwd_hdim(128|64)_bf16|fwd_hdim128_e4m3|combine|scheduler",
    "vllm/cumem_allocator.abi3.so": "",
    "vllm/spinloop.abi3.so": "",
    "vllm/fs_io_C.abi3.so": "",
}
LEFT_OUT = re.compile(
    r"\.so$|vllm-rs$|third_party/(deep_gemm|fmha_sm100|tml_fa4|flashmla)/|\.(h|hpp|cuh|cu|cc|cpp)$|/cutlass/|/cute/"
)
DATA = re.compile(r"^mistral_common/data/tekken|^pycountry/locales/")


def fetch(folder: Path) -> None:
    """Download the wheels of requirements.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    platforms = [f"--platform={name}" for name in PLATFORMS]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version=3.12", "--implementation=cp", *platforms, "-d", str(folder)]
    subprocess.run([*command, "-r", str(HERE / "requirements.txt")], check=True)


def kept(name: str, pattern: str | None) -> bool:
    """Return whether a source file's kernels stay; "" is one whose name is not known."""
    if not pattern or not name:
        return pattern is not None
    return re.search(pattern, name) is not None and "softcap" not in name


def unpack(wheel: Path, site: Path) -> None:
    """Unpack a wheel; of vLLM's only what runs."""
    ours = wheel.name.startswith("vllm-")
    with zipfile.ZipFile(wheel) as archive:
        for item in archive.infolist():
            library = ours and item.filename in LIBRARIES
            if item.is_dir() or DATA.search(item.filename):
                continue
            if ours and not library and LEFT_OUT.search(item.filename):
                continue
            name = re.sub(r"^[^/]+\.data/(purelib|platlib)/", "", item.filename)
            if ".data/" in name:
                continue  # scripts
            target = site / name
            target.parent.mkdir(parents=True, exist_ok=True)
            data = archive.read(item)
            if library:
                pattern = LIBRARIES[item.filename]
                data = prune(data, lambda source, pattern=pattern: kept(source, pattern))
            target.write_bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("wheels", type=Path, nargs="*", help="of your own: flashprefill's, built for CUDA")
    asked = parser.parse_args()
    folder = asked.folder
    site = folder / "site"
    shutil.rmtree(site, ignore_errors=True)
    fetch(folder / "wheels")
    for wheel in [*sorted((folder / "wheels").glob("*.whl")), *asked.wheels]:
        unpack(wheel, site)
    tar, archive = folder / "site.tar", folder / "site.tar.xz"
    subprocess.run(
        ["tar", "--sort=name", "--owner=0", "--group=0", "-C", str(site), "-cf", str(tar), "."], check=True
    )
    subprocess.run(["xz", "-6", "-T2", "--force", str(tar)], check=True)
    print(f"{archive}: {archive.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
