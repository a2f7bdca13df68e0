/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The parts of the driver: core.c has the virtio device and one exchange with it, ioctl.c the
 * character device with the ioctls of an eMMC, route.c the device of the kernel's RPMB subsystem.
 *
 * <linux/rpmb.h> takes the names rpmb_* and RPMB_*: here all begin with vrpmb_ and VRPMB_.
 */
#ifndef VIRTIO_RPMB_H
#define VIRTIO_RPMB_H

#include <linux/build_bug.h>
#include <linux/completion.h>
#include <linux/kref.h>
#include <linux/list.h>
#include <linux/miscdevice.h>
#include <linux/mutex.h>
#include <linux/spinlock.h>
#include <linux/types.h>

struct rpmb_dev;
struct virtio_device;
struct virtqueue;

/* Request types */
#define VRPMB_PROGRAM_KEY		1
#define VRPMB_GET_WRITE_COUNTER		2
#define VRPMB_DATA_WRITE		3
#define VRPMB_DATA_READ			4
#define VRPMB_RESULT_READ		5

/* Bit 7 of a result says that the write counter has expired; the rest is the result proper. */
#define VRPMB_RESULT_MASK		0x7f

/* Frames in one direction of one chain: the largest write, 255 blocks, and a RESULT_READ. */
#define VRPMB_MAX_FRAMES		256

#define VRPMB_DEV_ID_SIZE		16

struct vrpmb_frame {
	u8 stuff[196];
	u8 key_mac[32];
	u8 data[256];
	u8 nonce[16];
	__be32 write_counter;
	__be16 address;
	__be16 block_count;
	__be16 result;
	__be16 req_resp;
} __packed;
static_assert(sizeof(struct vrpmb_frame) == 512);

/*
 * The buffers belong to the device object, not to a request: after a killed wait the virtio device
 * may still write to them. They are freed when it has been reset and the last user is gone.
 */
struct vrpmb {
	struct kref kref;		/* one for the driver, each open file and each routed request */
	struct virtio_device *vdev;	/* valid while not gone, for the holder of the lock */
	struct miscdevice misc;
	int index;
	char name[16];
	u8 dev_id[VRPMB_DEV_ID_SIZE];
	u8 capacity;			/* in units of 128 KiB */
	u8 write_sectors;		/* the largest write in units of 512 bytes, as eMMC counts */

	struct rpmb_dev *rdev;		/* of the kernel's RPMB subsystem, if registered there */
	struct list_head registered;	/* entry in the list of route.c */

	struct mutex lock;		/* one chain at a time; guards what follows */
	bool killable;			/* SIGKILL ends the wait of the lock's holder */
	struct virtqueue *vq;
	struct vrpmb_frame *request;	/* device-readable, VRPMB_MAX_FRAMES */
	struct vrpmb_frame *response;	/* device-writable, max_room */
	unsigned int max_room;		/* in frames */
	bool in_flight;			/* the virtio device has the buffers */
	bool gone;			/* removed; set without the lock */
	struct completion awake;	/* not complete from freeze to restore */

	spinlock_t vq_lock;		/* between adding a chain and its interrupt */
	unsigned int used;		/* bytes written, as the virtio device says */
	struct completion done;
};

static inline u16 vrpmb_type(const struct vrpmb_frame *frame)
{
	return be16_to_cpu(frame->req_resp);
}

int vrpmb_begin(struct vrpmb *rpmb, bool killable);
int vrpmb_exchange(struct vrpmb *rpmb, unsigned int frames, unsigned int room);
void vrpmb_end(struct vrpmb *rpmb);
void vrpmb_put(struct vrpmb *rpmb);

int vrpmb_ioctl_register(struct vrpmb *rpmb);
void vrpmb_ioctl_unregister(struct vrpmb *rpmb);

#if IS_REACHABLE(CONFIG_RPMB)
void vrpmb_route_register(struct vrpmb *rpmb);
void vrpmb_route_unregister(struct vrpmb *rpmb);
#else
static inline void vrpmb_route_register(struct vrpmb *rpmb) { }
static inline void vrpmb_route_unregister(struct vrpmb *rpmb) { }
#endif

#endif
