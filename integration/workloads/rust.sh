#!/bin/bash
# A Rust server as Debian builds it (tokio): sccache, which caches compilations for clients that ask it over TCP.
. "$(dirname "$0")/lib.sh"
title="Rust (sccache)"
packages=(sccache gcc libc6-dev)
did="the server compiles for its clients; each object file, new or from the cache, is compared with one that gcc made"

version() { sccache --version | sed 's/sccache //'; }

serve() {
    export SCCACHE_DIR=/tmp/cache SCCACHE_IDLE_TIMEOUT=0 HOME=/tmp
    cd /tmp
    sccache --start-server >/dev/null 2>&1 || { echo "FAIL the server does not start"; exit 1; }
    local count=0
    while count=$((count + 1)); do
        echo "int f(int x) { return x * $((count % 10)); }" >f.c
        sccache gcc -O2 -c f.c -o f.o && gcc -O2 -c f.c -o g.o && cmp -s f.o g.o || { echo "FAIL object $count"; exit 1; }
        echo ok
    done
}

workload "$@"
