#!/bin/bash
# Java: a heap of some hundred MiB that G1 never stops collecting, many threads, an HTTP server.
. "$(dirname "$0")/lib.sh"
title="Java (OpenJDK, G1)"
packages=(default-jdk-headless)
did="300 MiB of live heap, four threads that make garbage, G1 collecting, 50 idle threads; three kept-alive connections"
port=8000

version() { java -version 2>&1 | sed -n '1s/.*"\(.*\)".*/\1/p'; }

serve() {
    cat >/tmp/Server.java <<'END'
import com.sun.net.httpserver.HttpServer;
import java.net.InetSocketAddress;
import java.util.concurrent.*;
import java.util.*;

public class Server {
    static final byte[][] live = new byte[300 * 64][];

    static void fill(int at) {
        byte[] page = new byte[16384];
        Arrays.fill(page, (byte) (at % 251));
        live[at] = page;
    }

    public static void main(String[] args) throws Exception {
        for (int at = 0; at < live.length; at++) fill(at);
        for (int seed = 0; seed < 4; seed++) {
            Random pick = new Random(seed);
            Thread thread = new Thread(() -> {
                while (true) {
                    int at = pick.nextInt(live.length);
                    byte[] page = live[at];
                    for (byte one : page) if (one != (byte) (at % 251)) { System.out.println("FAIL page " + at); System.exit(1); }
                    fill(at);
                    List<String> garbage = new ArrayList<>();
                    for (int i = 0; i < 200; i++) garbage.add(at + ":" + i);
                    try { Thread.sleep(1); } catch (InterruptedException e) { return; }
                }
            });
            thread.setDaemon(true);
            thread.start();
        }
        for (int i = 0; i < 50; i++) {
            Thread idle = new Thread(() -> { synchronized (Server.class) { try { Server.class.wait(); } catch (InterruptedException e) { } } });
            idle.setDaemon(true);
            idle.start();
        }
        HttpServer server = HttpServer.create(new InetSocketAddress(8000), 50);
        server.setExecutor(Executors.newFixedThreadPool(8));
        server.createContext("/", exchange -> {
            int sum = 0;
            for (byte one : exchange.getRequestBody().readAllBytes()) sum = sum * 31 + (one & 0xff);
            byte[] answer = Integer.toUnsignedString(sum).getBytes();
            exchange.sendResponseHeaders(200, answer.length);
            exchange.getResponseBody().write(answer);
            exchange.close();
        });
        server.start();
    }
}
END
    exec java -XX:+UseG1GC -Xms400m -Xmx600m /tmp/Server.java
}

client() {
    exec python3 - <<'END'
from asking import *

def ask(web, number, count):
    body = b"%d %d " % (number, count) * 300
    total = 0
    for byte in body:
        total = (total * 31 + byte) & 0xffffffff
    expect(str(total), web.ask("POST", "/", body).decode())

over_the_web(3, ask, 8000)
END
}

workload "$@"
