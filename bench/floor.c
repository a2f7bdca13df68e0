/* SPDX-License-Identifier: Apache-2.0
 *
 * What physics and the libraries leave: the floors that the benchmarks are measured against.
 *
 *   floor pingpong COUNT CPU_A CPU_B   two processes wake each other through eventfds, with one
 *                                      HMAC-SHA256 of a frame a turn; prints the p50 of a turn
 *   floor hmac COUNT                   prints the average of one such HMAC, key schedule kept
 *   floor bulk COUNT                   prints the share of one frame in an HMAC of 255 of them
 *   floor sync COUNT FILE CPU          pwrite of 512 bytes and fdatasync; prints the p50
 *
 * All in microseconds.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <openssl/core_names.h>
#include <openssl/evp.h>
#include <openssl/params.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

static EVP_MAC_CTX *context;

static void die(const char *what) {
    fprintf(stderr, "floor: %s: %s\n", what, strerror(errno));
    exit(1);
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e6 + (double)time.tv_nsec / 1e3;
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, size_t count) {
    qsort(values, count, sizeof *values, compare);
    return values[count / 2];
}

static void set_key(void) {
    unsigned char key[32] = {1};
    OSSL_PARAM parameters[] = {
        OSSL_PARAM_construct_utf8_string(OSSL_MAC_PARAM_DIGEST, "SHA256", 0),
        OSSL_PARAM_construct_end(),
    };
    EVP_MAC *method = EVP_MAC_fetch(NULL, "HMAC", NULL);
    context = EVP_MAC_CTX_new(method);
    if (!context || !EVP_MAC_init(context, key, sizeof key, parameters)) die("libcrypto");
}

static void mac(void) {
    static unsigned char frame[284], value[32];
    size_t length;
    if (!EVP_MAC_init(context, NULL, 0, NULL) || !EVP_MAC_update(context, frame, sizeof frame)
        || !EVP_MAC_final(context, value, &length, sizeof value)) die("libcrypto");
}

static void pin(int cpu) {
    cpu_set_t set;
    if (cpu < 0) return;
    CPU_ZERO(&set);
    CPU_SET((size_t)cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set)) die("cannot pin");
}

static void await(int fd) {
    struct pollfd wait = {fd, POLLIN, 0};
    eventfd_t value;
    if (poll(&wait, 1, 10000) != 1 || eventfd_read(fd, &value)) die("eventfd");
}

int main(int argc, char **argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: floor pingpong COUNT CPU_A CPU_B | hmac COUNT | bulk COUNT | sync COUNT FILE CPU\n");
        return 2;
    }
    size_t count = strtoul(argv[2], NULL, 0);
    double *values = calloc(count, sizeof *values);
    if (!count || !values) die("COUNT");
    set_key();
    if (!strcmp(argv[1], "hmac")) {
        double begin = now();
        for (size_t i = 0; i < count; i++) mac();
        printf("%.4f\n", (now() - begin) / (double)count);
    } else if (!strcmp(argv[1], "bulk")) {
        static unsigned char frames[255][284], value[32];
        size_t length;
        double begin = now();
        for (size_t i = 0; i < count; i++) {
            if (!EVP_MAC_init(context, NULL, 0, NULL)) die("libcrypto");
            for (int j = 0; j < 255; j++)
                if (!EVP_MAC_update(context, frames[j], sizeof frames[j])) die("libcrypto");
            if (!EVP_MAC_final(context, value, &length, sizeof value)) die("libcrypto");
        }
        printf("%.4f\n", (now() - begin) / (double)count / 255);
    } else if (!strcmp(argv[1], "sync") && argc == 5) {
        static unsigned char block[512];
        int fd = open(argv[3], O_RDWR | O_CREAT, 0600);
        if (fd < 0) die(argv[3]);
        for (size_t i = 0; i < 256; i++) if (pwrite(fd, block, 512, (off_t)i * 512) != 512) die("write");
        if (fsync(fd)) die("fsync");
        pin(atoi(argv[4]));
        for (size_t i = 0; i < count; i++) {
            double begin = now();
            block[0]++;
            if (pwrite(fd, block, 512, (off_t)(i % 256) * 512) != 512 || fdatasync(fd)) die("write");
            values[i] = now() - begin;
        }
        printf("%.3f\n", median(values, count));
    } else if (!strcmp(argv[1], "pingpong") && argc == 5) {
        int ping = eventfd(0, 0), pong = eventfd(0, 0);
        if (!fork()) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            pin(atoi(argv[4]));
            for (;;) {
                await(ping);
                mac();
                if (eventfd_write(pong, 1)) die("eventfd");
            }
        }
        pin(atoi(argv[3]));
        for (size_t i = 0; i < count; i++) {
            double begin = now();
            if (eventfd_write(ping, 1)) die("eventfd");
            await(pong);
            values[i] = now() - begin;
        }
        printf("%.3f\n", median(values, count));
    } else {
        fprintf(stderr, "floor: wrong arguments\n");
        return 2;
    }
    return 0;
}
