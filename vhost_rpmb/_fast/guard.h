/* SPDX-License-Identifier: Apache-2.0 */
/* Mappings of guest memory: the guard against SIGBUS, and page tables freed in place. The guard has
   state, so one module only may include this. */
#ifndef VHOST_RPMB_GUARD_H
#define VHOST_RPMB_GUARD_H

#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>

/* Guest memory changes at any moment: the compiler must not read it again for the copy. */
#define compiler_barrier() __asm__ __volatile__("" ::: "memory")

/* The front-end can truncate a file under its mapping; an access to it is a SIGBUS. The handler
   maps private memory of zeros in the place of the region, so that the access continues, and sets
   a mark. It calls mmap, madvise, sigaction, signal and raise only. */
#define GUARDS 1024  /* the memory table and, while it is replaced, the new one */
static struct {
    uintptr_t start;  /* 0: free */
    size_t length;
    int *lost;
} guards[GUARDS];
static struct sigaction guard_previous;
static int guard_passed_on;

/* Put private memory of zeros in a place. Touched all over, it must not become huge pages. */
static int put_zeros(void *place, size_t length) {
    if (mmap(place, length, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED)
        return -1;
    madvise(place, length, MADV_NOHUGEPAGE);
    return 0;
}

static void guard_handle(int number, siginfo_t *info, void *context) {
    uintptr_t address = (uintptr_t)info->si_addr;
    size_t index;
    (void)context;
    if (info->si_code > 0) {  /* from the kernel, for an access */
        for (index = 0; index < GUARDS; index++) {
            if (!guards[index].start || address - guards[index].start >= guards[index].length)
                continue;
            if (put_zeros((void *)guards[index].start, guards[index].length))
                break;
            *(volatile int *)guards[index].lost = 1;
            return;
        }
    }
    /* Not ours: the access is repeated under the handler that was there before. Should that
       one hand it back, the default ends the process. */
    if (guard_passed_on++)
        signal(number, SIG_DFL);
    else
        sigaction(number, &guard_previous, NULL);
    if (info->si_code <= 0)
        raise(number);
}

static int guard_install(void) {
    struct sigaction current, wanted = { .sa_sigaction = guard_handle, .sa_flags = SA_SIGINFO };
    if (sigaction(SIGBUS, NULL, &current))
        return -1;
    if (current.sa_flags & SA_SIGINFO && current.sa_sigaction == guard_handle)
        return 0;
    guard_previous = current;
    sigemptyset(&wanted.sa_mask);
    return sigaction(SIGBUS, &wanted, NULL);
}

static int guard_add(void *start, size_t length, int *lost) {
    size_t index;
    if (guard_install())
        return -1;
    for (index = 0; index < GUARDS; index++) {
        if (guards[index].start)
            continue;
        guards[index].length = length;
        guards[index].lost = lost;
        compiler_barrier();
        guards[index].start = (uintptr_t)start;
        return 0;
    }
    errno = ENOMEM;
    return -1;
}

static void guard_remove(void *start) {
    size_t index;
    for (index = 0; index < GUARDS; index++)
        if (guards[index].start == (uintptr_t)start)
            guards[index].start = 0;
}

/* Map a region anew, in place: frees its page tables. A size of 0 has mremap() map the same
   pages a second time; moving that there takes the place of the first mapping. Nothing is freed
   where there are no addresses for it, or for huge pages, which have no tables of that size. */
static void renew_mapping(char *place, size_t length, size_t at_once, int *lost) {
    while (length) {
        size_t part = length < at_once ? length : at_once;
        void *second = mremap(place, 0, part, MREMAP_MAYMOVE);
        if (second != MAP_FAILED
            && mremap(second, part, part, MREMAP_MAYMOVE | MREMAP_FIXED, place) == MAP_FAILED) {
            munmap(second, part);
            if (!put_zeros(place, part))  /* the place may be empty by now */
                *lost = 1;
        }
        place += part;
        length -= part;
    }
}

#endif
