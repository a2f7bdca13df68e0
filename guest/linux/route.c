// SPDX-License-Identifier: GPL-2.0
/*
 * The device of the kernel's RPMB subsystem (Linux 6.12 and later, CONFIG_RPMB). Its user is
 * OP-TEE's driver, which stops using a device until the next boot after it fails: a request here
 * ends with an answer or with the removal of the device, never with a timeout or a signal.
 *
 * The subsystem counts no references on this module or on the virtio device, and its users keep
 * an rpmb_dev after it was unregistered. Therefore the module stays loaded while a device is
 * registered or still in use, and the pointer that comes with a request is looked up here, and not
 * followed.
 */
#include <linux/module.h>
#include <linux/rpmb.h>
#include <linux/string.h>
#include <linux/virtio.h>

#include "virtio_rpmb.h"

static LIST_HEAD(vrpmb_registered);
static DEFINE_MUTEX(vrpmb_registered_lock);

static struct vrpmb *vrpmb_find(struct device *dev)
{
	struct vrpmb *rpmb;

	guard(mutex)(&vrpmb_registered_lock);
	list_for_each_entry(rpmb, &vrpmb_registered, registered) {
		if (&rpmb->vdev->dev == dev) {
			kref_get(&rpmb->kref);
			return rpmb;
		}
	}
	return NULL;
}

/*
 * Complete the request in rpmb->request for an answer of @room frames: users of the subsystem leave
 * block_count 0 and send no RESULT_READ. Return the number of frames.
 */
static int vrpmb_complete_request(struct vrpmb *rpmb, unsigned int frames, unsigned int room)
{
	struct vrpmb_frame *first = rpmb->request;
	u16 type = vrpmb_type(first);
	unsigned int i;

	if (frames > 1 && type != VRPMB_DATA_WRITE)
		return -EINVAL;
	for (i = 1; i < frames; i++)
		if (first[i].req_resp != first->req_resp)
			return -EINVAL;

	switch (type) {
	case VRPMB_PROGRAM_KEY:
	case VRPMB_GET_WRITE_COUNTER:
	case VRPMB_DATA_READ:
		if (!first->block_count)
			first->block_count = cpu_to_be16(type == VRPMB_DATA_READ ? room : 1);
		break;
	case VRPMB_DATA_WRITE:
		break;
	default:
		return -EINVAL;
	}
	if (type == VRPMB_PROGRAM_KEY || type == VRPMB_DATA_WRITE) {
		first[frames] = (struct vrpmb_frame) {
			.block_count = cpu_to_be16(1),
			.req_resp = cpu_to_be16(VRPMB_RESULT_READ),
		};
		frames++;
	}
	return frames;
}

static int vrpmb_route_frames(struct device *dev, u8 *req, unsigned int req_len, u8 *resp,
			      unsigned int resp_len)
{
	unsigned int room = resp_len / sizeof(struct vrpmb_frame);
	struct vrpmb *rpmb;
	int frames, err;

	frames = req_len / sizeof(struct vrpmb_frame);
	if (!frames || !room || req_len % sizeof(struct vrpmb_frame) ||
	    resp_len % sizeof(struct vrpmb_frame))
		return -EINVAL;

	rpmb = vrpmb_find(dev);
	if (!rpmb)
		return -ENODEV;
	err = -EINVAL;
	if (frames >= VRPMB_MAX_FRAMES || room > rpmb->max_room)
		goto put;
	err = vrpmb_begin(rpmb, false);
	if (err)
		goto put;
	memcpy(rpmb->request, req, req_len);
	frames = vrpmb_complete_request(rpmb, frames, room);
	err = frames < 0 ? frames : vrpmb_exchange(rpmb, frames, room);
	if (!err)
		memcpy(resp, rpmb->response, resp_len);
	vrpmb_end(rpmb);
put:
	vrpmb_put(rpmb);
	return err;
}

/* Without a registration the character device still works. */
void vrpmb_route_register(struct vrpmb *rpmb)
{
	struct device *dev = &rpmb->vdev->dev;
	struct rpmb_descr descr = {
		.type = RPMB_TYPE_EMMC,
		.route_frames = vrpmb_route_frames,
		.dev_id = rpmb->dev_id,
		.dev_id_len = sizeof(rpmb->dev_id),
		/* In units of two blocks: OP-TEE writes twice as many blocks at once. */
		.reliable_wr_count = rpmb->write_sectors,
		.capacity = rpmb->capacity,
	};
	struct rpmb_dev *rdev;

	if (!rpmb->write_sectors) {
		dev_warn(dev, "%s: not registered with the RPMB subsystem: expected a device that writes at least 2 blocks at once\n",
			 rpmb->name);
		return;
	}
	if (!try_module_get(THIS_MODULE))	/* it is being unloaded */
		return;
	scoped_guard(mutex, &vrpmb_registered_lock)
		list_add(&rpmb->registered, &vrpmb_registered);
	rdev = rpmb_dev_register(dev, &descr);
	if (IS_ERR(rdev)) {
		dev_err(dev, "%s: not registered with the RPMB subsystem: error %ld\n",
			rpmb->name, PTR_ERR(rdev));
		scoped_guard(mutex, &vrpmb_registered_lock)
			list_del_init(&rpmb->registered);
		module_put(THIS_MODULE);
		return;
	}
	rpmb->rdev = rdev;
}

void vrpmb_route_unregister(struct vrpmb *rpmb)
{
	struct rpmb_dev *rdev = rpmb->rdev;

	if (!rdev)
		return;
	scoped_guard(mutex, &vrpmb_registered_lock)
		list_del_init(&rpmb->registered);
	rpmb_dev_get(rdev);
	rpmb_dev_unregister(rdev);
	/* Only a holder can take another reference now. */
	if (kref_read(&rdev->dev.kobj.kref) > 1)
		dev_warn(&rpmb->vdev->dev, "%s: removed while in use, the module stays loaded\n",
			 rpmb->name);
	else
		module_put(THIS_MODULE);
	rpmb_dev_put(rdev);
}
