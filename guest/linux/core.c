// SPDX-License-Identifier: GPL-2.0
/*
 * Guest driver for the virtio RPMB device (device ID 28): the virtio device, and one exchange with
 * it at a time. Its users are the ioctls of ioctl.c and the kernel's RPMB subsystem in route.c.
 *
 * No request times out. A write that is answered late was done all the same: to repeat it, as its
 * sender would after an error, fails with COUNT_FAILURE, and OP-TEE stops using its RPMB then.
 */
#include <linux/hex.h>
#include <linux/idr.h>
#include <linux/mmc/ioctl.h>
#include <linux/module.h>
#include <linux/pm.h>
#include <linux/scatterlist.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/sysfs.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ids.h>

#include "virtio_rpmb.h"

#define VRPMB_MAX_CAPACITY	128	/* in units of 128 KiB */
#define VRPMB_UNIT_BLOCKS	512	/* in such a unit */
#define VRPMB_MAX_DEVICES	1000

/* The largest read with one command of an eMMC node, where the device sets no limit. */
#define VRPMB_MAX_READ		(MMC_IOC_MAX_BYTES / sizeof(struct vrpmb_frame))

/* A wait this long is logged, and ends before the kernel's detector of hung tasks reports it. */
#define VRPMB_LATE		(30 * HZ)

struct vrpmb_config {
	u8 capacity;
	u8 max_wr_cnt;
	u8 max_rd_cnt;
} __packed;

static char *dev_id[8];
static unsigned int dev_ids;
module_param_array(dev_id, charp, &dev_ids, 0444);
MODULE_PARM_DESC(dev_id,
		 "32 hex digits for each device, the identity that OP-TEE derives its key from (default: \"virtio-rpmb-\", three digits of the device's number, a zero byte)");

static DEFINE_IDA(vrpmb_ida);

static void vrpmb_free(struct kref *kref)
{
	struct vrpmb *rpmb = container_of(kref, struct vrpmb, kref);

	ida_free(&vrpmb_ida, rpmb->index);
	kfree(rpmb->request);
	kfree(rpmb->response);
	kfree(rpmb);
}

void vrpmb_put(struct vrpmb *rpmb)
{
	kref_put(&rpmb->kref, vrpmb_free);
}

/* The requestq's interrupt. At most one chain is in flight. */
static void vrpmb_done(struct virtqueue *vq)
{
	struct vrpmb *rpmb = vq->vdev->priv;
	unsigned long flags;
	unsigned int used;

	spin_lock_irqsave(&rpmb->vq_lock, flags);
	if (virtqueue_get_buf(vq, &used)) {
		rpmb->used = used;
		complete(&rpmb->done);
	}
	spin_unlock_irqrestore(&rpmb->vq_lock, flags);
}

/* Wait for the device to be resumed (awake) or to return the buffers (done). */
static int vrpmb_wait(struct vrpmb *rpmb, struct completion *event)
{
	bool late = false;
	long left;

	for (;;) {
		if (rpmb->killable)
			left = wait_for_completion_killable_timeout(event, VRPMB_LATE);
		else
			left = wait_for_completion_timeout(event, VRPMB_LATE);
		if (READ_ONCE(rpmb->gone))
			return -ENODEV;
		if (left < 0)
			return -EINTR;
		if (left)
			break;
		if (!late)
			dev_warn(&rpmb->vdev->dev, "%s: no answer yet, still waiting\n",
				 rpmb->name);
		late = true;
	}
	if (late)
		dev_info(&rpmb->vdev->dev, "%s: answered\n", rpmb->name);
	return 0;
}

/* Wait until the virtio device has given the buffers back. */
static int vrpmb_wait_done(struct vrpmb *rpmb)
{
	int err;

	if (!rpmb->in_flight)
		return 0;
	err = vrpmb_wait(rpmb, &rpmb->done);
	if (!err)
		rpmb->in_flight = false;
	return err;
}

/*
 * Take the device and its buffers for one exchange or more. SIGKILL ends a killable wait; the
 * buffers then stay with the virtio device, and the next user waits for them here.
 */
int vrpmb_begin(struct vrpmb *rpmb, bool killable)
{
	int err;

	if (!killable)
		mutex_lock(&rpmb->lock);
	else if (mutex_lock_killable(&rpmb->lock))
		return -EINTR;
	rpmb->killable = killable;
	err = vrpmb_wait(rpmb, &rpmb->awake);
	if (!err)
		err = vrpmb_wait_done(rpmb);
	if (err)
		mutex_unlock(&rpmb->lock);
	return err;
}

void vrpmb_end(struct vrpmb *rpmb)
{
	mutex_unlock(&rpmb->lock);
}

/*
 * Send the first @frames frames of rpmb->request with room for @room frames in rpmb->response.
 * Return how many whole frames came back, or a negative error.
 */
static int vrpmb_submit(struct vrpmb *rpmb, unsigned int frames, unsigned int room)
{
	struct scatterlist readable, writable, *sgs[] = { &readable, &writable };
	unsigned long flags;
	bool kick;
	int err;

	sg_init_one(&readable, rpmb->request, frames * sizeof(*rpmb->request));
	if (room)
		sg_init_one(&writable, rpmb->response, room * sizeof(*rpmb->response));

	spin_lock_irqsave(&rpmb->vq_lock, flags);
	err = virtqueue_add_sgs(rpmb->vq, sgs, 1, room ? 1 : 0, rpmb, GFP_ATOMIC);
	kick = !err && virtqueue_kick_prepare(rpmb->vq);
	spin_unlock_irqrestore(&rpmb->vq_lock, flags);
	if (err)
		return err;
	rpmb->in_flight = true;
	if (kick)
		virtqueue_notify(rpmb->vq);

	err = vrpmb_wait_done(rpmb);
	if (err)
		return err;
	if (rpmb->used > room * sizeof(*rpmb->response) ||
	    rpmb->used % sizeof(*rpmb->response))
		return -EIO;
	return rpmb->used / sizeof(*rpmb->response);
}

/*
 * Send the first @frames frames of rpmb->request, and fill @room frames of rpmb->response.
 *
 * A virtio device reports a failure in one frame, an eMMC in every block it was asked for, and
 * tools look at the last one. A counter or a result is one frame too, but a read that succeeds has
 * all its blocks.
 */
int vrpmb_exchange(struct vrpmb *rpmb, unsigned int frames, unsigned int room)
{
	bool read = vrpmb_type(&rpmb->request[frames - 1]) == VRPMB_DATA_READ;
	struct vrpmb_frame *last;
	int answered;

	answered = vrpmb_submit(rpmb, frames, room);
	if (answered < 0)
		return answered;
	if (answered == room)
		return 0;
	if (!answered)
		return -EIO;
	last = &rpmb->response[answered - 1];
	if (read && !(be16_to_cpu(last->result) & VRPMB_RESULT_MASK))
		return -EIO;
	for (; answered < room; answered++)
		rpmb->response[answered] = *last;
	return 0;
}

/*
 * An eMMC has these in the folder of its host (mmc0:0001), where tee-supplicant reads them. A bind
 * mount of this folder shows them there.
 */
static ssize_t cid_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	struct vrpmb *rpmb = dev_to_virtio(dev)->priv;

	return sysfs_emit(buf, "%*phN\n", VRPMB_DEV_ID_SIZE, rpmb->dev_id);
}
static DEVICE_ATTR_RO(cid);

static ssize_t raw_rpmb_size_mult_show(struct device *dev, struct device_attribute *attr,
				       char *buf)
{
	struct vrpmb *rpmb = dev_to_virtio(dev)->priv;

	return sysfs_emit(buf, "%#x\n", rpmb->capacity);
}
static DEVICE_ATTR_RO(raw_rpmb_size_mult);

static ssize_t rel_sectors_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	struct vrpmb *rpmb = dev_to_virtio(dev)->priv;

	return sysfs_emit(buf, "%#x\n", rpmb->write_sectors);
}
static DEVICE_ATTR_RO(rel_sectors);

static struct attribute *vrpmb_attrs[] = {
	&dev_attr_cid.attr,
	&dev_attr_raw_rpmb_size_mult.attr,
	&dev_attr_rel_sectors.attr,
	NULL
};
ATTRIBUTE_GROUPS(vrpmb);

/* The identity that the administrator chose, or the default. */
static int vrpmb_identify(struct vrpmb *rpmb)
{
	const char *text;

	if (rpmb->index >= dev_ids) {
		snprintf(rpmb->dev_id, sizeof(rpmb->dev_id), "virtio-rpmb-%03d", rpmb->index);
		return 0;
	}
	text = dev_id[rpmb->index];
	if (strlen(text) != 2 * sizeof(rpmb->dev_id) ||
	    hex2bin(rpmb->dev_id, text, sizeof(rpmb->dev_id))) {
		dev_err(&rpmb->vdev->dev, "dev_id: expected %zu hex digits, found \"%s\"\n",
			2 * sizeof(rpmb->dev_id), text);
		return -EINVAL;
	}
	return 0;
}

static int vrpmb_start(struct vrpmb *rpmb)
{
	rpmb->vq = virtio_find_single_vq(rpmb->vdev, vrpmb_done, "requestq");
	if (IS_ERR(rpmb->vq))
		return PTR_ERR(rpmb->vq);
	virtio_device_ready(rpmb->vdev);
	return 0;
}

/* Take the buffers back, also those of a request whose wait was killed. */
static void vrpmb_stop(struct vrpmb *rpmb)
{
	virtio_reset_device(rpmb->vdev);
	rpmb->vdev->config->del_vqs(rpmb->vdev);
}

static int vrpmb_probe(struct virtio_device *vdev)
{
	struct vrpmb_config config;
	struct vrpmb *rpmb;
	int err;

	virtio_cread_bytes(vdev, 0, &config, sizeof(config));
	if (!config.capacity || config.capacity > VRPMB_MAX_CAPACITY) {
		dev_err(&vdev->dev, "capacity %u, expected 1 to %u (in 128 KiB)\n",
			config.capacity, VRPMB_MAX_CAPACITY);
		return -EINVAL;
	}

	rpmb = kzalloc(sizeof(*rpmb), GFP_KERNEL);
	if (!rpmb)
		return -ENOMEM;
	rpmb->index = ida_alloc_max(&vrpmb_ida, VRPMB_MAX_DEVICES - 1, GFP_KERNEL);
	if (rpmb->index < 0) {
		err = rpmb->index;
		kfree(rpmb);
		return err;
	}
	snprintf(rpmb->name, sizeof(rpmb->name), "rpmb%d", rpmb->index);
	rpmb->vdev = vdev;
	kref_init(&rpmb->kref);
	INIT_LIST_HEAD(&rpmb->registered);
	mutex_init(&rpmb->lock);
	spin_lock_init(&rpmb->vq_lock);
	init_completion(&rpmb->done);
	init_completion(&rpmb->awake);
	complete_all(&rpmb->awake);

	err = vrpmb_identify(rpmb);
	if (err)
		goto put;
	rpmb->capacity = config.capacity;
	rpmb->write_sectors = (config.max_wr_cnt ?: VRPMB_MAX_FRAMES - 1) / 2;
	rpmb->max_room = VRPMB_MAX_FRAMES;
	if (!config.max_rd_cnt)
		rpmb->max_room = min3(VRPMB_MAX_READ, config.capacity * (size_t)VRPMB_UNIT_BLOCKS,
				      virtio_max_dma_size(vdev) / sizeof(*rpmb->response));
	rpmb->request = kcalloc(VRPMB_MAX_FRAMES, sizeof(*rpmb->request), GFP_KERNEL);
	rpmb->response = kcalloc(rpmb->max_room, sizeof(*rpmb->response), GFP_KERNEL);
	if (!rpmb->request || !rpmb->response) {
		err = -ENOMEM;
		goto put;
	}
	vdev->priv = rpmb;

	err = vrpmb_start(rpmb);
	if (err)
		goto put;
	err = vrpmb_ioctl_register(rpmb);
	if (err)
		goto stop;
	vrpmb_route_register(rpmb);

	dev_info(&vdev->dev, "%s: %u KiB, at most %u blocks a write, %u blocks a read\n",
		 rpmb->name, config.capacity * 128u, config.max_wr_cnt,
		 config.max_rd_cnt ?: rpmb->max_room);
	return 0;

stop:
	vrpmb_stop(rpmb);
put:
	vrpmb_put(rpmb);
	return err;
}

static void vrpmb_remove(struct virtio_device *vdev)
{
	struct vrpmb *rpmb = vdev->priv;

	/* A waiting user holds the lock: wake it first. */
	WRITE_ONCE(rpmb->gone, true);
	complete_all(&rpmb->awake);
	complete_all(&rpmb->done);
	vrpmb_route_unregister(rpmb);
	vrpmb_ioctl_unregister(rpmb);

	mutex_lock(&rpmb->lock);
	vrpmb_stop(rpmb);
	mutex_unlock(&rpmb->lock);
	vrpmb_put(rpmb);
}

/*
 * Suspend and hibernation. Tasks of user space are frozen outside of the driver by then; a kernel
 * thread within a request refuses the suspend. A later request waits until the device is resumed.
 */
static int vrpmb_freeze(struct virtio_device *vdev)
{
	struct vrpmb *rpmb = vdev->priv;

	if (!mutex_trylock(&rpmb->lock))
		return -EBUSY;
	reinit_completion(&rpmb->awake);
	vrpmb_stop(rpmb);
	rpmb->in_flight = false;
	reinit_completion(&rpmb->done);
	mutex_unlock(&rpmb->lock);
	return 0;
}

/* Runs without the lock, which a waiting request holds. */
static int vrpmb_restore(struct virtio_device *vdev)
{
	struct vrpmb *rpmb = vdev->priv;
	int err;

	err = vrpmb_start(rpmb);
	if (err)
		WRITE_ONCE(rpmb->gone, true);
	complete_all(&rpmb->awake);
	return err;
}

static const struct virtio_device_id vrpmb_ids[] = {
	{ VIRTIO_ID_RPMB, VIRTIO_DEV_ANY_ID },
	{ }
};
MODULE_DEVICE_TABLE(virtio, vrpmb_ids);

static struct virtio_driver vrpmb_driver = {
	.driver.name = KBUILD_MODNAME,
	.driver.dev_groups = vrpmb_groups,
	.id_table = vrpmb_ids,
	.probe = vrpmb_probe,
	.remove = vrpmb_remove,
	.freeze = pm_sleep_ptr(vrpmb_freeze),
	.restore = pm_sleep_ptr(vrpmb_restore),
};
module_virtio_driver(vrpmb_driver);

MODULE_DESCRIPTION("virtio RPMB guest driver for eMMC tools and the kernel's RPMB subsystem");
MODULE_LICENSE("GPL");
MODULE_VERSION(VIRTIO_RPMB_VERSION);
