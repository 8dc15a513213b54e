// The protocol of shared_memory.c with threads for ranks, for ThreadSanitizer: it knows atomics, and reports any access
// to a slot or a header that they do not order. Usage: shared_memory_threads RANKS CALLS. Prints what went wrong.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "../../../syncbn/nn/kernels/shared_memory.c"

enum { CAPACITY = 64 };
static void *memory;
static int ranks;
static uint32_t calls;

static void *run(void *argument) {
    const int rank = (int)(intptr_t)argument;
    unsigned int seed = (unsigned int)rank + 1;
    for (uint32_t call = 1; call <= calls; call++) {
        double values[CAPACITY];
        const int64_t count = 1 + call * 7 % CAPACITY;
        for (int64_t i = 0; i < count; i++) values[i] = rank + 1 + i + call;
        if (rand_r(&seed) % 64 == 0) usleep(rand_r(&seed) % 200);
        int code = syncbn_shared_all_sum(memory, ranks, CAPACITY, rank, call, values, count, 0, count, "here",
                                         rand_r(&seed) % 100, 1000000);
        while (code == LATE)
            code = syncbn_shared_receive(memory, ranks, CAPACITY, rank, call, values, count, 0, 1000000);
        if (code != DONE) printf("rank %d, call %u: code %d\n", rank, call, code), exit(1);
        for (int64_t i = 0; i < count; i++) {
            const double expected = ranks * (ranks + 1) / 2 + ranks * (double)(i + call);
            if (values[i] != expected) printf("rank %d, call %u: %g, not %g\n", rank, call, values[i], expected), exit(1);
        }
    }
    return NULL;
}

int main(int count, char **arguments) {
    if (count != 3) return 2;
    ranks = atoi(arguments[1]);
    calls = (uint32_t)atoi(arguments[2]);
    memory = aligned_alloc(LINE, (size_t)(syncbn_shared_size(ranks, CAPACITY) + LINE - 1) / LINE * LINE);
    memset(memory, 0, (size_t)syncbn_shared_size(ranks, CAPACITY));
    pthread_t threads[64];
    for (int rank = 0; rank < ranks; rank++) pthread_create(&threads[rank], NULL, run, (void *)(intptr_t)rank);
    for (int rank = 0; rank < ranks; rank++) pthread_join(threads[rank], NULL);
    printf("%u calls on %d ranks\n", calls, ranks);
    return 0;
}
