/* SPDX-License-Identifier: Apache-2.0 */
/* Access to a ring in guest memory, little-endian, which the driver accesses at the same time. */
#ifndef VHOST_RPMB_RING_H
#define VHOST_RPMB_RING_H

#include <endian.h>
#include <stdint.h>
#include <string.h>

/* Order all accesses before against all after it, as the driver sees them. */
#define full_barrier() __atomic_thread_fence(__ATOMIC_SEQ_CST)

/* The fields that both sides use at once: aligned, little-endian, one access each. */
static inline uint16_t load_index(const unsigned char *field) {
    return le16toh(__atomic_load_n((const uint16_t *)field, __ATOMIC_ACQUIRE));
}

static inline void store_index(unsigned char *field, uint16_t value) {
    __atomic_store_n((uint16_t *)field, htole16(value), __ATOMIC_RELEASE);
}

static inline void store_word(unsigned char *field, uint32_t value) {
    __atomic_store_n((uint32_t *)field, htole32(value), __ATOMIC_RELEASE);
}

/* Set a bit of a byte that others change at the same time, after all writes before. */
static inline void set_bit(unsigned char *byte, unsigned int bit) {
    __atomic_fetch_or(byte, (unsigned char)(1u << bit), __ATOMIC_SEQ_CST);
}

/* Copy a little-endian word out of guest memory, into a register: the compiler must not go back
   there for it. */
static inline uint64_t load_word(const unsigned char *source) {
    uint64_t word;
    memcpy(&word, source, sizeof word);
    __asm__ __volatile__("" : "+r"(word) : : "memory");
    return le64toh(word);
}

struct descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t flags;
    uint16_t next;
};

static inline struct descriptor load_descriptor(const unsigned char *source) {
    const uint64_t address = load_word(source), rest = load_word(source + 8);
    return (struct descriptor){ address, (uint32_t)rest, (uint16_t)(rest >> 32),
                                (uint16_t)(rest >> 48) };
}

static inline void store_used(unsigned char *element, uint32_t id, uint32_t length) {
    const uint64_t used = htole64(id | (uint64_t)length << 32);
    memcpy(element, &used, sizeof used);
}

#endif
