#!/bin/bash
# Ruby: Puma with two forked workers of five threads each.
. "$(dirname "$0")/lib.sh"
title="Ruby (Puma)"
packages=(puma ruby-rack)
did="Puma with two workers of five threads; four kept-alive connections have bodies hashed"
port=8000

version() { ruby -e 'puts RUBY_VERSION'; }

serve() {
    cat >/tmp/config.ru <<'END'
require 'digest/sha2'
run lambda { |env| [200, { 'Content-Type' => 'text/plain' }, [Digest::SHA256.hexdigest(env['rack.input'].read)]] }
END
    cd /tmp
    exec puma -e production -w 2 -t 5:5 -b tcp://0.0.0.0:8000 config.ru
}

client() {
    exec python3 - <<'END'
import hashlib
from asking import *

def ask(web, number, count):
    body = b"%d %d " % (number, count) * 3000
    expect(hashlib.sha256(body).hexdigest(), web.ask("POST", "/", body).decode())

over_the_web(4, ask, 8000)
END
}

workload "$@"
