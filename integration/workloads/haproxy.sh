#!/bin/bash
# HAProxy before two small servers in the same pod, a thread a CPU, health checks twice a second.
. "$(dirname "$0")/lib.sh"
title="HAProxy"
packages=(haproxy python3)
did="master and worker with threads, before two Python servers in the pod, with health checks; four kept-alive connections"
port=80

version() { haproxy -v | sed -n '1s/.*version \([0-9.]*\).*/\1/p'; }

serve() {
    mkdir -p /run/haproxy /var/lib/haproxy
    cat >/tmp/back.py <<'END'
import sys
from http.server import ThreadingHTTPServer, BaseHTTPRequestHandler
class Page(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = (sys.argv[1] + self.path).encode() * 500
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args): pass
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Page).serve_forever()
END
    python3 /tmp/back.py 8001 &
    python3 /tmp/back.py 8002 &
    cat >>/etc/haproxy/haproxy.cfg <<'END'
frontend front
    bind :80
    default_backend back
backend back
    option httpchk GET /health
    default-server inter 500ms fall 3 rise 1
    server one 127.0.0.1:8001 check
    server two 127.0.0.1:8002 check
END
    exec haproxy -Ws -f /etc/haproxy/haproxy.cfg
}

client() {
    exec python3 - <<'END'
from asking import *

def ask(web, number, count):
    path = f"/{number}/{count}"
    answer = web.ask("GET", path).decode()
    expect(True, answer in [(server + path) * 500 for server in ("8001", "8002")])

over_the_web(4, ask)
END
}

workload "$@"
