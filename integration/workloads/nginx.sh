#!/bin/bash
# nginx with its pre-forked workers, gzip and sendfile. (wrk with 32 connections: integration/tests/workloads.rs.)
. "$(dirname "$0")/lib.sh"
title="nginx"
packages=(nginx-light)
did="Debian's site, two workers; four kept-alive connections get files, plain and compressed"
port=80

version() { nginx -v 2>&1 | sed 's,.*/,,'; }

serve() {
    mkdir -p /var/lib/nginx /var/log/nginx
    seq 30000 >/var/www/html/page.html
    printf 'keepalive_requests 10000000;\n' >/etc/nginx/conf.d/pod.conf
    sed -i 's/^worker_processes .*/worker_processes 2;/' /etc/nginx/nginx.conf
    exec nginx -g 'daemon off;'
}

client() {
    exec python3 - <<'END'
import gzip
from asking import *
page = b"".join(b"%d\n" % n for n in range(1, 30001))

def ask(web, number, count):
    expect(page, web.ask("GET", "/page.html"))
    expect(page, gzip.decompress(web.ask("GET", "/page.html", None, {"Accept-Encoding": "gzip"})))

over_the_web(4, ask)
END
}

workload "$@"
