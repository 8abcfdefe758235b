#!/bin/bash
# systemd as the first process, with a service and a timer of its own.
. "$(dirname "$0")/lib.sh"
title="systemd as PID 1"
packages=(systemd systemd-sysv dbus)
did="boots to a target with a service that counts every 50 ms"
options=(--privileged --stop-signal RTMIN+3 -e container=pod)

version() { systemctl --version | sed -n '1s/systemd \([0-9]*\).*/\1/p'; }

serve() {
    cat >/etc/systemd/system/count.service <<'END'
[Service]
ExecStart=/bin/bash -c 'while :; do echo ok; sleep 0.05; done'
StandardOutput=file:/dev/console
[Install]
WantedBy=count.target
END
    printf '[Unit]\nRequires=count.service\n' >/etc/systemd/system/count.target
    exec /lib/systemd/systemd --unit=count.target --log-target=console
}

workload "$@"
