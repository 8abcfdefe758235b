#!/bin/bash
# Installs what the tests need, builds `pod` as a user gets it, runs every test of the workspace.
#
#   integration/test.sh [FILTER...]     as `cargo nextest run FILTER...`
#
# POD_PROFILE=dev tests a debug build of `pod` (quicker to build while working on it).
#
# Can be run again, and twice at once: every test makes hosts of its own under a name of its own, and a keeper process
# takes them down however the test ends.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
. integration/setup.sh

need_root
need_packages iproute2 iputils-ping nftables openssh-server openssh-client procps util-linux \
    redis-server redis-tools nginx-light wrk postgresql postgresql-contrib python3 tcpdump vim busybox-static \
    haproxy python3-redis php-fpm sqlite3 tmux runc crun podman
need_rust

profile=${POD_PROFILE:-release}
say "building pod ($profile) and the tests"
build "$profile"
export POD_PROGRAM=$built/pod

if cargo nextest --version >/dev/null 2>&1; then
    cargo nextest run --workspace --locked --no-run
    say "running the tests"
    exec cargo nextest run --workspace --locked "$@"
fi
say "running the tests (cargo-nextest is not installed: cargo test instead)"
exec cargo test --workspace --locked -- --test-threads 2 "$@"
