"""An HTTP proxy on loopback in front of one server, that spoils one answer in `every`: drops, delays or cuts it."""

import http.client
import itertools
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("drop", "delay", "truncate")
_NOT_PASSED_ON = {"connection", "transfer-encoding", "content-length", "keep-alive"}


class FlakyProxy:
    """Runs on a thread of its own between `with` and its end; `spoilt` counts what was done to answers."""

    def __init__(self, server_port: int, every: int = 50, delay: float = 5.0):
        self.spoilt = {fault: 0 for fault in FAULTS}
        self.answers = 0
        numbers, lock = itertools.count(1), threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                server = http.client.HTTPConnection("127.0.0.1", server_port, timeout=60)
                server.request(self.command, self.path, body, dict(self.headers))
                answer = server.getresponse()
                content = answer.read()
                server.close()
                with lock:
                    number = next(numbers)
                    proxy.answers = number
                    fault = FAULTS[number // every % len(FAULTS)] if number % every == 0 else ""
                    if fault:
                        proxy.spoilt[fault] += 1
                if fault == "drop":
                    self.close_connection = True
                    return
                if fault == "delay":
                    time.sleep(delay)
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in _NOT_PASSED_ON:
                        self.send_header(name, value)
                # the answer to HEAD says how long the body would be
                size = answer.getheader("Content-Length") if self.command == "HEAD" else None
                self.send_header("Content-Length", size or str(len(content)))
                self.end_headers()
                if fault == "truncate":
                    content = content[: len(content) // 2]
                    self.close_connection = True
                self.wfile.write(content)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

            def log_message(self, *arguments: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *arguments: Any) -> None:
                pass  # a client that waited no longer

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]

    def __enter__(self) -> "FlakyProxy":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *arguments: object) -> None:
        self._server.shutdown()
        self._server.server_close()
