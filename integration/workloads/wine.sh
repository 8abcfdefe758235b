#!/bin/bash
# Wine: a console program that is asked line by line, and notepad with a window.
. "$(dirname "$0")/lib.sh"
title="Wine (64-bit)"
packages=(wine64 wine xvfb xdotool)
did="cmd.exe counts in a batch file, each line is checked; notepad has a window on Xvfb"
SOON=120

version() { /usr/lib/wine/wine64 --version | sed 's/wine-//'; }

serve() {
    export DISPLAY=:1 HOME=/tmp WINEDEBUG=-all WINEPREFIX=/tmp/wine WINEDLLOVERRIDES='mscoree,mshtml='
    install -d -m 1777 /tmp/.X11-unix
    Xvfb :1 -screen 0 640x480x24 &
    until [ -S /tmp/.X11-unix/X1 ]; do sleep 0.05; done
    local wine=/usr/lib/wine/wine64
    $wine wineboot -i >/dev/null 2>&1
    $wine notepad >/dev/null 2>&1 &
    printf '%s\r\n' '@echo off' 'set n=0' ':again' 'set /a n=n+1' 'set /a x=7*n' 'echo %n% %x%' 'goto again' >/tmp/count.bat
    $wine cmd /c 'Z:\tmp\count.bat' 2>/dev/null | tr -d '\r' | {
        local count=0 n x
        while read -r n x; do
            count=$((count + 1))
            [ "$n $x" = "$count $((7 * count))" ] || { echo "FAIL line $count: $n $x"; exit 1; }
            [ $((count % 20)) != 0 ] || {
                [ $count -lt 500 ] || [ -n "$(xdotool search --name notepad)" ] || { echo "FAIL notepad has no window"; exit 1; }
                echo ok
            }
        done
        echo "FAIL cmd.exe ended after line $count"
    }
}

workload "$@"
