#!/bin/bash
# Builds: make and ninja, two jobs each, of a small C program, over and over; each result must give the same sum.
. "$(dirname "$0")/lib.sh"
title="gcc, make, ninja"
packages=(gcc libc6-dev make ninja-build)
did="make -j2 and ninja -j2 build a C program of twelve files over and over; its output is checked"

version() { printf 'gcc %s, make %s, ninja %s' "$(gcc -dumpfullversion)" "$(make --version | sed -n '1s/.* //p')" "$(ninja --version)"; }

serve() {
    mkdir /tmp/b && cd /tmp/b
    local i
    for i in $(seq 12); do
        printf '#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\nint f%s(int x) { return x * %s + 1; }\n' "$i" "$i" >"f$i.c"
    done
    {
        echo '#include <stdio.h>'
        for i in $(seq 12); do echo "int f$i(int);"; done
        echo 'int main(void) { int x = 0;'
        for i in $(seq 12); do echo "x = f$i(x) % 1000003;"; done
        echo 'printf("%d\n", x); return 0; }'
    } >main.c
    printf 'OBJECTS = %s main.o\nprogram: $(OBJECTS)\n\tgcc -o $@ $^\n%%.o: %%.c\n\tgcc -O2 -pipe -c -o $@ $<\n' "$(seq -f 'f%g.o' -s ' ' 12)" >Makefile
    {
        printf 'rule cc\n  command = gcc -O2 -c -o $out $in\nrule link\n  command = gcc -o $out $in\n'
        for i in main $(seq -f 'f%g' 12); do echo "build n/$i.o: cc $i.c"; done
        echo "build n/program: link n/main.o $(seq -f 'n/f%g.o' -s ' ' 12)"
    } >build.ninja
    local right
    right=$(awk 'BEGIN { x = 0; for (i = 1; i <= 12; i++) x = (x * i + 1) % 1000003; print x }')
    while :; do
        make -s -j2 >/tmp/log 2>&1 && [ "$(./program)" = "$right" ] || { echo "FAIL make: $(tail -1 /tmp/log)"; exit 1; }
        echo ok
        ninja -j2 >/tmp/log 2>&1 && [ "$(n/program)" = "$right" ] || { echo "FAIL ninja: $(tail -1 /tmp/log)"; exit 1; }
        echo ok
        rm -rf n ./*.o program
    done
}

ENOUGH=2
workload "$@"
