#!/usr/bin/env bash
# The tests of `flashprefill eval`, lm-eval included, in an environment that sees .venv's packages and adds lm-eval's.
set -euo pipefail
cd "$(dirname "$0")/.."
env=build/eval-env
site() { "$1" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])'; }
if [ ! -e $env/.made ]; then
  echo "Making $env (lm-eval and what it needs: 650 MB)"
  .venv/bin/python -m venv $env
  site .venv/bin/python > "$(site $env/bin/python)/venv.pth"
  $env/bin/pip install --quiet --disable-pip-version-check --requirement tools/requirements-eval.txt
  touch $env/.made
fi
$env/bin/python -W ignore::ResourceWarning -m pytest tests/python/test_eval.py tests/python/test_eval_lm.py "$@"
