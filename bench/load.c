/* SPDX-License-Identifier: Apache-2.0
 *
 * A load generator: a vhost-user front-end and virtio-rpmb driver of as little cost as possible.
 *
 *   load SOCKET FILE [NAME=NUMBER ...]
 *
 * FILE holds request chains of frames= frames of 512 bytes each (default 1); they are sent in order,
 * count= in all (going round where the file is shorter), depth= in flight (1), each with room for
 * room= answer frames (1). With records=1 the chains differ: two numbers are before each (32 bits, in
 * this machine's byte order), its frames and its room. cpu= pins this side to one processor (-1:
 * free), pause= sleeps so many microseconds between requests, spin=1 waits awake on the used index
 * instead of asleep on the call eventfd. queue= is the queue size (0: as needed), regions= the memory
 * regions (1).
 *
 * Every answer's result field has to be 0. Prints one line: count, seconds, and the average cost of this
 * side alone per request, in microseconds; then the latencies, a line each, in microseconds: of one
 * request at depth 1, of one round of depth otherwise; with group= of so many rounds that follow each
 * other, together.
 *
 * Works against any vhost-user RPMB back-end; more than 8 regions need one that takes ADD_MEM_REG.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum {
    GET_FEATURES = 1, SET_FEATURES = 2, SET_OWNER = 3, SET_MEM_TABLE = 5, SET_VRING_NUM = 8,
    SET_VRING_ADDR = 9, SET_VRING_BASE = 10, SET_VRING_KICK = 12, SET_VRING_CALL = 13,
    GET_PROTOCOL_FEATURES = 15, SET_PROTOCOL_FEATURES = 16, SET_VRING_ENABLE = 18, ADD_MEM_REG = 37,
    SET_STATUS = 39,
};
enum { FRAME = 512, F_PROTOCOL_FEATURES = 30, F_EVENT_IDX = 29, F_VERSION_1 = 32 };
enum { P_MEM_SLOTS = 15, P_STATUS = 16 };
enum { DESC_NEXT = 1, DESC_WRITE = 2 };
static const uint64_t GUEST = 0x40000000, USER = 0x7f0000000000;

struct message {
    uint32_t request, flags, size;
    union {
        uint64_t u64;
        struct { uint32_t index, num; } state;
        struct { uint32_t index, flags; uint64_t descriptor, used, available, log; } addr;
        struct { uint32_t count, padding; uint64_t guest, size, user, offset; } memory;
        struct { uint64_t padding, guest, size, user, offset; } region;
    };
} __attribute__((packed));
struct descriptor { uint64_t addr; uint32_t len; uint16_t flags, next; };
struct available { uint16_t flags, idx, ring[]; };
struct used { uint16_t flags, idx; struct { uint32_t id, len; } ring[]; };

static int sock;

static void die(const char *what) {
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(1);
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e6 + (double)time.tv_nsec / 1e3;
}

static void tell(uint32_t request, uint32_t size, struct message *message, int fd) {
    char control[CMSG_SPACE(sizeof fd)] = {0};
    struct iovec data = {message, 12 + size};
    struct msghdr header = {.msg_iov = &data, .msg_iovlen = 1};
    message->request = request;
    message->flags = 1;
    message->size = size;
    if (fd >= 0) {
        header.msg_control = control;
        header.msg_controllen = sizeof control;
        struct cmsghdr *rights = CMSG_FIRSTHDR(&header);
        rights->cmsg_level = SOL_SOCKET;
        rights->cmsg_type = SCM_RIGHTS;
        rights->cmsg_len = CMSG_LEN(sizeof fd);
        memcpy(CMSG_DATA(rights), &fd, sizeof fd);
    }
    if (sendmsg(sock, &header, MSG_NOSIGNAL) != (ssize_t)(12 + size)) die("cannot send");
}

static uint64_t ask(uint32_t request) {
    struct message message = {0};
    tell(request, 0, &message, -1);
    if (recv(sock, &message, 20, MSG_WAITALL) != 20) die("no answer");
    return message.u64;
}

static void tell_u64(uint32_t request, uint64_t value, int fd) {
    struct message message = {.u64 = value};
    tell(request, 8, &message, fd);
}

static void tell_state(uint32_t request, uint32_t num) {
    struct message message = {.state = {0, num}};
    tell(request, 8, &message, -1);
}

static struct { const char *name; long value; } options[] = {
    {"frames", 1}, {"room", 1}, {"depth", 1}, {"count", 10000}, {"cpu", -1}, {"pause", 0},
    {"spin", 0}, {"queue", 0}, {"regions", 1}, {"records", 0}, {"group", 1},
};

static long option(const char *name) {
    for (size_t i = 0;; i++) if (!strcmp(options[i].name, name)) return options[i].value;
}

static void set_option(const char *word) {
    for (size_t i = 0; i < sizeof options / sizeof *options; i++) {
        size_t length = strlen(options[i].name);
        if (!strncmp(word, options[i].name, length) && word[length] == '=') {
            options[i].value = atol(word + length + 1);
            return;
        }
    }
    fprintf(stderr, "load: unknown option %s\n", word);
    exit(2);
}

struct chain { const unsigned char *request; uint32_t asked, answered; };

/* The chains of a file; the largest request and the most room, in bytes, are left in the last two. */
static struct chain *read_chains(const char *path, size_t *kinds, size_t *asked, size_t *answered) {
    const int records = option("records") != 0;
    uint32_t counts[2] = {(uint32_t)option("frames"), (uint32_t)option("room")};
    int file = open(path, O_RDONLY);
    off_t bytes = file < 0 ? -1 : lseek(file, 0, SEEK_END);
    if (bytes <= 0 || (!records && !counts[0])) die(path);
    const unsigned char *place = mmap(NULL, (size_t)bytes, PROT_READ, MAP_PRIVATE | MAP_POPULATE,
                                      file, 0);
    if (place == MAP_FAILED) die(path);
    const unsigned char *end = place + bytes;
    struct chain *chains = calloc((size_t)bytes / FRAME + 1, sizeof *chains);
    *kinds = *asked = *answered = 0;
    for (;;) {
        if (records) {
            if ((size_t)(end - place) < sizeof counts) break;
            memcpy(counts, place, sizeof counts);
            place += sizeof counts;
        }
        if (!counts[0] || counts[0] > (size_t)(end - place) / FRAME) break;
        chains[*kinds] = (struct chain){place, counts[0] * FRAME, counts[1] * FRAME};
        if (*asked < chains[*kinds].asked) *asked = chains[*kinds].asked;
        if (*answered < chains[*kinds].answered) *answered = chains[*kinds].answered;
        place += chains[(*kinds)++].asked;
    }
    if (!*kinds || (records && place != end)) die(path);
    return chains;
}

/* The last region is the one that is used: those before it are a page each, far apart. */
static void share(int memfd, size_t size, long regions) {
    struct message message;
    for (long i = 1; i < regions; i++) {
        uint64_t place = (uint64_t)i * 65536;
        message = (struct message){.region = {0, place, 4096, place, 0}};
        tell(ADD_MEM_REG, 40, &message, memfd);
    }
    if (regions > 1) {
        message = (struct message){.region = {0, GUEST, size, USER, 0}};
        tell(ADD_MEM_REG, 40, &message, memfd);
    } else {
        message = (struct message){.memory = {1, 0, GUEST, size, USER, 0}};
        tell(SET_MEM_TABLE, 40, &message, memfd);
    }
}

int main(int argc, char **argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: load SOCKET FILE [NAME=NUMBER ...]\n");
        return 2;
    }
    for (int i = 3; i < argc; i++) set_option(argv[i]);
    const size_t depth = (size_t)option("depth"), count = (size_t)option("count");
    const size_t group = (size_t)option("group");
    const long cpu = option("cpu"), pause = option("pause"), spin = option("spin");
    if (cpu >= 0) {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET((size_t)cpu, &set);
        if (sched_setaffinity(0, sizeof set, &set)) die("cannot pin");
    }

    size_t kinds, asked, answered;
    const struct chain *chains = read_chains(argv[2], &kinds, &asked, &answered);

    /* Guest memory: the ring in its first 64 KiB, then DEPTH requests, then DEPTH answers. */
    size_t queue = option("queue") ? (size_t)option("queue") : 16;
    while (queue < 2 * depth) queue *= 2;
    const size_t rings = 65536 + queue * 32;
    size_t size = rings + depth * (asked + answered);
    size = (size + 4095) & ~(size_t)4095;
    int memfd = memfd_create("guest", 0);
    if (memfd < 0 || ftruncate(memfd, (off_t)size)) die("memfd");
    unsigned char *guest = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
                                memfd, 0);
    if (guest == MAP_FAILED) die("mmap");
    struct descriptor *table = (void *)guest;
    struct available *available = (void *)(guest + queue * 16);
    const size_t used_at = (queue * 18 + 6 + 4095) & ~(size_t)4095;
    struct used *used = (void *)(guest + used_at);
    uint16_t *used_event = &available->ring[queue];
    const uint16_t *available_event = (void *)&used->ring[queue];

    struct sockaddr_un name = {.sun_family = AF_UNIX};
    strncpy(name.sun_path, argv[1], sizeof name.sun_path - 1);
    sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    /* A back-end that ends with its connection may be about to be started again. */
    const struct timespec moment = {0, 10000000};
    for (int tries = 0; sock < 0 || connect(sock, (void *)&name, sizeof name); tries++) {
        if (sock < 0 || tries == 1000) die(argv[1]);
        nanosleep(&moment, NULL);
    }
    int kick = eventfd(0, EFD_NONBLOCK), call = eventfd(0, EFD_NONBLOCK);

    uint64_t features = ask(GET_FEATURES), wanted = 1ull << F_VERSION_1 | 1ull << F_EVENT_IDX;
    const int event_index = features >> F_EVENT_IDX & 1;
    uint64_t protocol = 0;
    if (features >> F_PROTOCOL_FEATURES & 1) {
        protocol = ask(GET_PROTOCOL_FEATURES) & (1ull << P_STATUS | 1ull << P_MEM_SLOTS);
        tell_u64(SET_PROTOCOL_FEATURES, protocol, -1);
        wanted |= 1ull << F_PROTOCOL_FEATURES;
    }
    struct message message = {0};
    tell(SET_OWNER, 0, &message, -1);
    tell_u64(SET_FEATURES, features & wanted, -1);
    share(memfd, size, option("regions"));
    tell_state(SET_VRING_NUM, (uint32_t)queue);
    tell_state(SET_VRING_BASE, 0);
    message = (struct message){.addr = {0, 0, USER, USER + used_at, USER + queue * 16, 0}};
    tell(SET_VRING_ADDR, 40, &message, -1);
    tell_u64(SET_VRING_KICK, 0, kick);
    tell_u64(SET_VRING_CALL, 0, call);
    if (protocol >> P_STATUS & 1) tell_u64(SET_STATUS, 15, -1);
    tell_state(SET_VRING_ENABLE, 1);

    /* Chain i is descriptors 2i (readable) and 2i + 1 (writable), at the same places for good. */
    for (size_t i = 0; i < depth; i++) {
        uint64_t place = GUEST + rings + i * (asked + answered);
        table[2 * i] = (struct descriptor){place, 0, 0, (uint16_t)(2 * i + 1)};
        table[2 * i + 1] = (struct descriptor){place + asked, 0, DESC_WRITE, 0};
    }

    const size_t rounds = (count + depth - 1) / depth, groups = rounds / group;
    double *latencies = calloc(groups + 1, sizeof *latencies);
    size_t sent = 0;
    uint16_t next = 0;
    double start = now(), waited = 0;
    for (size_t round = 0; round < rounds; round++) {
        uint16_t old = next;
        for (size_t i = 0; i < depth; i++, next++, sent++) {
            unsigned char *place = guest + rings + i * (asked + answered);
            const struct chain *chain = &chains[sent % kinds];
            memcpy(place, chain->request, chain->asked);
            table[2 * i].len = chain->asked;
            table[2 * i].flags = chain->answered ? DESC_NEXT : 0;
            table[2 * i + 1].len = chain->answered;
            available->ring[next & (queue - 1)] = (uint16_t)(2 * i);
        }
        if (pause) {
            struct timespec time = {0, pause * 1000};
            nanosleep(&time, NULL);
        }
        double begin = now();
        /* One call, when all have come back; or none, as what is past does not come again soon. */
        *used_event = (uint16_t)(spin ? old - 1 : next - 1);
        available->flags = (uint16_t)spin;
        __atomic_store_n(&available->idx, next, __ATOMIC_RELEASE);
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        int wants = event_index
            ? (uint16_t)(next - *available_event - 1) < (uint16_t)(next - old)
            : !(__atomic_load_n(&used->flags, __ATOMIC_RELAXED) & 1);
        if (wants && eventfd_write(kick, 1)) die("kick");
        double asleep = now();
        while (__atomic_load_n(&used->idx, __ATOMIC_ACQUIRE) != next) {
            if (spin) continue;
            struct pollfd wait[2] = {{call, POLLIN, 0}, {sock, POLLRDHUP, 0}};
            eventfd_t value;
            if (poll(wait, 2, 10000) <= 0) { fprintf(stderr, "load: no answer\n"); return 1; }
            if (wait[1].revents) { fprintf(stderr, "load: the back-end hung up\n"); return 1; }
            eventfd_read(call, &value);
        }
        double end = now();
        waited += end - asleep;
        latencies[round / group] += end - begin;
        for (size_t i = 0; i < depth; i++) {
            if (!chains[(sent - depth + i) % kinds].answered) continue;
            const unsigned char *answer = guest + rings + i * (asked + answered) + asked;
            if (answer[508] || answer[509]) {
                fprintf(stderr, "load: request %zu: result 0x%02x%02x\n", sent - depth + i,
                        answer[508], answer[509]);
                return 1;
            }
        }
    }
    double total = now() - start;
    double own = (total - waited) / (double)sent - (double)pause;
    printf("%zu %.6f %.3f\n", sent, total / 1e6, own);
    for (size_t i = 0; i < groups; i++) printf("%.3f\n", latencies[i]);
    return 0;
}
