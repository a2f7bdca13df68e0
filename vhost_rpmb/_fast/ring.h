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

struct descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t flags;
    uint16_t next;
};

/* Copy a descriptor out of guest memory; the compiler must not go back there for it. */
static inline void load_descriptor(struct descriptor *target, const unsigned char *source) {
    memcpy(target, source, sizeof *target);
    __asm__ __volatile__("" : "+m"(*target) : : "memory");
    target->address = le64toh(target->address);
    target->length = le32toh(target->length);
    target->flags = le16toh(target->flags);
    target->next = le16toh(target->next);
}

struct used_element {
    uint32_t id;
    uint32_t length;
};

static inline struct used_element make_used(uint32_t id, uint32_t length) {
    struct used_element element = { htole32(id), htole32(length) };
    return element;
}

#endif
