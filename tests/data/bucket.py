"""A bucket on this machine, behind a line that can be slow, cut off or silent."""

import os
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pyarrow.fs import FileSystem, LocalFileSystem, copy_files

from tests.processes import LIMIT_S

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "AWS_EC2_METADATA_DISABLED": "true",
}
BLOCK_BYTES = 1 << 16


class Server(NamedTuple):
    """A running server."""

    port: int
    process: subprocess.Popen

    def url(self, bucket: str, port: int | None = None) -> str:
        return f"s3://{bucket}/features?{query(port or self.port)}"

    def upload(self, folder: Path, bucket: str) -> None:
        system, path = FileSystem.from_uri(f"{self.url(bucket)}&allow_bucket_creation=true")
        system.create_dir(bucket)
        copy_files(str(folder), path, source_filesystem=LocalFileSystem(), destination_filesystem=system)


def query(port: int) -> str:
    return f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"


@contextmanager
def serve() -> Iterator[Server]:
    """moto's server, which speaks S3."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=os.environ | CREDENTIALS
    )
    try:
        end = time.monotonic() + LIMIT_S
        while not answers(port):
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.1)
        yield Server(port, process)
    finally:
        process.kill()
        process.wait()


def answers(port: int) -> bool:
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", port)) == 0


class Line(socketserver.ThreadingTCPServer):
    """Passes on what a server answers.

    Args:
        port: of the server.
        bytes_before: that an answer may have before something happens to it.
        what: happens then: "slow", 50 ms for each 64 KiB; "cut", the line is; "silent", nothing comes any more.
        times: as often as that happens, until all goes well.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int, what: str = "slow", bytes_before: int = 1 << 62, times: int = 1 << 62) -> None:
        super().__init__(("127.0.0.1", 0), Passage)
        self.to, self.what, self.bytes_before, self.times = port, what, bytes_before, times
        self.happened, self.over = threading.Event(), threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def port(self) -> int:
        return self.server_address[1]

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()


class Passage(socketserver.BaseRequestHandler):
    """A connection through a `Line`."""

    def handle(self) -> None:
        if not answers(self.server.to):
            return
        with socket.create_connection(("127.0.0.1", self.server.to)) as server:
            threading.Thread(target=self.ask, args=(server,), daemon=True).start()
            passed = 0
            while block := self.receive(server):
                passed += len(block)
                if passed > self.server.bytes_before and self.server.times > 0:
                    self.server.happened.set()
                    if self.server.what == "slow":
                        time.sleep(0.05)
                    else:
                        self.server.times -= 1
                        if self.server.what == "silent":
                            self.server.over.wait()
                        return
                self.send(block)

    def ask(self, server: socket.socket) -> None:
        while block := self.receive(self.request):
            server.sendall(block)

    def receive(self, connection: socket.socket) -> bytes:
        try:
            return connection.recv(BLOCK_BYTES)
        except OSError:
            return b""

    def send(self, block: bytes) -> None:
        try:
            self.request.sendall(block)
        except OSError:
            self.server.happened.set()
