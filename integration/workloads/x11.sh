#!/bin/bash
# A desktop: Xvfb, Openbox, xterm and x11vnc, with a viewer (RFB) connected that types and looks.
. "$(dirname "$0")/lib.sh"
title="Xvfb, Openbox, xterm, x11vnc"
packages=(xvfb openbox xterm x11vnc xfonts-base)
did="a desktop with a viewer connected: it types into the xterm and waits for the picture to change"
port=5900

version() { printf 'Xvfb %s, x11vnc %s' "$(dpkg-query -W -f '${Version}' xvfb)" "$(dpkg-query -W -f '${Version}' x11vnc)"; }

serve() {
    export DISPLAY=:1 HOME=/tmp
    install -d -m 1777 /tmp/.X11-unix
    Xvfb :1 -screen 0 640x480x24 &
    until [ -S /tmp/.X11-unix/X1 ]; do sleep 0.05; done
    openbox &
    xterm -geometry 80x24+0+0 -e sh -c 'touch /tmp/there; exec cat' &
    # What is typed before it is there goes nowhere.
    until [ -e /tmp/there ]; do sleep 0.05; done
    exec x11vnc -quiet -forever -shared -rfbport 5900 -noxdamage
}

client() {
    exec python3 - <<'END'
import socket, struct
from asking import *
one = socket.create_connection((ADDRESS, 5900), 50)
port = one.getsockname()

def take(count):
    parts = b""
    while len(parts) < count:
        part = one.recv(count - len(parts))
        if not part:
            raise SystemExit("the viewer's connection ended")
        parts += part
    return parts

take(12)
one.sendall(b"RFB 003.008\n")
expect(True, b"\x01" in take(take(1)[0]))
one.sendall(b"\x01")
expect(b"\0\0\0\0", take(4))
one.sendall(b"\x01")
width, height = struct.unpack(">HH", take(4))
expect((640, 480), (width, height))
take(16)
take(struct.unpack(">I", take(4))[0])
one.sendall(struct.pack(">BBHi", 2, 0, 1, 0))
screen = bytearray(width * height * 4)

def update(incremental):
    """The rectangles of an update, written into our picture."""
    one.sendall(struct.pack(">BBHHHH", 3, incremental, 0, 0, width, height))
    while (kind := take(1)[0]) != 0:
        expect(True, kind in (2, 3))
        if kind == 3:  # what was cut; 2 is a bell
            take(3)
            take(struct.unpack(">I", take(4))[0])
    take(1)
    for _ in range(struct.unpack(">H", take(2))[0]):
        x, y, w, h, encoding = struct.unpack(">HHHHi", take(12))
        expect(0, encoding)
        for row in range(h):
            at = ((y + row) * width + x) * 4
            screen[at:at + w * 4] = take(w * 4)

def key(symbol):
    for down in (1, 0):
        one.sendall(struct.pack(">BBHI", 4, down, 0, symbol))

def click(x, y):
    for button in (0, 1, 0):
        one.sendall(struct.pack(">BBHH", 5, button, x, y))

update(0)
click(200, 150)
count = 0
while not stopped():
    before = bytes(screen)
    count += 1
    key(ord("abcdefgh"[count % 8]) if count % 60 else 0xff0d)
    while bytes(screen) == before:
        update(1)
    answered()
expect(port, one.getsockname())
END
}

workload "$@"
