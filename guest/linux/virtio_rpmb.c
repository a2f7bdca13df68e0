// SPDX-License-Identifier: GPL-2.0
/*
 * Guest driver for the virtio RPMB device (device ID 28).
 *
 * Each device becomes a character device /dev/rpmbN that takes the two ioctls of an eMMC RPMB
 * node, MMC_IOC_CMD and MMC_IOC_MULTI_CMD, so that tools written for eMMC work as they are.
 *
 * What an eMMC sees as a row of commands becomes one virtio descriptor chain:
 *
 *   CMD25 (write multiple block): its frames join the device-readable part,
 *   CMD18 (read multiple block):  sets the room of the device-writable part and ends the chain.
 *
 * An eMMC is told the number of blocks in CMD23, beside the frame; a virtio device reads it from
 * the frame. Frames that leave block_count 0 therefore get it here. DATA_WRITE frames are never
 * touched: their MAC covers the field, so it is filled already.
 */
#include <linux/capability.h>
#include <linux/completion.h>
#include <linux/fs.h>
#include <linux/idr.h>
#include <linux/kref.h>
#include <linux/miscdevice.h>
#include <linux/mmc/ioctl.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/scatterlist.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/string.h>
#include <linux/uaccess.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ids.h>

/* eMMC commands that carry RPMB frames */
#define CMD_READ_MULTIPLE_BLOCK		18
#define CMD_WRITE_MULTIPLE_BLOCK	25

/* RPMB request types */
#define RPMB_PROGRAM_KEY		1
#define RPMB_GET_WRITE_COUNTER		2
#define RPMB_DATA_WRITE			3
#define RPMB_DATA_READ			4
#define RPMB_RESULT_READ		5

/* Bit 7 of a result says that the write counter has expired; the rest is the result proper. */
#define RPMB_RESULT_MASK		0x7f

/*
 * Frames in one direction of one chain: the largest write, 255 blocks, and a RESULT_READ. A read
 * has at most 255 blocks too, or what an eMMC node takes where the device sets no limit.
 */
#define RPMB_MAX_FRAMES			256
#define RPMB_MAX_READ			(MMC_IOC_MAX_BYTES / sizeof(struct rpmb_frame))

#define RPMB_MAX_CAPACITY		128	/* in units of 128 KiB */
#define RPMB_UNIT_BLOCKS		512	/* in such a unit */
#define RPMB_TIMEOUT			(30 * HZ)

struct rpmb_frame {
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
static_assert(sizeof(struct rpmb_frame) == 512);

struct rpmb_config {
	u8 capacity;
	u8 max_wr_cnt;
	u8 max_rd_cnt;
} __packed;

/*
 * The buffers belong to the device object, not to a request: after a timeout the virtio device may
 * still write to them. They are freed only when it has been reset and the last file is closed.
 */
struct rpmb_device {
	struct kref kref;		/* the driver's, and one for each open file */
	struct miscdevice misc;
	int index;
	char name[16];

	struct mutex lock;		/* one chain at a time; guards what follows */
	struct virtqueue *vq;
	struct rpmb_frame *request;	/* device-readable, RPMB_MAX_FRAMES */
	struct rpmb_frame *response;	/* device-writable, max_room */
	unsigned int max_room;		/* in frames */
	bool in_flight;			/* the virtio device has the buffers */
	bool gone;			/* removed; set without the lock */

	spinlock_t vq_lock;		/* between adding a chain and its interrupt */
	unsigned int used;		/* bytes written, as the virtio device says */
	struct completion done;
};

/*
 * An open file. A tool may send a request and fetch its answer with two ioctls; the request frame
 * waits here in between.
 */
struct rpmb_file {
	struct rpmb_device *rpmb;
	bool waiting;			/* guarded by rpmb->lock, like the frame */
	struct rpmb_frame frame;
};

/* The chain that the commands of one ioctl build up in rpmb->request. */
struct rpmb_chain {
	unsigned int frames;
	bool asks;			/* the last frame is answered by the next read command */
};

static DEFINE_IDA(rpmb_ida);

static void rpmb_free(struct kref *kref)
{
	struct rpmb_device *rpmb = container_of(kref, struct rpmb_device, kref);

	ida_free(&rpmb_ida, rpmb->index);
	kfree(rpmb->request);
	kfree(rpmb->response);
	kfree(rpmb);
}

/* The requestq's interrupt. At most one chain is in flight. */
static void rpmb_done(struct virtqueue *vq)
{
	struct rpmb_device *rpmb = vq->vdev->priv;
	unsigned long flags;
	unsigned int used;

	spin_lock_irqsave(&rpmb->vq_lock, flags);
	if (virtqueue_get_buf(vq, &used)) {
		rpmb->used = used;
		complete(&rpmb->done);
	}
	spin_unlock_irqrestore(&rpmb->vq_lock, flags);
}

/* Waits until the virtio device has given the buffers back. */
static int rpmb_wait(struct rpmb_device *rpmb)
{
	long left = 1;

	if (rpmb->in_flight)
		left = wait_for_completion_killable_timeout(&rpmb->done, RPMB_TIMEOUT);
	if (READ_ONCE(rpmb->gone))
		return -ENODEV;
	if (left < 0)
		return -EINTR;
	if (!left)
		return -ETIMEDOUT;
	rpmb->in_flight = false;
	return 0;
}

/*
 * Sends the first @frames frames of rpmb->request with room for @room frames in rpmb->response.
 * Returns how many whole frames came back, or a negative error.
 */
static int rpmb_submit(struct rpmb_device *rpmb, unsigned int frames, unsigned int room)
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

	err = rpmb_wait(rpmb);
	if (err)
		return err;
	if (rpmb->used > room * sizeof(*rpmb->response) ||
	    rpmb->used % sizeof(*rpmb->response))
		return -EIO;
	return rpmb->used / sizeof(*rpmb->response);
}

/* CMD25: one request joins the chain, of one frame or, for DATA_WRITE, of several. */
static int rpmb_write_command(struct rpmb_device *rpmb, struct rpmb_chain *chain,
			      const struct mmc_ioc_cmd *cmd)
{
	const struct rpmb_frame __user *frames = u64_to_user_ptr(cmd->data_ptr);
	unsigned int i, count = cmd->blocks;
	struct rpmb_frame *frame;
	u16 type;

	/* As on an eMMC, a new request takes the place of one whose answer nobody fetched. */
	if (chain->asks)
		chain->frames--;
	chain->asks = false;

	if (chain->frames == RPMB_MAX_FRAMES)
		return -EOVERFLOW;
	frame = &rpmb->request[chain->frames];
	if (copy_from_user(frame, frames, sizeof(*frame)))
		return -EFAULT;
	type = be16_to_cpu(frame->req_resp);

	switch (type) {
	case RPMB_RESULT_READ:
		/*
		 * tee-supplicant sends this in as many blocks as the write before it had, and fills
		 * in nothing but the type of the first one.
		 */
		count = 1;
		frame->block_count = cpu_to_be16(1);
		break;
	case RPMB_PROGRAM_KEY:
	case RPMB_GET_WRITE_COUNTER:
		if (!frame->block_count)
			frame->block_count = cpu_to_be16(1);
		break;
	}

	if (count > RPMB_MAX_FRAMES - chain->frames)
		return -EOVERFLOW;
	if (copy_from_user(frame + 1, frames + 1, (count - 1) * sizeof(*frame)))
		return -EFAULT;
	for (i = 1; i < count; i++)
		if (type != RPMB_DATA_WRITE || frame[i].req_resp != frame->req_resp)
			return -EINVAL;
	chain->frames += count;
	chain->asks = type != RPMB_PROGRAM_KEY && type != RPMB_DATA_WRITE;
	return 0;
}

/* CMD18: the chain is complete, is executed, and its answer goes to user space. */
static int rpmb_read_command(struct rpmb_device *rpmb, struct rpmb_chain *chain,
			     const struct mmc_ioc_cmd *cmd)
{
	struct rpmb_frame *last;
	int answered;
	bool read;

	if (!chain->asks)
		return -EINVAL;
	if (cmd->blocks > rpmb->max_room)
		return -EOVERFLOW;

	last = &rpmb->request[chain->frames - 1];
	read = be16_to_cpu(last->req_resp) == RPMB_DATA_READ;
	if (read && !last->block_count)
		last->block_count = cpu_to_be16(cmd->blocks);

	answered = rpmb_submit(rpmb, chain->frames, cmd->blocks);
	*chain = (struct rpmb_chain){};
	if (answered < 0)
		return answered;
	if (!answered)
		return -EIO;

	/*
	 * A virtio device reports a failure in one frame, an eMMC in every block it was asked for,
	 * and tools look at the last one. A counter or a result is one frame too, but a read that
	 * succeeds has all its blocks.
	 */
	if (answered < cmd->blocks) {
		last = &rpmb->response[answered - 1];
		if (read && !(be16_to_cpu(last->result) & RPMB_RESULT_MASK))
			return -EIO;
		for (; answered < cmd->blocks; answered++)
			rpmb->response[answered] = *last;
	}
	if (copy_to_user(u64_to_user_ptr(cmd->data_ptr), rpmb->response,
			 cmd->blocks * sizeof(*rpmb->response)))
		return -EFAULT;
	return 0;
}

static int rpmb_command(struct rpmb_device *rpmb, struct rpmb_chain *chain,
			const struct mmc_ioc_cmd *cmd)
{
	if (cmd->is_acmd || cmd->blksz != sizeof(struct rpmb_frame) || !cmd->blocks)
		return -EINVAL;
	if (cmd->opcode == CMD_WRITE_MULTIPLE_BLOCK && cmd->write_flag)
		return rpmb_write_command(rpmb, chain, cmd);
	if (cmd->opcode == CMD_READ_MULTIPLE_BLOCK && !cmd->write_flag)
		return rpmb_read_command(rpmb, chain, cmd);
	return -EINVAL;
}

/* The commands of one ioctl. */
static int rpmb_commands(struct rpmb_file *file, const struct mmc_ioc_cmd *cmds,
			 unsigned int count)
{
	struct rpmb_device *rpmb = file->rpmb;
	struct rpmb_chain chain = {};
	unsigned int i;
	int err;

	if (mutex_lock_killable(&rpmb->lock))
		return -EINTR;
	/* An earlier request that timed out may still have the buffers. */
	err = rpmb_wait(rpmb);
	if (err)
		goto unlock;

	if (file->waiting) {
		rpmb->request[0] = file->frame;
		chain.frames = 1;
		chain.asks = true;
		file->waiting = false;
	}
	for (i = 0; !err && i < count; i++)
		err = rpmb_command(rpmb, &chain, &cmds[i]);
	if (err)
		goto unlock;

	if (chain.asks) {
		/* The read command comes with the next ioctl. */
		file->frame = rpmb->request[--chain.frames];
		file->waiting = true;
	}
	if (chain.frames) {
		/* PROGRAM_KEY, DATA_WRITE: the virtio device keeps the result to be asked for. */
		err = rpmb_submit(rpmb, chain.frames, 0);
		if (err > 0)
			err = 0;
	}
unlock:
	mutex_unlock(&rpmb->lock);
	return err;
}

static long rpmb_ioctl(struct file *filp, unsigned int request, unsigned long arg)
{
	struct rpmb_file *file = filp->private_data;
	struct mmc_ioc_multi_cmd __user *multi;
	struct mmc_ioc_cmd one, *cmds;
	u64 count;
	int err;

	if (!capable(CAP_SYS_RAWIO))
		return -EPERM;

	switch (request) {
	case MMC_IOC_CMD:
		if (copy_from_user(&one, (void __user *)arg, sizeof(one)))
			return -EFAULT;
		return rpmb_commands(file, &one, 1);
	case MMC_IOC_MULTI_CMD:
		multi = (struct mmc_ioc_multi_cmd __user *)arg;
		if (copy_from_user(&count, &multi->num_of_cmds, sizeof(count)))
			return -EFAULT;
		if (count > MMC_IOC_MAX_CMDS)
			return -EINVAL;
		if (!count)
			return 0;
		cmds = memdup_array_user(multi->cmds, count, sizeof(*cmds));
		if (IS_ERR(cmds))
			return PTR_ERR(cmds);
		err = rpmb_commands(file, cmds, count);
		kfree(cmds);
		return err;
	default:
		return -ENOTTY;
	}
}

static int rpmb_open(struct inode *inode, struct file *filp)
{
	/* The misc core leaves its device here, and holds off its removal while we are in open. */
	struct rpmb_device *rpmb = container_of(filp->private_data, struct rpmb_device, misc);
	struct rpmb_file *file = kzalloc(sizeof(*file), GFP_KERNEL);

	if (!file)
		return -ENOMEM;
	kref_get(&rpmb->kref);
	file->rpmb = rpmb;
	filp->private_data = file;
	return nonseekable_open(inode, filp);
}

static int rpmb_release(struct inode *inode, struct file *filp)
{
	struct rpmb_file *file = filp->private_data;

	kref_put(&file->rpmb->kref, rpmb_free);
	kfree(file);
	return 0;
}

static const struct file_operations rpmb_fops = {
	.owner = THIS_MODULE,
	.open = rpmb_open,
	.release = rpmb_release,
	.unlocked_ioctl = rpmb_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
};

static int rpmb_probe(struct virtio_device *vdev)
{
	struct rpmb_config config;
	struct rpmb_device *rpmb;
	int err;

	virtio_cread_bytes(vdev, 0, &config, sizeof(config));
	if (!config.capacity || config.capacity > RPMB_MAX_CAPACITY) {
		dev_err(&vdev->dev, "capacity %u, expected 1 to %u (in 128 KiB)\n",
			config.capacity, RPMB_MAX_CAPACITY);
		return -EINVAL;
	}

	rpmb = kzalloc(sizeof(*rpmb), GFP_KERNEL);
	if (!rpmb)
		return -ENOMEM;
	kref_init(&rpmb->kref);
	mutex_init(&rpmb->lock);
	spin_lock_init(&rpmb->vq_lock);
	init_completion(&rpmb->done);
	rpmb->index = ida_alloc(&rpmb_ida, GFP_KERNEL);
	if (rpmb->index < 0) {
		err = rpmb->index;
		kfree(rpmb);
		return err;
	}
	rpmb->request = kcalloc(RPMB_MAX_FRAMES, sizeof(*rpmb->request), GFP_KERNEL);
	rpmb->max_room = RPMB_MAX_FRAMES;
	if (!config.max_rd_cnt)
		rpmb->max_room = min3(RPMB_MAX_READ, config.capacity * (size_t)RPMB_UNIT_BLOCKS,
				      virtio_max_dma_size(vdev) / sizeof(*rpmb->response));
	rpmb->response = kcalloc(rpmb->max_room, sizeof(*rpmb->response), GFP_KERNEL);
	if (!rpmb->request || !rpmb->response) {
		err = -ENOMEM;
		goto put;
	}
	vdev->priv = rpmb;

	rpmb->vq = virtio_find_single_vq(vdev, rpmb_done, "requestq");
	if (IS_ERR(rpmb->vq)) {
		err = PTR_ERR(rpmb->vq);
		goto put;
	}
	virtio_device_ready(vdev);

	snprintf(rpmb->name, sizeof(rpmb->name), "rpmb%d", rpmb->index);
	rpmb->misc.minor = MISC_DYNAMIC_MINOR;
	rpmb->misc.name = rpmb->name;
	rpmb->misc.fops = &rpmb_fops;
	rpmb->misc.parent = &vdev->dev;
	err = misc_register(&rpmb->misc);
	if (err)
		goto reset;

	dev_info(&vdev->dev, "%s: %u KiB, at most %u blocks a write, %u blocks a read\n",
		 rpmb->name, config.capacity * 128u, config.max_wr_cnt,
		 config.max_rd_cnt ?: rpmb->max_room);
	return 0;

reset:
	virtio_reset_device(vdev);
	vdev->config->del_vqs(vdev);
put:
	kref_put(&rpmb->kref, rpmb_free);
	return err;
}

static void rpmb_remove(struct virtio_device *vdev)
{
	struct rpmb_device *rpmb = vdev->priv;

	misc_deregister(&rpmb->misc);
	/* Whoever waits for an answer holds the lock: wake it first. */
	WRITE_ONCE(rpmb->gone, true);
	complete_all(&rpmb->done);

	mutex_lock(&rpmb->lock);
	virtio_reset_device(vdev);
	vdev->config->del_vqs(vdev);
	mutex_unlock(&rpmb->lock);
	kref_put(&rpmb->kref, rpmb_free);
}

static const struct virtio_device_id rpmb_ids[] = {
	{ VIRTIO_ID_RPMB, VIRTIO_DEV_ANY_ID },
	{ }
};
MODULE_DEVICE_TABLE(virtio, rpmb_ids);

static struct virtio_driver rpmb_driver = {
	.driver.name = KBUILD_MODNAME,
	.id_table = rpmb_ids,
	.probe = rpmb_probe,
	.remove = rpmb_remove,
};
module_virtio_driver(rpmb_driver);

MODULE_DESCRIPTION("virtio RPMB guest driver with the ioctls of an eMMC RPMB node");
MODULE_LICENSE("GPL");
