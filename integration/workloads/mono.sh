#!/bin/bash
# Mono: threads, a generational collector, a TCP server.
. "$(dirname "$0")/lib.sh"
title="Mono (.NET)"
packages=(mono-runtime mono-mcs)
did="a threaded TCP server whose threads make garbage; three connections have lines summed"
port=8000

version() { mono --version | sed -n '1s/.*version \([0-9.]*\).*/\1/p'; }

serve() {
    cat >/tmp/server.cs <<'END'
using System; using System.Collections.Generic; using System.IO; using System.Net; using System.Net.Sockets; using System.Threading;
class Server {
    static void Serve(object o) {
        using (var stream = ((TcpClient)o).GetStream()) {
            var reader = new StreamReader(stream); var writer = new StreamWriter(stream) { AutoFlush = true };
            var kept = new List<string>(); string line;
            while ((line = reader.ReadLine()) != null) {
                uint sum = 0; foreach (char c in line) sum = sum * 31 + c;
                kept.Add(line); if (kept.Count > 500) kept.Clear();
                writer.WriteLine(sum);
            }
        }
    }
    static void Main() {
        var listener = new TcpListener(IPAddress.Any, 8000); listener.Start();
        while (true) new Thread(Serve).Start(listener.AcceptTcpClient());
    }
}
END
    mcs -out:/tmp/server.exe /tmp/server.cs
    exec mono /tmp/server.exe
}

client() {
    exec python3 - <<'END'
import socket
from asking import *

def work(number, going):
    one = socket.create_connection((ADDRESS, 8000), 50)
    answers, count = one.makefile("r"), 0
    while going():
        count += 1
        line, total = f"{number} {count} " * 200, 0
        for char in line:
            total = (total * 31 + ord(char)) & 0xffffffff
        one.sendall(line.encode() + b"\n")
        expect(f"{total}\n", answers.readline())
        answered()

together(3, work)
END
}

workload "$@"
