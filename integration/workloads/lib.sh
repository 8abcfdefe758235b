# Sourced by each program's script: the way that all of them go. A script says what is particular to its program,
#
#   title, packages, did         for the table: its name, the Debian packages, what it was and what its client did
#   port                         (or none) of the pod that answers before a client comes
#   options                      (or none) more words for `pod run`
#   version                      prints the version
#   serve                        in the pod: becomes the program, as Debian ships it
#   client                       on the client host: asks until `stopped`, says `answered` after each right answer, fails at
#                                the first wrong one. A program without one says "ok" in its log for each piece of work
#                                that it found right itself, and "FAIL …" for a wrong one.
#   check                        (or none) on the client host, at the end: what must be true then
#
# and ends with `workload "$@"`. Then `NAME.sh` alone makes a bed, moves the program there and back MOVES times (2 unless told
# otherwise) while its client asks, saves it with --stop and restores it under the same client; without one it is
# saved, killed and restored, and must answer a new client. After each step it must give more answers than before.
# The outcome is the last line: "works", "refused: E-CODE …" (and the pod was seen to run on) or "fails: …".

self=$(readlink -f "$0")
here=$(dirname "$self")
name=$(basename "$self" .sh)
export ADDRESS=10.77.0.100 PYTHONPATH=$here PYTHONDONTWRITEBYTECODE=1
port='' options=()
MOVES=${MOVES:-2}
# Answers that show that it works again.
ENOUGH=5
# Above what any step takes on a machine that is busy with other work.
SOON=${SOON:-60}

on() { "$BED" exec "$@"; }
stopped() { [ -e "$WORK/stop" ]; }
answered() { printf . >>"$WORK/answers"; }
defined() { [ "$(type -t "$1")" = function ]; }
# For a client: the first thing that was wrong.
wrong() { printf '%s\n' "$*" >&2; exit 1; }

outcome() {
    trap - EXIT
    [ -z "${asking:-}" ] || { kill -9 "$asking" && wait "$asking"; } 2>/dev/null || true
    case $1 in works*) ;; *)
        echo "-- the client said:"
        tail -20 "$WORK/client" 2>/dev/null || true
        echo "-- the pod said:"
        log | tail -20 ;;
    esac
    printf '%s\n' "$1"
    case $1 in works*) exit 0 ;; refused*) exit 3 ;; *) exit 1 ;; esac
}
fails() { outcome "fails: $*"; }

# WHAT CONDITION…: waits for it.
until_true() {
    local what=$1 end=$((SECONDS + SOON))
    shift
    until "$@"; do
        [ $SECONDS -lt $end ] || fails "$what: not within $SOON s"
        sleep 0.05
    done
}

runs() { on "$host" pod ps | awk '{print $1}' | grep -qx "$name"; }

reachable() {
    runs || fails "the pod ended"
    on client timeout 5 bash -c ": </dev/tcp/$ADDRESS/$port" 2>/dev/null
}

log() { on "$host" pod logs "$name" 2>/dev/null || true; }

answers() {
    if defined client; then
        stat -c %s "$WORK/answers"
    else
        log | grep -c '^ok' || true
    fi
}

# Something to wait for ends at once with what ended instead.
more_than() {
    local wrong
    [ -z "$asking" ] || [ -d "/proc/$asking" ] || fails "the client ended: $(tail -1 "$WORK/client")"
    if ! defined client && wrong=$(log | grep -m1 '^FAIL'); then
        fails "$wrong"
    fi
    [ "$(answers)" -gt "$1" ] || { runs || fails "the pod ended"; return 1; }
}

works_on() { # WHEN
    until_true "an answer $1" more_than $(($(answers) + ENOUGH))
}

ask() {
    rm -f "$WORK/stop"
    : >"$WORK/answers"
    asking=''
    defined client || return 0
    on client bash "$self" client </dev/null >"$WORK/client" 2>&1 &
    asking=$!
}

# The client ends by itself and finds that everything was right.
stop_asking() {
    touch "$WORK/stop"
    [ -n "$asking" ] || return 0
    local status=0
    until_true "the client to end" test ! -d "/proc/$asking"
    wait "$asking" || status=$?
    asking=''
    [ $status = 0 ] || fails "the client: $(tail -1 "$WORK/client")"
}

# WHAT POD-COMMAND…: a refusal by name leaves the pod running; anything else that goes wrong is a failure.
step() {
    local what=$1 code line
    shift
    echo "-- $what"
    local status=0
    on "$host" timeout -s KILL 100 pod "$@" >"$WORK/said" 2>&1 || status=$?
    [ $status != 0 ] || return 0
    cat "$WORK/said"
    line=$(grep -m1 '^error\[E-' "$WORK/said") || fails "$what: $(tail -1 "$WORK/said")"
    code=${line#error[}
    code=${code%%]*}
    [ $status = 10 ] || fails "$what: $code ${line#*: }"
    works_on "after it was refused"
    outcome "refused: $code ${line#*: }"
}

move() { # TO
    step "move to $1" migrate "$name" --to "$1" --progress none
    on "$host" pod rm "$name" >/dev/null || fails "the note that it moved cannot be removed"
    host=$1
    works_on "after the move to $1"
}

drive() {
    host=hostA asking=''
    on hostA pod run -d --name "$name" --network bridge:br0 --ip "$ADDRESS/24" "${options[@]}" -- \
        bash "$self" serve >"$WORK/said" 2>&1 || fails "pod run: $(tail -1 "$WORK/said")"
    [ -z "$port" ] || until_true "port $port to answer" reachable
    ask
    works_on "before any move"
    local round
    for round in $(seq "$MOVES"); do
        move hostB
        move hostA
    done
    step "checkpoint and stop" checkpoint create "$name" stopped --stop
    step "restore of what was stopped" restore stopped
    works_on "after the restore"
    stop_asking
    step "checkpoint" checkpoint create "$name" killed
    on hostA pod rm -f "$name" >/dev/null || fails "pod rm -f"
    step "restore of what was killed" restore killed
    ask
    works_on "after it was killed and restored"
    stop_asking
    ! defined check || on client bash "$self" check || fails "the check at the end"
    on hostA pod rm -f "$name" >/dev/null || fails "pod rm -f"
    outcome works
}

workload() {
    set -euo pipefail
    case ${1:-} in
        '')
            : "${BED:?the path of bed, as integration/workloads/run sets it}"
            WORK=$(mktemp -d /var/tmp/pod-workload.XXXXXX)
            export WORK
            chmod 755 "$WORK"
            trap 'rm -rf "$WORK"' EXIT
            # The keeper takes the hosts down however this ends.
            BED_NAME="$name-$$" BED_HOSTS="hostA hostB client" "$BED" run bash "$self" drive ;;
        drive)
            trap 'fails "the script itself, line $LINENO"' EXIT
            drive ;;
        title | did) printf '%s\n' "${!1}" ;;
        packages) printf '%s\n' "${packages[@]}" ;;
        *)
            # As Debian ships it: not what this machine has beside it.
            [ "$1" != serve ] && [ "$1" != version ] || export PATH=/usr/sbin:/usr/bin:/sbin:/bin
            "$@" ;;
    esac
}
