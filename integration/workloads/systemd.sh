#!/bin/bash
# systemd as the first process, with a service that it starts.
. "$(dirname "$0")/lib.sh"
title="systemd as PID 1"
packages=(systemd systemd-sysv dbus python3)
did="boots, in a privileged pod, to a target with a web server as its service"
port=8000
options=(--privileged -e container=pod)

version() { systemctl --version | sed -n '1s/systemd \([0-9]*\).*/\1/p'; }

serve() {
    printf '[Service]\nExecStart=/usr/bin/python3 -m http.server 8000 --directory /usr/share/doc/base-files\n' \
        >/etc/systemd/system/web.service
    printf '[Unit]\nRequires=web.service\n' >/etc/systemd/system/web.target
    exec /lib/systemd/systemd --unit=web.target
}

client() {
    exec python3 - <<'END'
import urllib.request
from asking import *
page = open("/usr/share/doc/base-files/README", "rb").read()
while not stopped():
    expect(page, urllib.request.urlopen(f"http://{ADDRESS}:8000/README", timeout=50).read())
    answered()
END
}

workload "$@"
