# What run.sh of vLLM and of SGLang have in common. They source it and call `run_in_engine "$@"`, having set
#   here     their folder
#   wanted   what the environment is made from: its stamp
#   short    pytest's options for --short
# and having defined
#   install  puts the engine into the environment, with `pip`
#   settings exports what the engine's processes need
root=$(cd "$here/../../.." && pwd)
folder=${FLASHPREFILL_ENGINES:-$root/build/engines}/$(basename "$here")
ours=$root/build/engine-tests/$(basename "$here")
python=$folder/venv/bin/python

pip() { $python -m pip "$@" --quiet --disable-pip-version-check; }

# The engine, if it is not there. The stamp holds what it was made from. One set-up at a time.
set_up() {
  mkdir -p "$folder" "$ours"
  exec 9> "$folder/lock"
  flock 9
  if [ "$(cat "$folder/venv/made-from" 2> /dev/null)" != "$wanted" ]; then
    rm -rf "$folder/venv"
    "${PYTHON:-python3}" -m venv "$folder/venv"
    install
    echo "$wanted" > "$folder/venv/made-from"
  fi
  exec 9>&-
}

# The wheel of `make install`, whose build folder it shares.
install_ours() {
  [ -x "$root/.venv/bin/pip" ] || { echo "first: make install" >&2; exit 1; }
  rm -rf "$ours/wheel" "$ours/site"
  "$root/.venv/bin/pip" wheel --quiet --no-build-isolation --no-deps --config-settings=build-dir="$root/build/wheel" \
    --wheel-dir "$ours/wheel" "$root"
  pip install --no-deps --target "$ours/site" "$ours"/wheel/*.whl
}

run_in_engine() {
  local few=()
  if [ "${1:-}" = --short ]; then
    few=("${short[@]}")
    shift
  fi
  set_up
  [ "${1:-}" != --setup ] || exit 0
  install_ours
  export FLASHPREFILL_MODELS=$folder/models PYTHONPATH=$here:$root/tests/engines/common:$ours/site
  settings
  if [ "${1:-}" = --python ]; then
    shift
    exec "$python" "$@"
  fi
  cd "$here"
  exec "$python" -m pytest -p no:cacheprovider --rootdir "$here" -ra "${few[@]}" "$@"
}
