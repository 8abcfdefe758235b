#!/bin/bash
. "$(dirname "$0")/lib.sh"
title="memcached"
packages=(memcached)
did="four threads; five connections set and get values of 50 kB"
port=11211

version() { memcached --version | sed 's/memcached //'; }

serve() { exec memcached -u nobody -l 0.0.0.0 -t 4 -m 128; }

client() {
    exec python3 - <<'END'
import socket
from asking import *

def work(number, going):
    one = socket.create_connection((ADDRESS, 11211), 50)
    answers, count = one.makefile("rb"), 0
    while going():
        count += 1
        key, value = f"{number}-{count % 100}", f"{number}-{count} ".encode() * 6000
        one.sendall(f"set {key} 0 0 {len(value)}\r\n".encode() + value + b"\r\n")
        expect(b"STORED\r\n", answers.readline())
        one.sendall(f"get {key}\r\n".encode())
        expect(f"VALUE {key} 0 {len(value)}\r\n".encode(), answers.readline())
        expect(value + b"\r\nEND\r\n", answers.read(len(value) + 7))
        answered()

together(5, work)
END
}

workload "$@"
