#!/bin/bash
# MariaDB: transactions of two connections, one of which is left open across each look.
. "$(dirname "$0")/lib.sh"
title="MariaDB"
packages=(mariadb-server python3-pymysql)
did="InnoDB, system tables made in the pod; three connections move money between rows in transactions, the sum is checked"
port=3306

version() { mariadbd --version | sed 's/.*Ver \([0-9.]*\).*/\1/'; }

serve() {
    install -d -o mysql -g mysql /run/mysqld /var/lib/mysql
    mariadb-install-db --user=mysql --skip-test-db >/dev/null
    printf '%s;\n' "create user 'client'@'%' identified by 'word'" 'create database work' "grant all on work.* to 'client'@'%'" >/tmp/init
    exec mariadbd --user=mysql --bind-address=0.0.0.0 --skip-name-resolve --init-file=/tmp/init
}

client() {
    exec python3 - <<'END'
import pymysql, random
from asking import *

def connect():
    return pymysql.connect(host=ADDRESS, user="client", password="word", database="work", read_timeout=50)

def ask(one, statement, *values):
    with one.cursor() as cursor:
        cursor.execute(statement, values)
        return cursor.fetchall()

rows = 100
first = connect()
ask(first, "create table if not exists money (id int primary key, amount bigint) engine=innodb")
if not ask(first, "select count(*) from money")[0][0]:
    for row in range(rows):
        ask(first, "insert into money values (%s, 1000)", row)
    first.commit()

def work(seed, going):
    one, pick = connect(), random.Random(seed)
    number = ask(one, "select connection_id()")
    while going():
        # Always in the same order: the server need never choose a victim of a deadlock.
        low, high = sorted(pick.sample(range(rows), 2))
        ask(one, "update money set amount = amount - 7 where id = %s", low)
        ask(one, "update money set amount = amount + 7 where id = %s", high)
        one.commit()
        expect(1000 * rows, int(ask(one, "select sum(amount) from money")[0][0]))
        one.commit()
        answered()
    expect(number, ask(one, "select connection_id()"))

together(3, work)
expect((("work.money", "check", "status", "OK"),), ask(first, "check table money"))
END
}

workload "$@"
