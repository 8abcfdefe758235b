#!/bin/bash
# Redis with its log synced every second and snapshots (a forked BGSAVE) without end, so that moves meet one in flight.
. "$(dirname "$0")/lib.sh"
title="Redis"
packages=(redis-server redis-tools python3-redis)
did="append-only file, a forked BGSAVE nearly always in flight; writes and reads back 200 kB values over one connection"
port=6379

version() { redis-server --version | sed 's/.*v=\([^ ]*\).*/\1/'; }

serve() {
    mkdir -p /var/lib/redis
    exec redis-server /etc/redis/redis.conf --bind 0.0.0.0 --protected-mode no --daemonize no --supervised no --logfile '' \
        --appendonly yes --appendfsync everysec --save '' --rdb-key-save-delay 200
}

client() {
    exec python3 - <<'END'
import itertools, redis
from asking import *
one = redis.Redis(ADDRESS, retry_on_error=[], socket_timeout=50)
port = one.client_info()["addr"]
for count in itertools.count():
    if stopped():
        break
    key = f"key{count % 2000}"
    value = f"{key}={count}".encode() * 2000
    expect(True, one.set(key, value))
    if not one.info("persistence")["rdb_bgsave_in_progress"]:
        one.bgsave()
    expect(value, one.get(key))
    answered()
expect(port, one.client_info()["addr"])
expect("ok", one.info("persistence")["rdb_last_bgsave_status"])
expect("ok", one.info("persistence")["aof_last_write_status"])
END
}

workload "$@"
