"""Messages between the learner and a rollout process, over a pair of sockets.

Each message is a pickled object behind its length. The learner's end never blocks: a rollout process that was stopped
in the middle of a message, or reads nothing, holds up nobody. The process's own end blocks, in threads of its own.
"""

from __future__ import annotations

import pickle
import select
import socket
import struct
import threading
from typing import Any

_LENGTH = struct.Struct("<Q")
_PIECE_BYTES = 1 << 20


def encode(message: Any) -> bytes:
    """A message as it is sent."""
    payload = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(payload)) + payload


class _Reader:
    """Puts messages together from what has arrived of them."""

    def __init__(self) -> None:
        self._received = bytearray()

    def add(self, piece: bytes) -> list[Any]:
        """The messages that ``piece`` completes."""
        self._received += piece
        messages, start = [], 0
        while len(self._received) - start >= _LENGTH.size:
            begin = start + _LENGTH.size
            end = begin + _LENGTH.unpack_from(self._received, start)[0]
            if len(self._received) < end:
                break
            messages.append(pickle.loads(memoryview(self._received)[begin:end]))
            start = end
        del self._received[:start]
        return messages


class Channel:
    """The learner's end."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.is_ended = False
        """The other side has closed, or is dead."""
        self._reader = _Reader()
        self._unsent = bytearray()

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent) and not self.is_ended

    def send(self, encoded: bytes) -> None:
        """Send what :func:`encode` returned; what the other side does not take now waits for :meth:`flush`."""
        self._unsent += encoded
        self.flush()

    def flush(self) -> None:
        """Send what has waited, as far as the other side takes it."""
        try:
            while self.has_unsent:
                del self._unsent[: self.socket.send(memoryview(self._unsent)[:_PIECE_BYTES])]
        except BlockingIOError:
            pass
        except OSError:
            self.is_ended = True

    def receive(self) -> list[Any]:
        """All messages that are there in whole; does not wait."""
        messages = []
        while not self.is_ended:
            try:
                piece = self.socket.recv(_PIECE_BYTES)
            except BlockingIOError:
                break
            except OSError:
                piece = b""
            self.is_ended = not piece
            messages += self._reader.add(piece)
        return messages

    def close(self) -> None:
        self.is_ended = True
        self.socket.close()


class WorkerChannel:
    """The rollout process's end: any thread sends, one receives."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        self._socket = sock
        self._reader = _Reader()
        self._sends = threading.Lock()

    def send(self, message: Any) -> None:
        """Send a message; waits until it is taken."""
        with self._sends:
            self._socket.sendall(encode(message))

    def receive(self, timeout_s: float) -> list[Any]:
        """Messages that have arrived, after ``timeout_s`` none.

        Raises:
            EOFError: the learner has closed, or is dead.
        """
        if not select.select([self._socket], [], [], timeout_s)[0]:
            return []
        try:
            piece = self._socket.recv(_PIECE_BYTES)
        except OSError:
            piece = b""
        if not piece:
            raise EOFError
        return self._reader.add(piece)
