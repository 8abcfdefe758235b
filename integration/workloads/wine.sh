#!/bin/bash
# Wine: a console program that is asked line by line, and notepad with a window.
. "$(dirname "$0")/lib.sh"
title="Wine (64-bit)"
packages=(wine64 wine xvfb xdotool)
did="cmd.exe calculates line by line, notepad has a window on Xvfb"
SOON=120

version() { /usr/lib/wine/wine64 --version | sed 's/wine-//'; }

serve() {
    export DISPLAY=:1 HOME=/tmp WINEDEBUG=-all WINEPREFIX=/tmp/wine WINEDLLOVERRIDES='mscoree,mshtml='
    install -d -m 1777 /tmp/.X11-unix
    Xvfb :1 -screen 0 640x480x24 &
    until [ -S /tmp/.X11-unix/X1 ]; do sleep 0.05; done
    local wine=/usr/lib/wine/wine64 count=0 line
    $wine wineboot -i >/dev/null 2>&1
    $wine notepad >/dev/null 2>&1 &
    coproc CMD { exec $wine cmd /q 2>/dev/null; }
    while count=$((count + 1)); do
        printf 'set /a x=7*%d >nul\r\necho result %%x%%\r\n' $count >&"${CMD[1]}"
        while read -r -t 60 line <&"${CMD[0]}" || { echo "FAIL cmd.exe says nothing after $count"; exit 1; }; do
            case $line in *"result $((7 * count))"*) break ;; esac
        done
        [ -n "$(xdotool search --name notepad)" ] || [ $count -lt 50 ] || { echo "FAIL notepad has no window"; exit 1; }
        echo ok
    done
}

workload "$@"
