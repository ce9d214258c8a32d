#!/usr/bin/env python3
"""client.py ask N HOST:PORT…: N connections to each; prints who answered how often, as JSON.
client.py load FILE HOST:PORT…: one connection after another to each in turn until FILE is there; prints the sum as JSON."""

import collections
import json
import os
import socket
import sys
import time


def ask(host, port):
    try:
        with socket.create_connection((host, port), timeout=15) as s:
            s.sendall(b"GET / HTTP/1.0\r\n\r\n")
            answer = b""
            while data := s.recv(4096):
                answer += data
        head, _, body = answer.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.0 200"):
            return None, f"half an answer: {answer[:80]!r}"
        return body.decode().strip(), None
    except OSError as e:
        return None, f"{type(e).__name__}: {e}"


def main():
    what, how = sys.argv[1:3]
    places = [(h, int(p)) for h, p in (t.rsplit(":", 1) for t in sys.argv[3:])]
    answers, errors = collections.Counter(), []
    turn = 0
    while turn < int(how) if what == "ask" else not os.path.exists(how):
        turn += 1
        for host, port in places:
            body, error = ask(host, port)
            if error:
                errors.append(f"{time.strftime('%T')} {host}:{port} {error}")
            else:
                answers[body] += 1
        if what == "load":
            time.sleep(0.02)
    print(json.dumps({"answers": answers, "errors": len(errors), "first": errors[:5]}))


main()
