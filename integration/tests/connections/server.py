"""In the pod: port 7000 streams a counter both ways, 7001 echoes datagrams, 7002 answers one request a connection."""
import socket, struct, threading

def listener(port):
    it = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    it.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    it.bind(("::", port))
    it.listen(64)
    return it

def thread(target, *args):
    threading.Thread(target=target, args=args, daemon=True).start()

def send(connection):
    at = 0
    try:
        while True:
            connection.sendall(struct.pack(">1024Q", *range(at, at + 1024)))
            at += 1024
    except OSError:
        pass

def check(connection):
    at, rest = 0, b""
    try:
        while data := connection.recv(65536):
            rest += data
            count = len(rest) // 8
            if struct.unpack(">%dQ" % count, rest[: count * 8]) != tuple(range(at, at + count)):
                print("FAIL wrong bytes near", at, flush=True)
            at, rest = at + count, rest[count * 8 :]
    except OSError:
        pass

def streams(it):
    while True:
        connection, _ = it.accept()
        thread(send, connection)
        thread(check, connection)

def answer(connection):
    with connection:
        request = connection.recv(100)
        connection.sendall(request * 1000)

def requests(it):
    while True:
        thread(answer, it.accept()[0])

echo = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
echo.bind(("::", 7001))
thread(streams, listener(7000))
thread(requests, listener(7002))
print("ready", flush=True)
while True:
    data, peer = echo.recvfrom(2000)
    echo.sendto(data, peer)
