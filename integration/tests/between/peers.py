"""Two who talk over TCP and UDP without pause: `serve PORT`, or `call PORT ADDRESS...`, which says "at N" when each of its
connections has come so far, and "FAIL ..." once something is not as it should be."""
import os, socket, struct, sys, threading, time

port = int(sys.argv[2])

def fail(text):
    print("FAIL", text, flush=True)
    os._exit(1)

def whole(connection, count):
    data = b""
    while len(data) < count:
        piece = connection.recv(count - len(data))
        if not piece:
            raise Exception("the connection ended")
        data += piece
    return data

def answer(connection):
    try:
        while True:
            head = whole(connection, 4)
            connection.sendall(head + whole(connection, struct.unpack(">I", head)[0]))
    except Exception as error:
        fail("served: %r" % error)

def serve():
    streams = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    streams.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    streams.bind(("::", port))
    streams.listen(16)
    datagrams = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    datagrams.bind(("::", port))
    def echo():
        while True:
            data, sender = datagrams.recvfrom(2000)
            datagrams.sendto(data, sender)
    threading.Thread(target=echo, daemon=True).start()
    print("ready", flush=True)
    while True:
        threading.Thread(target=answer, args=(streams.accept()[0],), daemon=True).start()

counts = []

def stream(at, address, size):
    try:
        connection = socket.create_connection((address, port), timeout=30)
        while True:
            block = struct.pack(">Q", counts[at]) * (size // 8)
            connection.sendall(struct.pack(">I", len(block)) + block)
            if whole(connection, 4 + len(block))[4:] != block:
                raise Exception("other bytes came back")
            counts[at] += 1
            time.sleep(0.002)
    except Exception as error:
        fail("%s, %d bytes: %r after %d" % (address, size, error, counts[at]))

def datagrams(at, address):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    it = socket.socket(family, socket.SOCK_DGRAM)
    it.settimeout(0.2)
    tries = 0
    while True:
        tries += 1
        it.sendto(struct.pack(">Q", counts[at]), (address, port))
        try:
            while struct.unpack(">Q", it.recv(100))[0] != counts[at]:
                pass
            counts[at] += 1
            tries = 0
            time.sleep(0.002)
        except socket.timeout:
            if tries > 100:
                fail("%s: no datagram came back" % address)

def call(addresses):
    for address in addresses:
        for run, more in [(stream, (8,)), (stream, (200_000,)), (datagrams, ())]:
            counts.append(0)
            threading.Thread(target=run, args=(len(counts) - 1, address) + more, daemon=True).start()
    last = -1
    while True:
        now = min(counts)
        if now > last:
            print("at", now, flush=True)
            last = now
        time.sleep(0.05)

if sys.argv[1] == "serve":
    serve()
else:
    call(sys.argv[3:])
