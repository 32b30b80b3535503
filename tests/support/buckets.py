"""A server with the protocol of S3 on this machine, and a proxy before it that fails as networks do."""

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest
import requests
from moto.server import ThreadedMotoServer

from seitpp.store.bucket import Bucket

BUCKET = "bucket"
# What a proxy does with a request: None, 500, "cut" in the middle of the answer, seconds of waiting, or another
# answer made of the real one.
Fault = int | str | float | Callable[[bytes], bytes] | None


@contextmanager
def served(patch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve an empty bucket, whose address and credentials are in the environment; yield its address."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    point_to(f"http://{host}:{port}", patch)
    requests.post(
        f"http://{host}:{port}/moto-api/reset", timeout=60
    )  # servers of one process share what they have
    boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1").create_bucket(Bucket=BUCKET)
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def upload(folder: Path, url: str) -> None:
    """Copy the files of a folder into a bucket."""
    for path in folder.rglob("*"):
        if path.is_file():
            Bucket(url).put(path.relative_to(folder).as_posix(), path)


def point_to(address: str, patch: pytest.MonkeyPatch) -> None:
    """Let the environment name a server."""
    settings = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
    for name, value in {**settings, "AWS_ENDPOINT_URL": address, "AWS_ALLOW_HTTP": "true"}.items():
        patch.setenv(name, value)


@contextmanager
def failing(address: str, fault: Callable[[str, str], Fault]) -> Iterator[tuple[str, list[str]]]:
    """Serve what the server at `address` does but for the faults of requests (method, path).

    Yields the address of the proxy, and a list that gets each request.
    """
    host, port = address.removeprefix("http://").split(":")
    seen: list[str] = []

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            seen.append(f"{self.command} {self.path}")
            what = fault(self.command, self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if what == 500:
                self.send_response(500)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if isinstance(what, float):
                time.sleep(what)
            upstream = http.client.HTTPConnection(host, int(port), timeout=60)
            upstream.request(self.command, self.path, body, dict(self.headers))
            answer = upstream.getresponse()
            content = answer.read()
            if callable(what):
                content = what(content)
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else len(content)
            self.send_header("Content-Length", str(length or 0))
            self.end_headers()
            if what == "cut":
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()
                return
            self.wfile.write(content)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = forward

        def log_message(self, *_: object) -> None:
            pass

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except (OSError, ValueError):
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.shutdown()
