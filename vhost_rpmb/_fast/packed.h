/* SPDX-License-Identifier: Apache-2.0 */
/* Access to a packed ring in guest memory, little-endian, which the driver accesses at the same
   time. */
#ifndef VHOST_RPMB_PACKED_H
#define VHOST_RPMB_PACKED_H

#include <endian.h>
#include <stdint.h>
#include <string.h>

#include "ring.h"

struct packed_descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t id;
    uint16_t flags;
};

static inline struct packed_descriptor make_packed(uint64_t address, uint64_t rest) {
    return (struct packed_descriptor){ address, (uint32_t)rest, (uint16_t)(rest >> 32),
                                       (uint16_t)(rest >> 48) };
}

static inline struct packed_descriptor load_packed(const unsigned char *source) {
    return make_packed(load_word(source), load_word(source + 8));
}

/* The second half of a descriptor in the ring, before the first one: its flags say whether the
   driver made both. In one access, because slots are aligned. */
static inline uint64_t load_packed_rest(const unsigned char *slot) {
    return le64toh(__atomic_load_n((const uint64_t *)(slot + 8), __ATOMIC_ACQUIRE));
}

/* The second half of a used descriptor without the flags of a lap: length, id, which the token of
   the chain has in the same place, and WRITE if there is a length, whose negative has all higher
   bits. */
static inline uint64_t make_packed_used(uint64_t token, uint32_t length) {
    return (token & UINT64_C(0xffff) << 32) | length | (-(uint64_t)length & UINT64_C(2) << 48);
}

/* Store it. */
static inline void store_packed_used(unsigned char *slot, uint64_t used) {
    used = htole64(used);
    memcpy(slot + 8, &used, sizeof used);
}

/* Store one after all writes before, which its flags show to the driver. In one access. */
static inline void publish_packed_used(unsigned char *slot, uint64_t used) {
    __atomic_store_n((uint64_t *)(slot + 8), htole64(used), __ATOMIC_RELEASE);
}

/* An event area: a position and flags, in one access. */
static inline uint32_t load_area(const unsigned char *area) {
    return le32toh(__atomic_load_n((const uint32_t *)area, __ATOMIC_ACQUIRE));
}

static inline uint32_t make_area(uint16_t position, uint16_t flags) {
    return position | (uint32_t)flags << 16;
}

#endif
