"""A relay between a client and the server that passes every byte on unchanged and keeps a copy, to be read as HTTP afterwards.

The client talks to the real server; what was said can then be asserted: statuses, request bodies, WebSocket messages.
"""

import bisect
import http.client
import io
import json
import socket
import threading
import time
import zlib
from dataclasses import dataclass, field


@dataclass
class Exchange:
    """One HTTP request and its answer; for a WebSocket also the JSON messages of both sides."""

    time: float
    method: str
    path: str
    headers: dict
    body: bytes
    status: int | None
    answer: bytes
    sent: list = field(default_factory=list)
    received: list = field(default_factory=list)

    @property
    def json(self):
        """The request's body."""
        return json.loads(self.body)

    @property
    def events(self):
        """The answer's server-sent events, those in JSON."""
        lines = self.answer.decode().splitlines()
        data = [line[5:].strip() for line in lines if line.startswith("data:")]
        return [json.loads(text) for text in data if text != "[DONE]"]


class Copy:
    """The bytes of one direction, and when they came."""

    def __init__(self):
        self.data = bytearray()
        self._ends, self._times = [], []

    def add(self, data):
        """Appends what came just now."""
        self.data += data
        self._ends.append(len(self.data))
        self._times.append(time.monotonic())

    def time(self, offset):
        """When the byte at this offset came."""
        return self._times[bisect.bisect_right(self._ends, offset)]


class Tap:
    """Listens on a free port of loopback and relays to `port`."""

    def __init__(self, port):
        self._target = port
        self._connections = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        """Stops listening."""
        self._listener.close()

    def exchanges(self):
        """What was said so far, in the order in which the requests came."""
        found = [exchange for sent, received in self._connections for exchange in read(sent, received)]
        return sorted(found, key=lambda exchange: exchange.time)

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target))
            copies = (Copy(), Copy())
            self._connections.append(copies)
            for source, sink, copy in ((client, server, copies[0]), (server, client, copies[1])):
                threading.Thread(target=relay, args=(source, sink, copy), daemon=True).start()


def relay(source, sink, copy):
    """Passes bytes on until one side ends; then ends the other, so that a disconnect is seen at once."""
    try:
        while data := source.recv(65536):
            copy.add(data)
            sink.sendall(data)
    except OSError:
        pass
    for each in (source, sink):
        try:
            each.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


def read(copy, answers):
    """The exchanges of one connection, from what was copied in each direction."""
    sent, received, exchanges = io.BytesIO(bytes(copy.data)), io.BytesIO(bytes(answers.data)), []
    while True:
        begin, line = sent.tell(), sent.readline()
        if not line:
            return exchanges
        method, path, _ = line.decode().split(" ", 2)
        headers = read_headers(sent)
        body = read_body(sent, headers, b"")
        status, answer, answered = None, b"", {}
        while status is None or status == 100:
            start = received.readline()
            if not start:
                status = None
                break
            status, answered = int(start.split()[1]), read_headers(received)
        exchange = Exchange(copy.time(begin), method, path, headers, body, status, answer)
        exchanges.append(exchange)
        if status == 101:
            exchange.sent, exchange.received = messages(sent.read()), messages(received.read())
        elif status not in (None, 204, 304) and method != "HEAD":
            exchange.answer = read_body(received, answered, None)


def read_headers(stream):
    """Header names in lower case, with their values."""
    return {name.lower(): value for name, value in http.client.parse_headers(stream).items()}


def read_body(stream, headers, unsized):
    """A body as its headers measure it; without a measure it is `unsized`, or if that is None, all that is left."""
    if "chunked" in headers.get("transfer-encoding", ""):
        body = b""
        while size := int(stream.readline().split(b";")[0].strip() or b"0", 16):
            body += stream.read(size)
            stream.readline()
        stream.readline()
        return body
    if "content-length" in headers:
        return stream.read(int(headers["content-length"]))
    return stream.read() if unsized is None else unsized


def messages(data):
    """The text messages in one direction of a WebSocket, as JSON; a frame cut off at the end is left out."""
    inflate, found, message, packed = zlib.decompressobj(-zlib.MAX_WBITS), [], b"", False
    while len(data) >= 2:
        final, opcode, masked, length, at = data[0] & 128, data[0] & 15, data[1] & 128, data[1] & 127, 2
        if length > 125:
            at += 2 if length == 126 else 8
            length = int.from_bytes(data[2:at], "big")
        mask = data[at : at + 4] if masked else bytes(4)
        at += 4 if masked else 0
        payload = data[at : at + length]
        if len(payload) < length:
            break
        if opcode == 1:
            message, packed = b"", bool(data[0] & 64)
        if opcode in (0, 1):
            message += unmask(payload, mask)
            if final:
                # permessage-deflate leaves off the empty block that ends each message.
                found.append(json.loads(inflate.decompress(message + b"\0\0\xff\xff") if packed else message))
        data = data[at + length :]
    return found


def unmask(payload, mask):
    """The payload without the mask that a client puts on it."""
    size = len(payload)
    repeated = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(payload, "big") ^ int.from_bytes(repeated, "big")).to_bytes(size, "big")
