#!/bin/bash
# A Go server as Debian builds it: Caddy, with files, templates, compression and a proxy to itself.
. "$(dirname "$0")/lib.sh"
title="Go (Caddy)"
packages=(caddy)
did="Caddy serves files, and proxies to itself; four kept-alive connections"
port=80

version() { dpkg-query -W -f '${Version}' caddy; }

serve() {
    mkdir -p /tmp/www /tmp/home
    seq 30000 >/tmp/www/page
    cat >/tmp/Caddyfile <<'END'
{
    auto_https off
    admin 127.0.0.1:2019
}
:80 {
    handle /proxied/* {
        uri strip_prefix /proxied
        reverse_proxy 127.0.0.1:8001
    }
    root * /tmp/www
    file_server
}
:8001 {
    root * /tmp/www
    file_server
}
END
    exec env HOME=/tmp/home XDG_DATA_HOME=/tmp/home caddy run --config /tmp/Caddyfile
}

client() {
    exec python3 - <<'END'
from asking import *
page = b"".join(b"%d\n" % n for n in range(1, 30001))

def ask(web, number, count):
    expect(page, web.ask("GET", "/page"))
    expect(page, web.ask("GET", "/proxied/page"))

over_the_web(4, ask)
END
}

workload "$@"
