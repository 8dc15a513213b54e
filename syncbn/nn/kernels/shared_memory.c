// The all-reduce of ranks that share memory, for syncbn/nn/comm/shared_memory.py, which makes the memory and finds out
// why a rank does not come. Linux only: a rank waits in a futex.
//
// The protocol. Calls are numbered from 1 by each rank. For call k a rank
//   1. writes its header and its values into its slot k % 2,
//   2. adds 1 to `arrivals`; the rank that makes it k * ranks stores k in `complete` and wakes those that wait,
//   3. waits until `complete` is k,
//   4. compares the headers of all ranks with its own, and adds up the slots k % 2 of all ranks, in rank order.
// All ranks add in the same order, so the sums are bitwise the same.
//
// Why two slots are enough. A rank writes a slot for call k only after it has left call k - 1, so `complete` was k - 1,
// so every rank had arrived for k - 1, which it does after it has read the slots of k - 2, the last use of this one.
//
// Memory order. The write of a slot comes before the rank's own addition to `arrivals` (release). The additions of all
// ranks form one release sequence, so the last one (acquire) sees every slot. It stores `complete` (release), and who
// reads k there (acquire) sees what the last rank saw. By the same chain a rank's reads of a slot come before the write
// that reuses it. tests/nn/kernels/shared_memory_threads.c gives the protocol to ThreadSanitizer.
//
// No wake-up is lost. Who waits adds 1 to `sleepers` and then looks at `complete` again; who completes a call stores
// `complete` and then looks at `sleepers`. Both are sequentially consistent, so one of them sees the other; and the
// kernel does not let a rank sleep if `complete` has changed since it was read.
#include <errno.h>
#include <stdint.h>
#include <string.h>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { DONE = 0, LATE = 1, OUT_OF_STEP = 2, GIVEN_UP = 3, SLOTS = 2, PLACE = 240, LINE = 64 };

// What a rank says of its call. All of it has to be the same on all ranks.
typedef struct {
    int64_t numbers;    // of the whole message, which may need several calls
    int64_t from;       // the first number of this call
    char place[PLACE];  // layer and direction, filled up with zeros
} Header;

typedef struct {
    uint32_t arrivals __attribute__((aligned(LINE))); // of all ranks, in all calls; it wraps around, as `complete` does
    uint32_t complete __attribute__((aligned(LINE))); // the last call for which every rank has arrived: the futex
    uint32_t sleepers;
    uint32_t given_up __attribute__((aligned(LINE))); // not 0 once a rank waits no longer: then no rank does
} Control;

typedef struct {
    uint32_t call __attribute__((aligned(LINE))); // that the rank arrived for last; to tell which ranks are late
    Header header[SLOTS] __attribute__((aligned(LINE)));
} Member;

static Member *members(void *memory) { return (Member *)((char *)memory + sizeof(Control)); }

// The slots of a rank lie behind all headers; `capacity` is a multiple of a cache line.
static double *slot(void *memory, int ranks, int64_t capacity, int rank, uint32_t call) {
    char *data = (char *)(members(memory) + ranks);
    return (double *)data + ((int64_t)rank * SLOTS + call % SLOTS) * capacity;
}

static void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static int is_complete(Control *control, uint32_t call) {
    return __atomic_load_n(&control->complete, __ATOMIC_SEQ_CST) == call;
}

// Bytes of memory for so many ranks, with slots of `capacity` numbers.
int64_t syncbn_shared_size(int ranks, int64_t capacity) {
    return (int64_t)sizeof(Control) + ranks * ((int64_t)sizeof(Member) + SLOTS * capacity * (int64_t)sizeof(double));
}

// The memory behind a file descriptor, which can be closed then; NULL if it cannot be mapped. Python's own mmap would
// keep the descriptor open.
void *syncbn_shared_map(int descriptor, int64_t size) {
    void *memory = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

void syncbn_shared_unmap(void *memory, int64_t size) { munmap(memory, (size_t)size); }

// Steps 1 and 2: this rank's numbers for this call.
void syncbn_shared_send(void *memory, int ranks, int64_t capacity, int rank, uint32_t call, const double *values,
                        int64_t count, int64_t from, int64_t numbers, const char *place) {
    Control *control = memory;
    Member *me = members(memory) + rank;
    Header *header = &me->header[call % SLOTS];
    header->numbers = numbers;
    header->from = from;
    strncpy(header->place, place, PLACE);
    memcpy(slot(memory, ranks, capacity, rank, call), values, (size_t)count * sizeof(double));
    __atomic_store_n(&me->call, call, __ATOMIC_RELEASE);
    const uint32_t arrived = __atomic_add_fetch(&control->arrivals, 1, __ATOMIC_ACQ_REL);
    if (arrived != call * (uint32_t)ranks) return;
    __atomic_store_n(&control->complete, call, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&control->sleepers, __ATOMIC_SEQ_CST))
        syscall(SYS_futex, &control->complete, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

// Steps 3 and 4. LATE: not complete within so many nanoseconds, or a signal came; then call it again.
int syncbn_shared_receive(void *memory, int ranks, int64_t capacity, int rank, uint32_t call, double *values,
                          int64_t count, int spins, int64_t nanoseconds) {
    Control *control = memory;
    for (int i = 0; i < spins && !is_complete(control, call); i++) pause_briefly();
    if (!is_complete(control, call)) {
        __atomic_add_fetch(&control->sleepers, 1, __ATOMIC_SEQ_CST);
        const uint32_t seen = __atomic_load_n(&control->complete, __ATOMIC_SEQ_CST);
        if (seen != call && !__atomic_load_n(&control->given_up, __ATOMIC_SEQ_CST)) {
            const struct timespec limit = {nanoseconds / 1000000000, nanoseconds % 1000000000};
            syscall(SYS_futex, &control->complete, FUTEX_WAIT, seen, &limit, NULL, 0);
        }
        __atomic_sub_fetch(&control->sleepers, 1, __ATOMIC_SEQ_CST);
        if (!is_complete(control, call)) return __atomic_load_n(&control->given_up, __ATOMIC_SEQ_CST) ? GIVEN_UP : LATE;
    }
    const Header *mine = &members(memory)[rank].header[call % SLOTS];
    for (int other = 0; other < ranks; other++)
        if (memcmp(mine, &members(memory)[other].header[call % SLOTS], sizeof(Header))) return OUT_OF_STEP;
    memcpy(values, slot(memory, ranks, capacity, 0, call), (size_t)count * sizeof(double));
    for (int other = 1; other < ranks; other++) {
        const double *theirs = slot(memory, ranks, capacity, other, call);
        for (int64_t i = 0; i < count; i++) values[i] += theirs[i];
    }
    return DONE;
}

// Both in one call, since each call from Python takes a microsecond.
int syncbn_shared_all_sum(void *memory, int ranks, int64_t capacity, int rank, uint32_t call, double *values,
                          int64_t count, int64_t from, int64_t numbers, const char *place, int spins,
                          int64_t nanoseconds) {
    syncbn_shared_send(memory, ranks, capacity, rank, call, values, count, from, numbers, place);
    return syncbn_shared_receive(memory, ranks, capacity, rank, call, values, count, spins, nanoseconds);
}

// This rank waits no longer, for the sake of `blamed` (-1 for nobody): no other shall wait for it. Says who was the
// first: 1 + rank in the lower 16 bits, 1 + blamed in the upper.
uint32_t syncbn_shared_give_up(void *memory, int rank, int blamed) {
    Control *control = memory;
    uint32_t nobody = 0;
    const uint32_t mine = ((uint32_t)(blamed + 1) << 16) + (uint32_t)rank + 1;
    __atomic_compare_exchange_n(&control->given_up, &nobody, mine, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, &control->complete, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
    return __atomic_load_n(&control->given_up, __ATOMIC_SEQ_CST);
}

// The call that a rank has arrived for last, and what its header for a call says: 1 if it can be read, and 0 if not.
uint32_t syncbn_shared_arrived(void *memory, int rank) {
    return __atomic_load_n(&members(memory)[rank].call, __ATOMIC_ACQUIRE);
}

void syncbn_shared_header(void *memory, int rank, uint32_t call, int64_t *numbers, int64_t *from, char *place) {
    const Header *header = &members(memory)[rank].header[call % SLOTS];
    *numbers = header->numbers;
    *from = header->from;
    memcpy(place, header->place, PLACE);
}
#endif
