// SPDX-License-Identifier: GPL-2.0
/*
 * A user of the kernel's RPMB subsystem, in the place of OP-TEE's driver: it hears of devices by an
 * interface of the class, finds one, keeps it, and sends frames. /dev/rpmb-route leads to user space:
 * a write has the number of frames for the answer (u32) and the request, the next read gets the
 * answer. Before the first write a read gets the description of the device.
 */
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/rpmb.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#define MAX_BYTES (2048 * sizeof(struct rpmb_frame))

struct route {
	struct rpmb_dev *rdev;
	char *answer;
	size_t length;
};

static int route_any(struct device *dev, const void *data)
{
	return 1;
}

static int route_open(struct inode *inode, struct file *filp)
{
	struct route *route = kzalloc(sizeof(*route), GFP_KERNEL);
	const struct rpmb_descr *descr;

	if (!route)
		return -ENOMEM;
	route->rdev = rpmb_dev_find_device(NULL, NULL, route_any);
	if (!route->rdev) {
		kfree(route);
		return -ENODEV;
	}
	descr = &route->rdev->descr;
	route->answer = kasprintf(GFP_KERNEL, "type %d, capacity %u, reliable writes %u, id %*phN\n",
				  descr->type, descr->capacity, descr->reliable_wr_count,
				  (int)descr->dev_id_len, descr->dev_id);
	route->length = strlen(route->answer);
	filp->private_data = route;
	return 0;
}

static int route_release(struct inode *inode, struct file *filp)
{
	struct route *route = filp->private_data;

	rpmb_dev_put(route->rdev);
	kfree(route->answer);
	kfree(route);
	return 0;
}

static ssize_t route_write(struct file *filp, const char __user *from, size_t count, loff_t *pos)
{
	struct route *route = filp->private_data;
	size_t length;
	u32 frames;
	u8 *request;
	int err;

	if (count <= sizeof(frames) || count > MAX_BYTES)
		return -EINVAL;
	if (copy_from_user(&frames, from, sizeof(frames)))
		return -EFAULT;
	length = frames * sizeof(struct rpmb_frame);
	if (length > MAX_BYTES)
		return -EINVAL;
	request = memdup_user(from + sizeof(frames), count - sizeof(frames));
	if (IS_ERR(request))
		return PTR_ERR(request);
	kfree(route->answer);
	route->length = 0;
	route->answer = kzalloc(length, GFP_KERNEL);
	err = -ENOMEM;
	if (route->answer)
		err = rpmb_route_frames(route->rdev, request, count - sizeof(frames),
					route->answer, length);
	kfree(request);
	if (err)
		return err;
	route->length = length;
	*pos = 0;
	return count;
}

static ssize_t route_read(struct file *filp, char __user *to, size_t count, loff_t *pos)
{
	struct route *route = filp->private_data;

	return simple_read_from_buffer(to, count, pos, route->answer, route->length);
}

static const struct file_operations route_fops = {
	.owner = THIS_MODULE,
	.open = route_open,
	.release = route_release,
	.read = route_read,
	.write = route_write,
};

static struct miscdevice route_misc = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "rpmb-route",
	.fops = &route_fops,
};

static int route_added(struct device *dev)
{
	dev_info(dev, "added\n");
	return 0;
}

static struct class_interface route_interface = {
	.add_dev = route_added,
};

static int __init route_init(void)
{
	int err = rpmb_interface_register(&route_interface);

	if (err)
		return err;
	err = misc_register(&route_misc);
	if (err)
		rpmb_interface_unregister(&route_interface);
	return err;
}

static void __exit route_exit(void)
{
	misc_deregister(&route_misc);
	rpmb_interface_unregister(&route_interface);
}

module_init(route_init);
module_exit(route_exit);

MODULE_DESCRIPTION("Access to the kernel's RPMB subsystem for tests");
MODULE_LICENSE("GPL");
