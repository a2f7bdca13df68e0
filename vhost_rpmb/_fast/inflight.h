/* SPDX-License-Identifier: Apache-2.0 */
/* The record of one split ring in an in-flight region (vhost-user, "Inflight I/O tracking"). */
#ifndef VHOST_RPMB_INFLIGHT_H
#define VHOST_RPMB_INFLIGHT_H

#include <stdint.h>

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

#endif
