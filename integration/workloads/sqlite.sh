#!/bin/bash
# SQLite: two writers and a reader of one file, with a write-ahead log (shared memory, POSIX locks, fsync).
. "$(dirname "$0")/lib.sh"
title="SQLite"
packages=(sqlite3 python3)
did="two writers and a reader on one database with a write-ahead log; sums in transactions, integrity_check now and then"

version() { sqlite3 --version | cut -d' ' -f1; }

serve() {
    cat >/tmp/work.py <<'END'
import itertools, os, random, sqlite3, sys

def connect():
    one = sqlite3.connect("/var/lib/work.db", timeout=60, isolation_level=None)
    one.execute("pragma journal_mode=wal")
    one.execute("pragma synchronous=normal")
    return one

first = connect()
first.execute("create table money (id integer primary key, amount integer)")
first.executemany("insert into money values (?, 1000)", [(n,) for n in range(200)])
first.close()
for seed in range(2):
    if os.fork() == 0:
        one, pick = connect(), random.Random(seed)
        try:
            while True:
                one.execute("begin immediate")
                for sign in (-3, 3):
                    one.execute("update money set amount = amount + ? where id = ?", (sign, pick.randrange(200)))
                one.execute("commit")
        except BaseException as error:
            print(f"FAIL writer {seed}: {error!r}", flush=True)
            os._exit(1)
one = connect()
for count in itertools.count(1):
    total = one.execute("select sum(amount) from money").fetchone()[0]
    good = count % 50 or one.execute("pragma integrity_check").fetchone()[0] == "ok"
    if total != 200000 or not good:
        sys.exit(print(f"FAIL sum {total}, integrity {good}", flush=True))
    if count % 10 == 0:
        print("ok", flush=True)
END
    exec python3 /tmp/work.py
}

workload "$@"
