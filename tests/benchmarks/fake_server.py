"""Stands for `python -m serve.main`: answers have as many tokens as `TOKENS` says, one every `STEP` seconds.

python -m tests.benchmarks.fake_server --port 0 --fail refuse
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from serve.start_clock import ALL_COMPILED, REST_FAILED

STEP = 0.002
TOKENS = {"short": 2, "long": 6}
LOG = "FAKE_SERVER_LOG"
"""Environment variable: a file to which each server adds its process and its arguments."""
COMPILING_SECONDS = 0.3
"""That a server still reads steps when it is up."""
FAILURES = ("never", "start", "rest", "refuse", "break", "error", "empty")


class Server(ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    options: argparse.Namespace
    compiled = False
    bodies: list[dict[str, Any]]

    def log_message(self, format: str, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/health":
            self._json(200, {})
        elif self.path == "/v1/emoe/state":
            policy = {"policy": self.options.scheduling_policy}
            self._json(200, {"scheduler": policy, "bodies": self.bodies, "compiled": self.compiled})
        else:
            self._json(404, {"error": {"message": "nothing here"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.bodies.append(body)
        fail = self.options.fail if len(self.bodies) > self.options.after else "never"
        if fail == "refuse":
            return self._json(503, {"error": {"message": "the queue\nis full"}})
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        tokens = body["max_completion_tokens"] if body.get("ignore_eos") else TOKENS[body["emoe"]["task"]]
        for _ in range(0 if fail == "empty" else tokens):
            time.sleep(STEP)
            self._event({"choices": [{"index": 0, "delta": {"content": "a"}, "token_ids": [7]}]})
            if fail == "break":
                self.close_connection = True
                return None
            if fail == "error":
                self._event({"error": {"message": "the step failed"}})
        self._chunk(b"data: [DONE]\n\n")
        return self._chunk(b"")

    def _json(self, status: int, value: dict[str, Any]) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _event(self, value: dict[str, Any]) -> None:
        self._chunk(b"data: " + json.dumps(value).encode() + b"\n\n")

    def _chunk(self, content: bytes) -> None:
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")


def finish_compiling() -> None:
    if Handler.options.fail == "rest":
        print(f"{REST_FAILED}\nOSError: no such chore", flush=True)
        return
    Handler.compiled = True
    print(ALL_COMPILED, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--scheduling-policy", default="slo")
    parser.add_argument("--fail", choices=FAILURES, default="never")
    parser.add_argument("--after", type=int, default=0, help="requests that are answered before")
    options, _ = parser.parse_known_args()
    if LOG in os.environ:
        with Path(os.environ[LOG]).open("a") as log:
            log.write(json.dumps([os.getpid(), sys.argv[1:]]) + "\n")
    if options.fail == "start":
        print("loading", flush=True)
        sys.exit("error: no such model")
    Handler.options, Handler.bodies = options, []
    server = Server(("127.0.0.1", options.port), Handler)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    print(f"Serving on http://127.0.0.1:{server.server_port}", flush=True)
    threading.Timer(COMPILING_SECONDS, finish_compiling).start()
    server.serve_forever()


if __name__ == "__main__":
    main()
