"""Wrong options, an engine of another version, another backend: a clear message, and a working engine or
none."""

import json
import os

import pytest
from answers import Request, assert_same, tokens

from flashprefill import sglang as plugin
from flashprefill.sglang.options import VARIABLE

ASKED = [Request(tokens(500, 1), 3)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"policy": "flashprefill", "parameters": {"alpha": -1}}', "alpha"),
        ('{"alpha": 1}', "flashprefill's option is 'alpha'"),
        ("{", "FLASHPREFILL_SGLANG"),
        ("flushprefill", "flushprefill"),
        ('{"metrics_hook": "no_such_module:f"}', "no_such_module"),
    ],
)
def test_wrong_options_stop_the_engine(serve, llama, text, words):
    served = serve(llama, ASKED, {VARIABLE: text})
    assert words in served.error.splitlines()[-1]
    assert words in served.log


def test_another_version_stays_dense(serve, llama):
    stock = serve(llama, ASKED)
    ours = serve(llama, ASKED, {**plugin.config("dense"), "TEST_SGLANG_VERSION": "0.5.99"})
    assert ours.registry == [] and ours.backend == "TorchNativeAttnBackend"
    assert "this is SGLang 0.5.99, and the plugin knows 0.5.23 only; nothing is changed" in ours.log
    assert_same(stock.answers, ours.answers, 1e-9)


def test_another_backend_stays_dense(serve, llama):
    served = serve(llama, ASKED, plugin.config("dense"), attention_backend="flex_attention")
    assert "does not extend the attention backend flex_attention" in served.log


def test_a_users_hook_and_the_log(serve, llama, tmp_path):
    (tmp_path / "their_metrics.py").write_text(
        "import json, os\n"
        "def export(numbers):\n"
        "    with open(os.environ['THEIR_FILE'], 'a') as file:\n"
        "        file.write(json.dumps(numbers) + '\\n')\n"
    )
    file = tmp_path / "numbers"
    environment = {
        **plugin.config("dense", log_seconds=0, metrics_hook="their_metrics:export"),
        "TEST_PATH": str(tmp_path),
        "THEIR_FILE": str(file),
    }
    served = serve(llama, ASKED, environment)
    assert not served.error, served.error
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[-1]["sparse_rows"] == 500 == served.numbers["sparse_rows"]
    assert "flashprefill: 500 rows in 1 chunks sparse at density 1.000" in served.log
    assert "TEST_PATH" not in os.environ
