//! Servers that several tests run in pods.

/// An HTTP server with a thread for each connection and one that watches the clock.
pub const PYTHON: &str = r#"
import threading, time
from http.server import ThreadingHTTPServer, BaseHTTPRequestHandler
class Page(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = self.path.encode() * 300
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args): pass
class Server(ThreadingHTTPServer):
    daemon_threads = True
def tick():
    last = time.monotonic()
    while True:
        time.sleep(0.01)
        now = time.monotonic()
        assert now >= last, "the clock went back"
        last = now
threading.Thread(target=tick, daemon=True).start()
Server(("", 8000), Page).serve_forever()
"#;

/// Sets a cluster up and becomes its server: a script for bash, whose arguments are more words for postgres.
pub const POSTGRES: &str = r#"
set -e
cd /tmp
bin=$(echo /usr/lib/postgresql/*/bin)
$bin/initdb -D /tmp/pg -A trust >/tmp/initdb.log
echo "host all all 10.77.0.0/24 trust" >>/tmp/pg/pg_hba.conf
exec $bin/postgres -D /tmp/pg -c listen_addresses='*' -c unix_socket_directories=/tmp -c fsync=off "$@"
"#;
