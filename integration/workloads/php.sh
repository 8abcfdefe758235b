#!/bin/bash
# PHP's process manager behind nginx, over a unix socket, with sessions in files.
. "$(dirname "$0")/lib.sh"
title="php-fpm behind nginx"
packages=(php-fpm nginx-light)
did="Debian's pool over a unix socket; three kept-alive connections, each with a session that counts and a body that is hashed"
port=80

version() { dpkg-query -W -f '${Version}' php8.2-fpm; }

serve() {
    mkdir -p /run/php /var/lib/nginx /var/log/nginx
    install -d -m 1733 /var/lib/php/sessions
    cat >/var/www/html/count.php <<'END'
<?php session_start(); $_SESSION['n'] = ($_SESSION['n'] ?? 0) + 1;
echo $_SESSION['n'], ' ', hash('sha256', file_get_contents('php://input')), ' ', str_repeat('x', 30000);
END
    cat >/etc/nginx/sites-enabled/default <<'END'
server {
    listen 80;
    root /var/www/html;
    keepalive_requests 1000000;
    location ~ \.php$ { include snippets/fastcgi-php.conf; fastcgi_pass unix:/run/php/php8.2-fpm.sock; }
}
END
    php-fpm8.2 --nodaemonize &
    until [ -S /run/php/php8.2-fpm.sock ]; do sleep 0.05; done
    exec nginx -g 'daemon off;'
}

client() {
    exec python3 - <<'END'
import hashlib, secrets
from asking import *

def work(number, going):
    web, cookie, count = Web(), {"Cookie": "PHPSESSID=" + secrets.token_hex(13)}, 0
    while going():
        count += 1
        body = b"%d %d " % (number, count) * 2000
        answer = web.ask("POST", "/count.php", body, cookie).split(b" ")
        expect((str(count), hashlib.sha256(body).hexdigest(), 30000), (answer[0].decode(), answer[1].decode(), len(answer[2])))
        answered()

together(3, work)
END
}

workload "$@"
