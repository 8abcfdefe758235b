#!/bin/bash
# Python with numpy in the processes of a pool, which get their arrays by shared memory and their orders by pipes and locks.
. "$(dirname "$0")/lib.sh"
title="Python, multiprocessing and numpy"
packages=(python3-numpy)
did="a pool of three processes multiplies parts of matrices in shared memory; the product is checked by another way"

version() { python3 -c 'import numpy, platform; print(platform.python_version(), numpy.__version__, sep=", numpy ")'; }

serve() {
    cat >/tmp/work.py <<'END'
import itertools, multiprocessing, numpy
from multiprocessing import shared_memory

def part(job):
    name, size, low, high = job
    memory = shared_memory.SharedMemory(name)
    a, b, c = numpy.ndarray((3, size, size), dtype=numpy.int64, buffer=memory.buf)
    c[low:high] = a[low:high] @ b
    del a, b, c
    memory.close()
    return high - low

if __name__ == "__main__":
    size, generator = 180, numpy.random.default_rng(7)
    memory = shared_memory.SharedMemory(create=True, size=3 * size * size * 8)
    with multiprocessing.Pool(3) as pool:
        for count in itertools.count(1):
            a, b, c = numpy.ndarray((3, size, size), dtype=numpy.int64, buffer=memory.buf)
            a[:], b[:], c[:] = generator.integers(0, 1000, (size, size)), generator.integers(0, 1000, (size, size)), 0
            done = sum(pool.imap_unordered(part, [(memory.name, size, low, low + 30) for low in range(0, size, 30)]))
            vector = generator.integers(0, 1000, size)
            right = done == size and numpy.array_equal(c @ vector, a @ (b @ vector))
            print("ok" if right else f"FAIL product {count}", flush=True)
            if not right:
                break
END
    exec python3 /tmp/work.py
}

workload "$@"
