#!/usr/bin/env bash
# Installs the build into a temporary prefix and uses it as strangers would: examples/ through find_package, the C example
# through pkg-config, and both against the static library too where the build has one.
# Arguments: build folder, source folder.
set -euo pipefail
build=$1 source=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fail() { echo "test_install: $*" >&2; exit 1; }

# Moved after it was installed: nothing in a prefix may know where that was.
cmake --install "$build" --prefix "$work/installed" > /dev/null
prefix=$work/prefix
mv "$work/installed" "$prefix"
find "$prefix" -name LICENSE | grep -q . || fail "no LICENSE in the prefix"
library=$(find "$prefix" -name libflashprefill.so)
archive=$(find "$prefix" -name libflashprefill.a)

# Exported is what flashprefill.h declares, and nothing else.
declared=$(grep -ohE '^FP_API .*' "$prefix/include/flashprefill/flashprefill.h" | grep -oE 'fp_[a-z0-9_]+\(' | tr -d '(' | sort)
exported=$(nm --dynamic --defined-only --format=posix "$library" | cut -d' ' -f1 | sort)
[ "$declared" = "$exported" ] || fail "declared (<) and exported (>): $(diff <(echo "$declared") <(echo "$exported"))"

variants=(flashprefill)
[ -z "$archive" ] || variants+=(flashprefill_static)
for variant in "${variants[@]}"; do
  cmake -S "$source/examples" -B "$work/$variant" -DCMAKE_PREFIX_PATH="$prefix" -DCMAKE_BUILD_TYPE=Release \
    -DFLASHPREFILL_TARGET="flashprefill::$variant" > /dev/null
  cmake --build "$work/$variant" > /dev/null
  "$work/$variant/prefill_c"
  "$work/$variant/prefill_cpp"
done

if ! command -v pkg-config > /dev/null; then
  echo "test_install: pkg-config is not installed, its files are not tested"
  exit
fi
export PKG_CONFIG_PATH=${library%/*}/pkgconfig
for variant in "${variants[@]}"; do
  name=${variant/_/-}
  read -ra flags <<< "$(pkg-config --cflags --libs "$name")"
  cc "$source/examples/c/prefill.c" -o "$work/pc-$name" "${flags[@]}" -lm
  LD_LIBRARY_PATH=${library%/*} "$work/pc-$name"
  if [ "$name" = flashprefill-static ] && readelf --dynamic "$work/pc-$name" | grep -q 'NEEDED.*flashprefill'; then
    fail "the program of $name needs the shared library"
  fi
done
