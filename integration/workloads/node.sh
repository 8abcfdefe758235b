#!/bin/bash
# Node: an HTTP server, timers, a worker thread, files, and a child that it talks to.
. "$(dirname "$0")/lib.sh"
title="Node.js"
packages=(nodejs)
did="HTTP server with a worker thread, a timer and a child process; three kept-alive connections have bodies hashed in each"
port=8000

version() { node --version | tr -d v; }

serve() {
    cat >/tmp/server.js <<'END'
const { Worker, isMainThread, parentPort } = require('worker_threads');
const { createHash } = require('crypto');
const sum = (body) => createHash('sha256').update(body).digest('hex');
if (!isMainThread) {
    parentPort.on('message', ([id, body]) => parentPort.postMessage([id, sum(body)]));
} else {
    const worker = new Worker(__filename), waiting = new Map();
    worker.on('message', ([id, text]) => waiting.get(id)(text));
    const child = require('child_process').spawn('cat');
    const lines = require('readline').createInterface({ input: child.stdout }), echoes = [];
    lines.on('line', (line) => echoes.shift()(line));
    let id = 0, last = process.hrtime.bigint();
    setInterval(() => {
        const now = process.hrtime.bigint();
        if (now < last) { console.log('FAIL the clock went back'); process.exit(1); }
        last = now;
    }, 5);
    require('http').createServer(async (request, response) => {
        const parts = [];
        for await (const part of request) parts.push(part);
        const body = Buffer.concat(parts), own = ++id;
        const threaded = await new Promise((done) => { waiting.set(own, done); worker.postMessage([own, body]); });
        waiting.delete(own);
        const echoed = await new Promise((done) => { echoes.push(done); child.stdin.write(threaded + '\n'); });
        const file = `/tmp/body-${own % 8}`;
        await require('fs').promises.writeFile(file + own, body);
        const read = sum(await require('fs').promises.readFile(file + own));
        await require('fs').promises.unlink(file + own);
        response.end([sum(body), echoed, read].join(' '));
    }).listen(8000, '0.0.0.0');
}
END
    exec node /tmp/server.js
}

client() {
    exec python3 - <<'END'
import hashlib
from asking import *

def ask(web, number, count):
    body = b"%d %d " % (number, count) * 20000
    expect([hashlib.sha256(body).hexdigest()] * 3, web.ask("POST", "/", body).decode().split())

over_the_web(3, ask, 8000)
END
}

workload "$@"
