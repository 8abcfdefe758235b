#!/bin/bash
# RabbitMQ: an Erlang node with its port mapper; durable messages that are confirmed and acknowledged.
. "$(dirname "$0")/lib.sh"
title="RabbitMQ (Erlang)"
packages=(rabbitmq-server python3-pika)
did="a durable queue; one connection publishes with confirms, another consumes; order and contents are checked"
port=5672

version() { dpkg-query -W -f '${Version}' rabbitmq-server; }

serve() {
    install -d -o rabbitmq -g rabbitmq /var/lib/rabbitmq /var/log/rabbitmq
    echo 'loopback_users = none' >/etc/rabbitmq/rabbitmq.conf
    export RABBITMQ_NODENAME=rabbit@localhost HOME=/var/lib/rabbitmq
    exec rabbitmq-server
}

client() {
    exec python3 - <<'END'
import pika
from asking import *

def connect():
    one = pika.BlockingConnection(pika.ConnectionParameters(ADDRESS, heartbeat=0, blocked_connection_timeout=50))
    return one.channel()

sender, receiver = connect(), connect()
sender.confirm_delivery()
sender.queue_declare("work", durable=True)
sender.queue_purge("work")
keep = pika.BasicProperties(delivery_mode=2)
messages, count = receiver.consume("work", inactivity_timeout=50), 0
while not stopped():
    count += 1
    body = f"{count} ".encode() * 5000
    sender.basic_publish("", "work", body, keep, mandatory=True)
    method, _, found = next(messages)
    expect((True, body), (method is not None, found))
    receiver.basic_ack(method.delivery_tag)
    answered()
END
}

workload "$@"
