#!/bin/bash
# DOSBox on Xvfb: a batch file that counts on its own drive.
. "$(dirname "$0")/lib.sh"
title="DOSBox"
packages=(dosbox xvfb)
did="a batch file appends to a file of the pod without end"

version() { dpkg-query -W -f '${Version}' dosbox; }

serve() {
    export DISPLAY=:1 HOME=/tmp SDL_AUDIODRIVER=dummy
    install -d -m 1777 /tmp/.X11-unix
    Xvfb :1 -screen 0 640x480x24 >/dev/null 2>&1 &
    until [ -S /tmp/.X11-unix/X1 ]; do sleep 0.05; done
    mkdir /tmp/c
    printf ':again\r\necho turn >>out.txt\r\ngoto again\r\n' >/tmp/c/count.bat
    touch /tmp/c/OUT.TXT
    dosbox -c 'mount c /tmp/c' -c 'c:' -c 'count.bat' >/dev/null 2>&1 &
    local box=$! before=0 now tries
    while :; do
        tries=0
        while now=$(wc -l </tmp/c/OUT.TXT); [ "$now" -le $before ]; do
            tries=$((tries + 1))
            [ $tries -lt 1200 ] && [ -d /proc/$box ] || { echo "FAIL no more turns after $before"; exit 1; }
            sleep 0.05
        done
        ! grep -qv '^turn.$' /tmp/c/OUT.TXT || { echo "FAIL a line is wrong"; exit 1; }
        before=$now
        echo ok
    done
}

workload "$@"
