/* SPDX-License-Identifier: Apache-2.0 */
/* Frames at any alignment: their big-endian fields, and all that is not stuff. */
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

/* A whole frame without its stuff bytes: what is behind byte 192. In two parts, because of one that
   has more than 256 bytes gcc makes a string instruction, which takes long to start. */
static inline void copy_frame(unsigned char *target, const unsigned char *frame) {
    memcpy(target + 192, frame + 192, 256);
    memcpy(target + 448, frame + 448, 64);
}

static inline void clear_frame(unsigned char *frame) {
    memset(frame + 192, 0, 256);
    memset(frame + 448, 0, 64);
}

#endif
