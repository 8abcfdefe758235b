#!/bin/bash
# tmux: a server, a client attached to it on a terminal of its own, shells in two windows.
. "$(dirname "$0")/lib.sh"
title="tmux"
packages=(tmux)
did="server, an attached client, two windows with shells; commands are typed into both and the screens read"

version() { tmux -V | sed 's/tmux //'; }

serve() {
    export TERM=xterm LANG=C.UTF-8
    tmux new-session -d -s work -x 100 -y 30 bash
    tmux new-window -t work bash
    sleep infinity | script -qfc 'tmux attach -t work' /dev/null >/dev/null 2>&1 &
    local count=0 window tries
    while count=$((count + 1)); do
        for window in 0 1; do
            tmux send-keys -t "work:$window" "clear; echo \$((7 * $count)) in \$TMUX_PANE" Enter
            tries=0
            until tmux capture-pane -p -t "work:$window" | grep -qx "$((7 * count)) in %$window"; do
                tries=$((tries + 1))
                [ $tries -lt 600 ] || { echo "FAIL window $window does not show $((7 * count))"; exit 1; }
                sleep 0.02
            done
        done
        [ -n "$(tmux list-clients)" ] || { echo "FAIL the attached client is gone"; exit 1; }
        echo ok
    done
}

workload "$@"
