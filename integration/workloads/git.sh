#!/bin/bash
# git daemon: clones and pushes over the network, each by processes of their own.
. "$(dirname "$0")/lib.sh"
title="git daemon"
packages=(git)
did="git daemon; the client clones, commits, pushes, and checks that what it gets is what it pushed"
port=9418

version() { git --version | sed 's/git version //'; }

serve() {
    git init -q --bare /srv/work.git
    touch /srv/work.git/git-daemon-export-ok
    exec git daemon --reuseaddr --enable=receive-pack --base-path=/srv --export-all
}

client() {
    export GIT_CONFIG_GLOBAL=/dev/null GIT_AUTHOR_NAME=c GIT_AUTHOR_EMAIL=c GIT_COMMITTER_NAME=c GIT_COMMITTER_EMAIL=c
    local url=git://$ADDRESS/work.git dir=$WORK/clone pushed count=0 line
    while ! stopped; do
        rm -rf "$dir"
        git clone -q "$url" "$dir" 2>/dev/null || wrong "clone failed"
        [ -z "${pushed:-}" ] || [ "$(git -C "$dir" rev-parse HEAD)" = "$pushed" ] || wrong "the clone is not what was pushed"
        git -C "$dir" fsck --strict >/dev/null 2>&1 || wrong "fsck"
        count=$((count + 1))
        head -c 200000 /dev/urandom >"$dir/file$((count % 20))"
        git -C "$dir" add . && git -C "$dir" commit -qm "$count" && git -C "$dir" push -q origin HEAD 2>/dev/null || wrong "push failed"
        pushed=$(git -C "$dir" rev-parse HEAD)
        answered
    done
}

ENOUGH=2
workload "$@"
