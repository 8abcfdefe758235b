#!/bin/bash
# MPICH: three ranks on one host, launched by Hydra.
. "$(dirname "$0")/lib.sh"
title="MPICH"
packages=(mpich libmpich-dev gcc libc6-dev)
did="three ranks pass a token round and reduce arrays; every sum is checked"

version() { mpichversion | sed -n 's/.*Version:[[:space:]]*//p'; }

serve() {
    cat >/tmp/ring.c <<'END'
#include <mpi.h>
#include <stdio.h>
int main(int argc, char **argv) {
    int rank, size;
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    static long mine[50000], all[50000];
    for (long count = 1;; count++) {
        for (int turn = 0; turn < 20; turn++) {
            long token = count;
            if (rank == 0) {
                MPI_Send(&token, 1, MPI_LONG, 1, 0, MPI_COMM_WORLD);
                MPI_Recv(&token, 1, MPI_LONG, size - 1, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
                if (token != count + size - 1) { printf("FAIL token %ld\n", token); MPI_Abort(MPI_COMM_WORLD, 1); }
            } else {
                MPI_Recv(&token, 1, MPI_LONG, rank - 1, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
                token++;
                MPI_Send(&token, 1, MPI_LONG, (rank + 1) % size, 0, MPI_COMM_WORLD);
            }
        }
        for (int i = 0; i < 50000; i++) mine[i] = rank + count + i;
        MPI_Allreduce(mine, all, 50000, MPI_LONG, MPI_SUM, MPI_COMM_WORLD);
        for (int i = 0; i < 50000; i++)
            if (all[i] != (count + i) * size + size * (size - 1) / 2) { printf("FAIL sum\n"); MPI_Abort(MPI_COMM_WORLD, 1); }
        if (rank == 0) { printf("ok\n"); fflush(stdout); }
    }
}
END
    mpicc.mpich -O2 -o /tmp/ring /tmp/ring.c
    exec mpiexec.hydra -n 3 /tmp/ring
}

workload "$@"
