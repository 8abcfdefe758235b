#!/bin/bash
# A live redis moves between two hosts and back while a client writes to it over one TCP connection.
#
# The two hosts and the client are made on this machine out of namespaces (integration/src/bed), with sshd on each; they
# are taken down again when this script ends, however it ends. Run as root; can be run again, and twice at once.
set -euo pipefail
self=$(readlink -f "$0")
cd "$(dirname "$self")/.."
. integration/setup.sh

ADDRESS=10.77.0.100
# What a session with a cache would do: some thousand keys, written and read back without pause.
KEYS=2000

# On a host of the bed.
on() { "$BED" exec "$@"; }

prepare() {
    need_root
    need_packages iproute2 nftables openssh-server openssh-client procps util-linux redis-server
    need_rust
    say "building pod (release)"
    build release
    export BED=$built/bed CLIENT=$built/client POD_PROGRAM=$built/pod
    # The keeper of the bed takes the hosts down when this process ends, also when it is killed.
    exec env BED_NAME="demo-$$" BED_HOSTS="hostA hostB client" "$BED" run "$self" between-the-hosts
}

move() { # FROM TO
    say "$1: pod migrate redis --to $2"
    on "$1" pod migrate redis --to "$2"
}

demo() {
    local summary status
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    "$BED" status | while read -r host _ address _; do echo "   $host $address"; done
    for host in hostA hostB; do
        # The first pod of a host makes what stays for all others: the default network and the store.
        on $host pod run --rm -- true
        "$BED" until 60 "$BED" exec $host sh -c '! pgrep -x pod-monitor'
        "$BED" leaks $host save "$work/$host"
    done

    say "hostA: redis in a pod, with $ADDRESS on the LAN"
    on hostA pod run -d --name redis --network bridge:br0 --ip "$ADDRESS/24" -- \
        redis-server --bind 0.0.0.0 --protected-mode no --save '' --dir /tmp
    "$BED" until 30 "$BED" exec client bash -c ": </dev/tcp/$ADDRESS/6379"

    say "client: writes $KEYS keys and reads them back, over one connection, without pause"
    mkfifo "$work/stdin"
    on client "$CLIENT" redis "$ADDRESS:6379" 1 1 $KEYS <"$work/stdin" >"$work/client" &
    local client=$!
    exec 7>"$work/stdin"
    "$BED" until 60 grep -q ready "$work/client"
    local before
    before=$(on client ss -Htn dst "$ADDRESS" | awk '{print $4 " -> " $5}')

    move hostA hostB
    on hostB pod ps
    move hostB hostA
    on hostA pod ps

    local after
    after=$(on client ss -Htn dst "$ADDRESS" | awk '{print $4 " -> " $5}')
    exec 7>&-
    wait $client && status=0 || status=$?
    summary=$(cat "$work/client")

    say "what happened"
    sed -n 's/^/   /; /requests/p; /longest/p' <<<"$summary"
    if [ "$before" = "$after" ] && [ -n "$after" ]; then
        echo "   connection: still the same, $after"
    else
        echo "   connection: $before before, $after after"
        status=1
    fi
    on hostB pod ps -a
    on hostB pod rm redis
    local left
    left=$("$BED" leaks hostB "$work/hostB") || status=1
    echo "   left on hostB, which the pod has left (beside the note that it moved, removed by \`pod rm\`): ${left:-nothing}"
    on hostA pod rm -f redis
    left=$("$BED" leaks hostA "$work/hostA") || status=1
    echo "   left on hostA after \`pod rm -f\`: ${left:-nothing}"
    return $status
}

if [ "${1:-}" = between-the-hosts ]; then
    demo
else
    prepare
fi
