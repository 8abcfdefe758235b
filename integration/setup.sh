# Sourced by examples/demo.sh, integration/test.sh and integration/bench: what they need of the machine.
#
#   need_root            refuse unless root
#   need_packages P...   install the Debian packages that are not there yet
#   build PROFILE [P...] `pod` and what goes with it on a bed, or only those packages; their folder is in $built
#   need_rust            a cargo for the toolchain that rust-toolchain.toml pins
#
# Everything here may be run again at any time and by several scripts at once: apt and cargo wait for their own locks.

say() { printf '== %s\n' "$*"; }
die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }

need_root() {
    [ "$(id -u)" = 0 ] || die "run me as root: I make network namespaces, mounts and cgroups"
}

need_packages() {
    local package missing=()
    for package in "$@"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    say "installing ${missing[*]}"
    # No service of a package may start here: its port and files belong to the machine, not to a test.
    local policy=/usr/sbin/policy-rc.d made=
    if [ ! -e $policy ]; then
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod 755 $policy
        made=1
    fi
    local status=0
    { apt-get -q -o DPkg::Lock::Timeout=600 update &&
        DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=600 install --no-install-recommends "${missing[@]}"
    } </dev/null >/tmp/pod-apt.$$.log 2>&1 || status=$?
    [ -z "$made" ] || rm -f $policy
    [ $status = 0 ] || { tail -20 /tmp/pod-apt.$$.log >&2; rm -f /tmp/pod-apt.$$.log; die "apt-get could not install ${missing[*]}"; }
    rm -f /tmp/pod-apt.$$.log
}

need_rust() {
    export PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
    if ! command -v cargo >/dev/null; then
        need_packages ca-certificates curl
        say "installing rustup (no cargo on this machine)"
        local setup
        setup=$(mktemp)
        curl --proto '=https' --tlsv1.2 -fsS -o "$setup" https://sh.rustup.rs &&
            sh "$setup" -y -q --profile minimal --default-toolchain none --no-modify-path ||
            { rm -f "$setup"; die "no cargo here and rustup could not be fetched: install it (https://rustup.rs) and run me again"; }
        rm -f "$setup"
    fi
    need_packages gcc libc6-dev
    # rustup fetches the toolchain that rust-toolchain.toml names on the first call.
    cargo --version >/dev/null || die "cargo is there but does not run: see above"
}

# Always the same packages together: with others, features differ and everything below is compiled once more.
build() {
    local packages=(pod-shim integration)
    [ $# = 1 ] || packages=("${@:2}")
    cargo build --quiet --profile "$1" --locked "${packages[@]/#/--package=}" --bins
    built=$(cargo metadata --format-version 1 --no-deps --offline --locked |
        sed 's/.*"target_directory":"\([^"]*\)".*/\1/')/${1/#dev/debug}
}
