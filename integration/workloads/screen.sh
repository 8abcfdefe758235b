#!/bin/bash
# screen: a detached session with a shell, driven from outside.
. "$(dirname "$0")/lib.sh"
title="GNU screen"
packages=(screen)
did="a detached session with a shell; commands are stuffed into it and its screen is read"

version() { screen --version | sed -n 's/.*version \([0-9.]*\).*/\1/p'; }

serve() {
    export TERM=xterm SCREENDIR=/tmp/screens
    install -d -m 700 /tmp/screens
    screen -dmS work bash
    local count=0 tries
    while count=$((count + 1)); do
        screen -S work -X stuff "clear; echo result \$((7 * $count))
"
        tries=0
        until screen -S work -X hardcopy /tmp/copy && grep -qx "result $((7 * count))" /tmp/copy; do
            tries=$((tries + 1))
            [ $tries -lt 600 ] || { echo "FAIL the screen does not show $((7 * count))"; exit 1; }
            sleep 0.02
        done
        echo ok
    done
}

workload "$@"
