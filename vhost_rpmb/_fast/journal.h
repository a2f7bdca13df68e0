/* SPDX-License-Identifier: Apache-2.0 */
/* The journal of the result register: two entries of 32 bytes (see vhost_rpmb/_pure/journal.py). */
#ifndef VHOST_RPMB_JOURNAL_H
#define VHOST_RPMB_JOURNAL_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct journal_entry {
    uint64_t sequence; /* 0: void */
    uint32_t used;
    uint8_t valid;
    uint8_t unused;
    uint16_t req_resp;
    uint16_t result;
    uint16_t address;
    uint32_t write_counter;
    uint32_t check;
    uint32_t padding;
};

/* FNV-1a over the words before the check value. */
static inline uint32_t journal_check(const struct journal_entry *entry) {
    uint32_t words[offsetof(struct journal_entry, check) / sizeof(uint32_t)];
    uint32_t value = 0x811c9dc5;
    memcpy(words, entry, sizeof words);
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        value = (value ^ words[i]) * 0x01000193;
    return value;
}

/* Write an entry behind the one with a sequence number; return its own. A process that is killed
   has executed its stores in program order, so that only the compiler must keep it. */
static inline uint64_t journal_store(
    unsigned char *journal, uint64_t sequence, struct journal_entry entry
) {
    const uint64_t none = 0;
    unsigned char *place;
    sequence += 1;
    place = journal + sequence % 2 * sizeof entry;
    entry.sequence = sequence;
    entry.check = journal_check(&entry);
    memcpy(place, &none, sizeof none);
    __asm__ __volatile__("" : : : "memory");
    memcpy(place + sizeof sequence, (const unsigned char *)&entry + sizeof sequence,
           sizeof entry - sizeof sequence);
    __asm__ __volatile__("" : : : "memory");
    memcpy(place, &sequence, sizeof sequence);
    __asm__ __volatile__("" : : : "memory");
    return sequence;
}

/* Copy an entry out; tell whether it is intact. */
static inline int journal_load(
    struct journal_entry *entry, const unsigned char *journal, size_t index
) {
    memcpy(entry, journal + index * sizeof *entry, sizeof *entry);
    return entry->sequence && entry->check == journal_check(entry);
}

#endif
