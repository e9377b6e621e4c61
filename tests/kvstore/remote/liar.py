"""A server that says what it is told to, whatever it was asked."""

import socket
import threading
from contextlib import suppress


class Liar:
    """Answers the first command of each connection's life honestly with 0, until `lies` is set.

    A lie is bytes, or a function of the connection. Then the connection is closed.

    Args:
        place: path of the socket to listen on.
    """

    def __init__(self, place):
        self.lie = None
        self.sent = 0
        self.over = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(place))
        self._listener.listen()
        self._threads = [threading.Thread(target=self._listen, daemon=True)]
        self._threads[0].start()

    def close(self):
        self.over.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def say(self, conn, data):
        conn.sendall(data)
        self.sent += len(data)

    def _listen(self):
        with suppress(OSError):
            while True:
                conn, _ = self._listener.accept()
                self._threads.append(
                    threading.Thread(target=self._serve, args=(conn,), daemon=True)
                )
                self._threads[-1].start()

    def _serve(self, conn):
        with conn, suppress(OSError):
            conn.settimeout(10)
            while request := conn.recv(1 << 16):
                if self.lie is None or b"GETRANGE" not in request:
                    there = self.lie is not None
                    conn.sendall(b":%d\r\n" % there * request.count(b"EXISTS"))
                    continue
                if callable(self.lie):
                    self.lie(self, conn)
                else:
                    self.say(conn, self.lie)
                return


def silence(liar, conn):
    """Says a little and keeps the line."""
    liar.say(conn, b"$100\r\nabc")
    liar.over.wait(10)


def trickle(liar, conn):
    """Always says one byte more, in time for whoever waits for bytes and not for an answer."""
    liar.say(conn, b"$10000\r\n")
    while not liar.over.wait(0.02):
        liar.say(conn, b"x")


def torrent(liar, conn):
    """Says what never ends."""
    while True:
        liar.say(conn, b"x" * (1 << 16))


LIES = {
    "nothing": b"",
    "nonsense": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "no_type": b"\r\n\r\n",
    "half_a_line": b"$10",
    "half_a_value": b"$100\r\nabc",
    "too_short_a_head": b"$3\r\nabcdefgh\r\n" * 2,
    "huge": b"$99999999999\r\n" + b"x" * 4096,
    "too_many_digits": b"$" + b"9" * 100 + b"\r\n",
    "negative": b"$-5\r\n",
    "no_number": b"$abc\r\n",
    "array": b"*1\r\n$1\r\nx\r\n",
    "integer": b":1\r\n",
    "error": b"-ERR unknown command\r\n",
    "moved": b"-MOVED 3999 127.0.0.1:6381\r\n",
    "not_ascii": b"-\xff\xfe\x00\r\n",
    "random_value": b"$300\r\n" + bytes(range(256)) + b"x" * 44 + b"\r\n",
    "empty_value": b"$0\r\n\r\n",
    "silence": silence,
    "trickle": trickle,
    "torrent": torrent,
}
