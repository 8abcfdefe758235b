#!/bin/bash
# Chromium without a head, driven by its DevTools protocol.
. "$(dirname "$0")/lib.sh"
title="Chromium, headless"
packages=(chromium socat python3-websocket)
did="a page with timers and a canvas; the DevTools client evaluates, draws and checks"
port=9223

version() { dpkg-query -W -f '${Version}' chromium; }

serve() {
    export HOME=/tmp
    socat TCP-LISTEN:9223,fork,reuseaddr TCP:127.0.0.1:9222 &
    exec chromium --headless --no-sandbox --disable-gpu --remote-debugging-port=9222 --remote-allow-origins='*' \
        --user-data-dir=/tmp/profile 'data:text/html,<canvas id=c></canvas><script>var n=0;setInterval(()=>n++,10)</script>'
}

client() {
    exec python3 - <<'END'
import json, time, urllib.request, websocket
from asking import *
page = None
for attempt in range(600):
    try:
        pages = json.load(urllib.request.urlopen(f"http://{ADDRESS}:9223/json", timeout=50))
        page = next(one for one in pages if one["type"] == "page")
        break
    except (OSError, StopIteration):
        time.sleep(0.1)
one = websocket.create_connection(page["webSocketDebuggerUrl"].replace("9222", "9223"), timeout=50)
count = 0

def evaluate(text):
    global count
    count += 1
    one.send(json.dumps({"id": count, "method": "Runtime.evaluate", "params": {"expression": text}}))
    while (answer := json.loads(one.recv())).get("id") != count:
        pass
    return answer["result"]["result"]["value"]

last = -1
while not stopped():
    expect(7 * count, evaluate(f"7*{count}"))
    expect("data:image/png", evaluate(f"var x=c.getContext('2d');x.fillRect({count % 100},0,5,5);c.toDataURL().slice(0,14)"))
    # The page's own timer goes on, and never backwards.
    while (now := evaluate("n")) <= last:
        expect(last, now)
    last = now
    answered()
END
}

workload "$@"
