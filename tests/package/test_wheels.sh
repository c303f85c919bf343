#!/usr/bin/env bash
# What `make wheels` made: twine's checks, each wheel's tag and contents, exported names, and a run of each: Python with the
# ones for this processor, the C example under qemu-user with the one for aarch64.
# Arguments: the folder of packages, the source folder, a Python that has twine.
set -euo pipefail
dist=$1 source=$2 python=$3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fail() { echo "test_wheels: $*" >&2; exit 1; }
mapfile -t packages < <(find "$dist" -name '*.whl' -o -name '*.tar.gz' | sort)
"$python" -m twine check --strict "${packages[@]}" > "$work/twine.log" || { cat "$work/twine.log" >&2; exit 1; }

for package in "${packages[@]}"; do
  printf '%8d kB  %s\n' $(($(stat -c %s "$package") / 1000)) "${package#"$dist/"}"
  if [[ $package == *.tar.gz ]]; then
    tar -tf "$package" > "$work/list"
    for file in README.md LICENSE CHANGELOG.md docs/add-a-method.md tests/python/test_add_a_method.py src/core/api.cc; do
      grep -qE "^[^/]+/$file\$" "$work/list" || fail "$package has no $file"
    done
    continue
  fi
  oldest=$(grep -oE 'manylinux_2_[0-9]+' <<< "${package##*/}" | grep -oE '[0-9]+$' | sort -n | head -n 1)
  [ "${oldest:-99}" -le 28 ] || fail "$package is not for glibc 2.28 or older"
  folder=$work/$(basename "$package")
  "$python" -m zipfile -e "$package" "$folder"
  grep -qE '^!?\[?.*\]\((docs|bench|examples)/' "$folder"/*.dist-info/METADATA && fail "$package: README has relative links"
  [ -e "$(find "$folder" -name LICENSE)" ] || fail "$package has no LICENSE"
  library=$folder/flashprefill/lib/libflashprefill.so
  others=$(nm --dynamic --defined-only --format=posix "$library" | grep -v '^fp_' || true)
  [ -z "$others" ] || fail "$package exports $others"
  theirs=$(nm --dynamic --undefined-only "$library")
  grep -qE ' memcpy(@|$)' <<< "$theirs" || fail "$package has a memcpy that is not the system's"
  if [[ $package == *aarch64* ]]; then
    aarch64-linux-gnu-gcc "$source/examples/c/prefill.c" -I"$source/include" "$library" -lm -o "$work/arm"
    qemu-aarch64 -L /usr/aarch64-linux-gnu -E LD_LIBRARY_PATH="${library%/*}:/usr/aarch64-linux-gnu/lib" "$work/arm"
  else
    PYTHONPATH=$folder "$source/.venv/bin/python" -c '
import flashprefill as fp
import numpy as np
q = np.random.default_rng(0).standard_normal((1024, 4, 64), dtype=np.float32)
assert np.isfinite(fp.prefill_attention(q, q[:, :2], q[:, :2], fp.FlashPrefill())).all()
targets = next(backend.targets for backend in fp.backends() if backend.name == "cpu")
flags = open("/proc/cpuinfo").read().split()
assert ("avx2" in targets) == ("avx2" in flags) and ("avx512" in targets) == ("avx512dq" in flags), targets'
  fi
done
