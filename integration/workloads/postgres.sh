#!/bin/bash
# PostgreSQL: a cluster made in the pod, pgbench from outside. (An open transaction across moves: integration/tests/workloads.rs.)
. "$(dirname "$0")/lib.sh"
title="PostgreSQL"
packages=(postgresql postgresql-contrib)
did="a cluster made in the pod; pgbench with three connections, a run after the other, and the balances summed"
port=5432

version() { /usr/lib/postgresql/*/bin/postgres --version | sed 's/.*) \([0-9.]*\).*/\1/'; }

serve() {
    local bin
    bin=$(echo /usr/lib/postgresql/*/bin)
    install -d -o postgres -g postgres /var/lib/postgresql /run/postgresql
    setpriv --reuid postgres --regid postgres --init-groups "$bin/initdb" -D /var/lib/postgresql/data -A trust >/dev/null
    echo 'host all all 10.77.0.0/24 trust' >>/var/lib/postgresql/data/pg_hba.conf
    exec setpriv --reuid postgres --regid postgres --init-groups "$bin/postgres" -D /var/lib/postgresql/data -c 'listen_addresses=*'
}

client() {
    export PGHOST=$ADDRESS PGUSER=postgres PGDATABASE=postgres
    local said
    pgbench -i -q -s 2 >/dev/null 2>&1 || wrong "pgbench -i"
    while ! stopped; do
        said=$(pgbench -n -c 3 -t 150 2>&1) || wrong "pgbench: $said"
        grep -q 'failed transactions: 0 ' <<<"$said" || wrong "$said"
        [ "$(psql -XAtc 'select (select sum(abalance) from pgbench_accounts) = (select sum(bbalance) from pgbench_branches)')" = t ] ||
            wrong "the sums differ"
        answered
    done
}

ENOUGH=2
workload "$@"
