#!/bin/bash
# ffmpeg: x264 with threads, over and over; the same picture gives the same bytes.
. "$(dirname "$0")/lib.sh"
title="ffmpeg (x264)"
packages=(ffmpeg)
did="encodes two seconds of a test picture with two threads, over and over; each file has the sum of the first"

version() { ffmpeg -version | sed -n '1s/ffmpeg version \([^ ]*\).*/\1/p'; }

serve() {
    local first='' sum
    while :; do
        ffmpeg -nostdin -v error -y -f lavfi -i testsrc2=size=640x360:rate=25:duration=2 -c:v libx264 -threads 2 -preset fast \
            -fflags +bitexact -flags:v +bitexact /tmp/out.mkv || { echo "FAIL ffmpeg ended with $?"; exit 1; }
        sum=$(sha256sum </tmp/out.mkv)
        [ "$sum" = "${first:=$sum}" ] || { echo "FAIL other bytes"; exit 1; }
        echo ok
    done
}

ENOUGH=2
workload "$@"
