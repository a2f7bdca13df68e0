/* SPDX-License-Identifier: Apache-2.0 */
/* Big-endian fields of a frame, at any alignment. */
#ifndef VHOST_RPMB_BYTEORDER_H
#define VHOST_RPMB_BYTEORDER_H

#include <endian.h>
#include <stdint.h>
#include <string.h>

static inline uint16_t load16(const unsigned char *field) {
    uint16_t value;
    memcpy(&value, field, sizeof value);
    return be16toh(value);
}

static inline uint32_t load32(const unsigned char *field) {
    uint32_t value;
    memcpy(&value, field, sizeof value);
    return be32toh(value);
}

static inline void store16(unsigned char *field, uint16_t value) {
    value = htobe16(value);
    memcpy(field, &value, sizeof value);
}

static inline void store32(unsigned char *field, uint32_t value) {
    value = htobe32(value);
    memcpy(field, &value, sizeof value);
}

#endif
