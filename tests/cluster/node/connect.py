#!/usr/bin/env python3
"""connect.py SOCKET HOST:PORT=HOST:PORT…: answers HTTP CONNECT on a Unix socket, for those addresses only, at others' place.

The API server's egress selector speaks it: kubelet is in a VM whose network is none of this machine's."""

import os
import socket
import sys
import threading


def pump(source, sink):
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def serve(near, places):
    try:
        head = b""
        while b"\r\n\r\n" not in head:
            data = near.recv(4096)
            if not data:
                return
            head += data
        word, target, *_ = head.split(b" ")
        place = places.get(target.decode())
        if word != b"CONNECT" or place is None:
            near.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")
            return
        host, port = place.rsplit(":", 1)
        far = socket.create_connection((host, int(port)))
        near.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        back = threading.Thread(target=pump, args=(far, near), daemon=True)
        back.start()
        pump(near, far)
        back.join()
        far.close()
    except OSError as e:
        print(e, flush=True)
    finally:
        near.close()


def main():
    path, places = sys.argv[1], dict(p.split("=") for p in sys.argv[2:])
    if os.path.exists(path):
        os.unlink(path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        while True:
            threading.Thread(target=serve, args=(listener.accept()[0], places), daemon=True).start()


main()
