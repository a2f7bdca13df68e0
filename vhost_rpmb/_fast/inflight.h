/* SPDX-License-Identifier: Apache-2.0 */
/* The record of one ring in an in-flight region (vhost-user, "Inflight I/O tracking"). */
#ifndef VHOST_RPMB_INFLIGHT_H
#define VHOST_RPMB_INFLIGHT_H

#include <stdint.h>

#include "packed.h"

/* Of a split ring. */
struct inflight_entry {
    uint8_t taken;
    uint8_t padding[5];
    uint16_t next;
    uint64_t counter;
};

struct inflight_record {
    uint64_t features;
    uint16_t version;
    uint16_t desc_num;
    uint16_t last_batch_head;
    uint16_t used_index;
    struct inflight_entry entries[];
};

/* A killed process leaves its stores in program order: the compiler must keep them and their
   order. No other process reads them meanwhile, so the processor's order does not matter. */
#define keep_order() __asm__ __volatile__("" ::: "memory")

static inline void record_taken(unsigned char *place, uint16_t head, uint64_t counter) {
    struct inflight_entry *entry = &((struct inflight_record *)place)->entries[head];
    entry->counter = counter;
    keep_order();
    entry->taken = 1;
    keep_order();
}

static inline void record_put(unsigned char *place, uint16_t head, uint16_t last) {
    struct inflight_record *record = (struct inflight_record *)place;
    record->entries[head].next = last;
    keep_order();
    record->last_batch_head = head;
}

static inline void record_published(unsigned char *place, const uint16_t *heads, uint32_t count,
                                    uint16_t used_index) {
    struct inflight_record *record = (struct inflight_record *)place;
    keep_order();
    for (uint32_t index = 0; index < count; index++)
        record->entries[heads[index]].taken = 0;
    keep_order();
    record->used_index = used_index;
    keep_order();
}

/* Of a packed ring. */
struct packed_entry {
    uint8_t taken;
    uint8_t padding;
    uint16_t next;
    uint16_t last;
    uint16_t count;
    uint64_t counter;
    uint16_t id;
    uint16_t flags;
    uint32_t length;
    uint64_t address;
};

union packed_used {
    struct {
        uint16_t slot;
        uint16_t old_slot;
        uint8_t wrap;
        uint8_t old_wrap;
    };
    uint64_t both;
};

struct packed_record {
    uint64_t features;
    uint16_t version;
    uint16_t desc_num;
    uint16_t free_head;
    uint16_t old_free_head;
    union packed_used used;
    uint64_t padding;
    struct packed_entry entries[];
};

static inline void packed_begin(unsigned char *place, uint16_t head, uint64_t counter) {
    struct packed_entry *entry = &((struct packed_record *)place)->entries[head];
    entry->count = 0;
    keep_order();
    entry->counter = counter;
    keep_order();
    entry->taken = 1;
    keep_order();
}

static inline void packed_add(unsigned char *place, uint16_t head, uint16_t number, uint16_t count,
                              uint16_t free_head, const struct packed_descriptor *descriptor) {
    struct packed_record *record = (struct packed_record *)place;
    struct packed_entry *entry = &record->entries[number];
    entry->id = descriptor->id;
    entry->flags = descriptor->flags;
    entry->length = descriptor->length;
    entry->address = descriptor->address;
    keep_order();
    record->entries[head].count = count;
    keep_order();
    record->free_head = free_head;
    keep_order();
}

static inline void packed_end(unsigned char *place, uint16_t head, uint16_t last,
                              uint16_t free_head) {
    struct packed_record *record = (struct packed_record *)place;
    record->entries[head].last = last;
    keep_order();
    record->old_free_head = free_head;
    keep_order();
}

static inline void packed_put(unsigned char *place, uint16_t head, uint16_t last,
                              uint16_t free_head, uint16_t used) {
    struct packed_record *record = (struct packed_record *)place;
    record->entries[last].next = free_head;
    keep_order();
    record->free_head = head;
    keep_order();
    record->used.slot = used & 0x7fff;
    keep_order();
    record->used.wrap = (uint8_t)(used >> 15);
    keep_order();
}

static inline void packed_published(unsigned char *place, const uint16_t *heads, uint32_t count,
                                    uint16_t free_head, uint16_t used) {
    struct packed_record *record = (struct packed_record *)place;
    union packed_used both = { .slot = used & 0x7fff, .old_slot = used & 0x7fff };
    both.wrap = both.old_wrap = (uint8_t)(used >> 15);
    keep_order();
    for (uint32_t index = 0; index < count; index++)
        record->entries[heads[index]].taken = 0;
    keep_order();
    record->old_free_head = free_head;
    keep_order();
    record->used.both = both.both; /* in one store */
    keep_order();
}

#endif
