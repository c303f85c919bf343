#!/usr/bin/env bash
# README and docs/ as a site in build/site, by Sphinx in an environment of its own. Warnings are errors: a link to a page,
# a heading or a file that is not there fails. Extra arguments go to sphinx-build (-b linkcheck: links to other sites too).
set -euo pipefail
cd "$(dirname "$0")/.."
environment=build/docs-env
if [ "$(cat $environment/.made-from 2> /dev/null)" != "$(sha256sum < tools/requirements-docs.txt)" ]; then
  "${PYTHON:-python3}" -m venv $environment
  $environment/bin/pip install --quiet --disable-pip-version-check --requirement tools/requirements-docs.txt
  sha256sum < tools/requirements-docs.txt > $environment/.made-from
fi
$environment/bin/sphinx-build --quiet --fail-on-warning --keep-going -c tools/site -d build/docs-cache "$@" . build/site
echo "docs: build/site/index.html"
