"""llama.cpp's own programs as processes: how they find the plugin, and its server."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import threading
import time
import urllib.request
from pathlib import Path

from engine import LIBRARIES, MODELS

LOADED = "loaded FlashPrefill backend"
LOOK_FOR_PLUGINS = ["-ot", "^$=CPU"]  # what a program needs whose own backends are linked in


def environment(plugin: Path | None, config: Path | None = None) -> dict[str, str]:
    changed = {
        k: v for k, v in os.environ.items() if k not in ("GGML_BACKEND_PATH", "FLASHPREFILL_GGML_CONFIG")
    }
    if plugin:
        changed["GGML_BACKEND_PATH"] = str(plugin)
    if config:
        changed["FLASHPREFILL_GGML_CONFIG"] = str(config)
    return changed


def dense_config(folder: Path) -> Path:
    config = folder / "dense.conf"
    config.write_text("# every block\npolicy = dense\n")
    return config


def config_of(folder: Path, options: str) -> Path:
    config = folder / "options.conf"
    config.write_text(options)
    return config


class Server:
    """llama-server with three slots, on SmolLM2 or another model. `more`: options that may replace these."""

    def __init__(
        self,
        plugin: Path | None,
        config: Path | None,
        *more: str,
        model: str = MODELS["f32"],
        slots: int = 3,
    ) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        command = [LIBRARIES / "llama-server", "-m", model, "-c", "4096", "-np", str(slots), "-ub", "200"]
        command += ["--port", str(self.port), "--host", "127.0.0.1", "-lv", "4", "--no-warmup"]
        command += [*LOOK_FOR_PLUGINS, *more]
        self.process = subprocess.Popen(
            command,
            env=environment(plugin, config),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self.log = ""
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        for _ in range(1200):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
                return
            except OSError:
                assert self.process.poll() is None, self.log[-2000:]
                time.sleep(0.1)
        raise TimeoutError(self.log[-2000:])

    def _read(self) -> None:
        for line in self.process.stdout:
            self.log += line

    def open(self, path: str, body: dict, timeout: float = 600) -> http.client.HTTPResponse:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=timeout)

    def ask(self, path: str, body: dict, timeout: float = 600) -> dict:
        with self.open(path, body, timeout) as response:
            return json.loads(response.read())

    def complete(self, prompt: str | list[int], timeout: float = 600) -> dict:
        body = {"prompt": prompt, "n_predict": 12, "temperature": 0, "cache_prompt": True}
        return self.ask("completion", body, timeout)

    def close(self) -> str:
        self.process.terminate()
        self.process.wait(60)
        self.reader.join(10)
        return self.log
