"""On the LAN: one stream and one echo over each family, and connections for one request each. Ends when stdin does and
prints a line for each, "ok ..." or "FAIL ..."."""
import socket, struct, sys, threading, time

stop = threading.Event()
said, lock = [], threading.Lock()
connected = threading.Semaphore(0)

def work(name, run, *args):
    state = {"count": 0, "longest": 0.0}
    try:
        run(state, *args)
        text = "ok %s: %d, longest pause %.0f ms" % (name, state["count"], state["longest"] * 1000)
    except Exception as error:
        connected.release()
        text = "FAIL %s: %r after %d" % (name, error, state["count"])
    with lock:
        said.append(text)

def paused(state, since):
    state["longest"] = max(state["longest"], time.time() - since)

def stream(state, address):
    connection = socket.create_connection((address, 7000), timeout=60)
    connected.release()
    def send():
        at = 0
        while not stop.is_set():
            connection.sendall(struct.pack(">256Q", *range(at, at + 256)))
            at += 256
            time.sleep(0.002)
    sender = threading.Thread(target=send)
    sender.start()
    rest, last = b"", time.time()
    while not stop.is_set():
        data = connection.recv(65536)
        if not data:
            raise Exception("the stream ended")
        paused(state, last)
        last = time.time()
        rest += data
        count = len(rest) // 8
        at = state["count"]
        if struct.unpack(">%dQ" % count, rest[: count * 8]) != tuple(range(at, at + count)):
            raise Exception("wrong bytes")
        state["count"], rest = at + count, rest[count * 8 :]
        time.sleep(0.001)
    sender.join()

def echo(state, address):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    it = socket.socket(family, socket.SOCK_DGRAM)
    it.settimeout(20)
    connected.release()
    while not stop.is_set():
        began = time.time()
        it.sendto(struct.pack(">Q", state["count"]), (address, 7001))
        if struct.unpack(">Q", it.recv(100))[0] != state["count"]:
            raise Exception("another answer")
        paused(state, began)
        state["count"] += 1
        time.sleep(0.001)

def requests(state, address):
    connected.release()
    while not stop.is_set():
        began = time.time()
        connection = socket.create_connection((address, 7002), timeout=60)
        request = b"%010d" % state["count"]
        connection.sendall(request)
        answer = b""
        while data := connection.recv(65536):
            answer += data
        connection.close()
        if answer != request * 1000:
            raise Exception("a wrong answer of %d bytes" % len(answer))
        paused(state, began)
        state["count"] += 1

threads = []
for address in sys.argv[1:]:
    for name, run in [("stream", stream), ("echo", echo)] + [("requests", requests)] * 3:
        threads.append(threading.Thread(target=work, args=("%s to %s" % (name, address), run, address)))
for thread in threads:
    thread.start()
for _ in threads:
    connected.acquire()
print("ready", flush=True)
sys.stdin.read()
stop.set()
for thread in threads:
    thread.join()
print("\n".join(sorted(said)), flush=True)
