#!/bin/bash
# OpenSSH both ways: a session into the pod, in which a session goes out of it and back to the client's host.
. "$(dirname "$0")/lib.sh"
title="OpenSSH, in and out"
packages=(openssh-server openssh-client)
did="one session into the pod, with a terminal, and in it one out of it to the client's host; lines go through both and back"
port=22

version() { ssh -V 2>&1 | sed 's/^OpenSSH_\([^ ,]*\).*/\1/'; }

serve() {
    mkdir -p /run/sshd
    ssh-keygen -q -A
    exec /usr/sbin/sshd -D -e -o UsePAM=no -o PermitRootLogin=yes
}

client() {
    coproc SSH { exec ssh -tt -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR "$ADDRESS" \
        "stty -echo -onlcr; exec ssh -o StrictHostKeyChecking=no client 'sed -u s/^/back:/'"; }
    local count=0 line
    while ! stopped; do
        count=$((count + 1))
        echo "line $count" >&"${SSH[1]}"
        while read -r -t 60 line <&"${SSH[0]}" || wrong "the session ended after $count lines"; do
            [ "${line//$'\r'/}" != "back:line $count" ] || break
            # Before its terminal is set the line is echoed.
            [ $count = 1 ] || wrong "line $count: $line"
        done
        answered
    done
}

workload "$@"
