"""Real MLflow server on loopback, behind a proxy that can be slow, answer 500, or lose answers."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


def free_port() -> int:
    """Return a free port of the loopback address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`mlflow server` on a sqlite store, which can be started and killed repeatedly."""

    def __init__(self, folder: Path) -> None:
        """Prepare a server whose store and artifacts are in `folder`."""
        self.folder, self.port = folder, free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def store(self) -> str:
        """Tracking URI of the server's store, for reading it without the server."""
        return f"sqlite:///{self.folder / 'server.db'}"

    def start(self) -> None:
        """Start the server, and return when it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", self.store, "--workers", "1"]
        command += [
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--artifacts-destination",
            str(self.folder / "art"),
        ]
        env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        log = open(self.folder / "server.log", "ab")  # noqa: SIM115 (the process keeps it)
        self._process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        log.close()
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:  # the port is open seconds before a worker answers
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=30).close()
                return
            except OSError:
                if self._process.poll() is not None:
                    break
                time.sleep(0.2)
        raise RuntimeError(f"mlflow server did not start: see {self.folder / 'server.log'}")

    def kill(self) -> None:
        """Kill the server at once, with its workers."""
        if self._process and self._process.poll() is None:
            os.killpg(self._process.pid, 9)
            self._process.wait()


class Proxy:
    """Proxy to a port of this machine; `mode` is ok, slow, error (500) or lost (504 after the request was done)."""

    def __init__(self, target: int, delay: float = 1.0) -> None:
        """Start the proxy; `delay` is in seconds before each answer while `mode` is slow."""
        self.mode, self.requests = "ok", 0
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass(self) -> None:
                proxy.requests += 1
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if proxy.mode == "error":
                    return self._answer(500, b"{}", "application/json")
                if proxy.mode == "slow":
                    time.sleep(delay)
                connection = http.client.HTTPConnection("127.0.0.1", target, timeout=60)
                try:
                    connection.request(self.command, self.path, body, dict(self.headers))
                    answer = connection.getresponse()
                    content = answer.read()
                except OSError:
                    return self._answer(502, b"{}", "application/json")
                finally:
                    connection.close()
                if proxy.mode == "lost":
                    return self._answer(504, b"{}", "application/json")
                self._answer(answer.status, content, answer.headers.get("Content-Type", "application/json"))

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass

            def _answer(self, status: int, content: bytes, kind: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                """Log nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def uri(self) -> str:
        """Tracking URI that goes through the proxy."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()
