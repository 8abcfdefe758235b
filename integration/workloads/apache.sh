#!/bin/bash
# Apache with its event MPM: processes of many threads, kept-alive connections, a request body, CGI through a daemon.
. "$(dirname "$0")/lib.sh"
title="Apache (event)"
packages=(apache2 curl python3)
did="Debian's site with CGI; four kept-alive connections get a page and post a body to a CGI that sums it"
port=80

version() { apache2 -v | sed -n 's,.*Apache/\([0-9.]*\).*,\1,p'; }

serve() {
    set +u
    . /etc/apache2/envvars
    set -u
    mkdir -p "$APACHE_RUN_DIR/socks" "$APACHE_LOCK_DIR" /tmp/cgi /var/log/apache2
    printf '#!/bin/sh\necho "Content-Type: text/plain"\necho\nexec sha256sum\n' >/tmp/cgi/sum
    chmod 755 /tmp/cgi/sum
    seq 20000 >/var/www/html/page
    a2enmod -q cgid >/dev/null
    printf 'ScriptAlias /cgi/ /tmp/cgi/\n<Directory /tmp/cgi>\nRequire all granted\n</Directory>\nServerName pod\n%s\n' \
        'MaxKeepAliveRequests 0' >/etc/apache2/conf-enabled/pod.conf
    exec apache2 -DFOREGROUND
}

client() {
    exec python3 - <<'END'
import hashlib
from asking import *
page = b"".join(b"%d\n" % n for n in range(1, 20001))

def ask(web, number, count):
    expect(page, web.ask("GET", "/page"))
    body = b"%d %d " % (number, count) * 3000
    expect(hashlib.sha256(body).hexdigest(), web.ask("POST", "/cgi/sum", body).split()[0].decode())

over_the_web(4, ask)
END
}

workload "$@"
