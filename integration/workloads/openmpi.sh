#!/bin/bash
# Open MPI: three ranks on one host, over shared memory, launched by mpirun.
. "$(dirname "$0")/lib.sh"
title="Open MPI"
packages=(openmpi-bin python3-mpi4py python3-numpy)
did="three ranks pass a token round and reduce arrays; every sum is checked"

version() { mpirun.openmpi --version | sed -n '1s/.* //p'; }

serve() {
    cat >/tmp/ring.py <<'END'
from mpi4py import MPI
import itertools, numpy
world = MPI.COMM_WORLD
rank, size = world.Get_rank(), world.Get_size()
for count in itertools.count(1):
    for turn in range(20):
        if rank == 0:
            world.send(count, dest=1)
            token = world.recv(source=size - 1)
            if token != count + size - 1:
                print(f"FAIL token {token}", flush=True)
                world.Abort(1)
        else:
            world.send(world.recv(source=rank - 1) + 1, dest=(rank + 1) % size)
    total = world.allreduce(numpy.full(50000, rank + count, dtype=numpy.int64))
    if not (total == count * size + size * (size - 1) // 2).all():
        print("FAIL sum", flush=True)
        world.Abort(1)
    if rank == 0:
        print("ok", flush=True)
END
    exec mpirun.openmpi --allow-run-as-root --oversubscribe -np 3 --mca mpi_yield_when_idle 1 --mca btl self,vader \
        python3 /tmp/ring.py
}

workload "$@"
