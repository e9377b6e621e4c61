"""A door with TLS in front of a server's socket, and the certificate to trust it by."""

import socket
import ssl
import threading
from contextlib import contextmanager, suppress

import trustme


def _pump(source, target):
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def _serve(conn, context, path):
    with (
        suppress(OSError),
        context.wrap_socket(conn, server_side=True) as outer,
        socket.socket(socket.AF_UNIX) as inner,
    ):
        inner.connect(str(path))
        back = threading.Thread(target=_pump, args=(inner, outer))
        back.start()
        _pump(outer, inner)
        back.join()


@contextmanager
def door(path, pem):
    """The port of a door to the socket at `path`; who signed for it is then in the file `pem`."""
    context, signer = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), trustme.CA()
    signer.issue_cert("localhost").configure_cert(context)
    signer.cert_pem.write_to_path(pem)
    threads = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def listen():
            with suppress(OSError):
                while True:
                    conn, _ = listener.accept()
                    threads.append(threading.Thread(target=_serve, args=(conn, context, path)))
                    threads[-1].start()

        threads.append(threading.Thread(target=listen))
        threads[0].start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(10)
