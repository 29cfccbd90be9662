"""A real Prometheus for tests, with the settings and alerts that are shipped, on a loopback address; and a small libvirt
exporter, which knows whose a domain is.

    with Exporter(text) as exporter, Prometheus(folder, hostagent=ADDRESS, libvirt=exporter.address) as prometheus:
        prometheus.query("up")
"""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import yaml

from tests import promql

WAIT = 60.0
"""Seconds for what takes one or two, also on a machine that is busy."""
INTERVAL = "500ms"

Sample = tuple[dict[str, str], float]


class Prometheus:
    """`targets` are addresses, by the names of the jobs in the settings that are shipped."""

    def __init__(self, folder: Path, **targets: str) -> None:
        self._folder = folder
        settings = yaml.safe_load(promql.SCRAPE.read_text())
        assert {job["job_name"] for job in settings["scrape_configs"]} == set(targets)
        for job in settings["scrape_configs"]:
            job["scrape_interval"] = INTERVAL
            job["static_configs"][0]["targets"] = [targets[job["job_name"]]]
        settings["global"] = {"scrape_interval": INTERVAL, "evaluation_interval": INTERVAL}
        settings["rule_files"] = [str(promql.RULES.parent / name) for name in settings["rule_files"]]
        folder.mkdir()
        (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
        self._log = folder / "log"

    def __enter__(self) -> Prometheus:
        command = [promql.program("prometheus"), f"--config.file={self._folder}/prometheus.yml"]
        command += [f"--storage.tsdb.path={self._folder}/data", "--web.listen-address=127.0.0.1:0"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            found = self.until(lambda: re.search(r'"Listening on" address=(127\.0\.0\.1:\d+)', self._log.read_text()))
            self.address = found[1]
            self.until(lambda: "Server is ready" in self._log.read_text())
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._process.kill()
        self._process.wait(WAIT)

    def query(self, expr: str) -> list[Sample]:
        """What it answers for this moment; a query that it refuses is an error."""
        found = self.ask("/api/v1/query", query=expr)
        if found["resultType"] == "scalar":
            return [({}, float(found["result"][1]))]
        return [(each["metric"], float(each["value"][1])) for each in found["result"]]

    def ask(self, path: str, **parameters: str) -> Any:
        connection = http.client.HTTPConnection(self.address, timeout=WAIT)
        try:
            connection.request("GET", f"{path}?{urlencode(parameters)}")
            answer = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]

    def until(self, found: Callable[[], Any]) -> Any:
        """What `found` returns when it is true."""
        end = time.monotonic() + WAIT
        while not (what := found()):
            assert self._process.poll() is None and time.monotonic() < end, self._log.read_text()[-3000:]
            time.sleep(0.1)
        return what


class Exporter:
    """Answers every scrape with `text`."""

    def __init__(self, text: str) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("content-type", "text/plain; version=0.0.4")
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Exporter:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
