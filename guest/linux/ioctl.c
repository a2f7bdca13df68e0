// SPDX-License-Identifier: GPL-2.0
/*
 * The character device /dev/rpmbN with the two ioctls of an eMMC RPMB node, MMC_IOC_CMD and
 * MMC_IOC_MULTI_CMD, so that tools written for eMMC work as they are.
 *
 * A row of commands to an eMMC becomes one virtio descriptor chain:
 *
 *   CMD25 (write multiple block): its frames join the device-readable part,
 *   CMD18 (read multiple block):  sets the room of the device-writable part and ends the chain.
 *
 * An eMMC is told the number of blocks in CMD23, beside the frame; a virtio device reads it from
 * the frame. Frames that leave block_count 0 therefore get it here. DATA_WRITE frames are never
 * touched: their MAC covers the field, so it is filled already.
 */
#include <linux/capability.h>
#include <linux/fs.h>
#include <linux/mmc/ioctl.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/uaccess.h>
#include <linux/virtio.h>

#include "virtio_rpmb.h"

/* eMMC commands that carry RPMB frames */
#define CMD_READ_MULTIPLE_BLOCK		18
#define CMD_WRITE_MULTIPLE_BLOCK	25

/*
 * An open file. A tool may send a request and fetch its answer with two ioctls; the request frame
 * waits here in between.
 */
struct vrpmb_file {
	struct vrpmb *rpmb;
	bool waiting;			/* guarded by rpmb->lock, like the frame */
	struct vrpmb_frame frame;
};

/* The chain that the commands of one ioctl build up in rpmb->request. */
struct vrpmb_chain {
	unsigned int frames;
	bool asks;			/* the last frame is answered by the next read command */
};

/* CMD25: one request joins the chain, of one frame or, for DATA_WRITE, of several. */
static int vrpmb_write_command(struct vrpmb *rpmb, struct vrpmb_chain *chain,
			       const struct mmc_ioc_cmd *cmd)
{
	const struct vrpmb_frame __user *frames = u64_to_user_ptr(cmd->data_ptr);
	unsigned int i, count = cmd->blocks;
	struct vrpmb_frame *frame;
	u16 type;

	/* As on an eMMC, a new request takes the place of one whose answer nobody fetched. */
	if (chain->asks)
		chain->frames--;
	chain->asks = false;

	if (chain->frames == VRPMB_MAX_FRAMES)
		return -EOVERFLOW;
	frame = &rpmb->request[chain->frames];
	if (copy_from_user(frame, frames, sizeof(*frame)))
		return -EFAULT;
	type = vrpmb_type(frame);

	switch (type) {
	case VRPMB_RESULT_READ:
		/*
		 * tee-supplicant sends this in as many blocks as the write before it had, and fills
		 * in nothing but the type of the first one.
		 */
		count = 1;
		frame->block_count = cpu_to_be16(1);
		break;
	case VRPMB_PROGRAM_KEY:
	case VRPMB_GET_WRITE_COUNTER:
		if (!frame->block_count)
			frame->block_count = cpu_to_be16(1);
		break;
	}

	if (count > VRPMB_MAX_FRAMES - chain->frames)
		return -EOVERFLOW;
	if (copy_from_user(frame + 1, frames + 1, (count - 1) * sizeof(*frame)))
		return -EFAULT;
	for (i = 1; i < count; i++)
		if (type != VRPMB_DATA_WRITE || frame[i].req_resp != frame->req_resp)
			return -EINVAL;
	chain->frames += count;
	chain->asks = type != VRPMB_PROGRAM_KEY && type != VRPMB_DATA_WRITE;
	return 0;
}

/* CMD18: the chain is complete, is executed, and its answer goes to user space. */
static int vrpmb_read_command(struct vrpmb *rpmb, struct vrpmb_chain *chain,
			      const struct mmc_ioc_cmd *cmd)
{
	struct vrpmb_frame *last;
	int err;

	if (!chain->asks)
		return -EINVAL;
	if (cmd->blocks > rpmb->max_room)
		return -EOVERFLOW;

	last = &rpmb->request[chain->frames - 1];
	if (vrpmb_type(last) == VRPMB_DATA_READ && !last->block_count)
		last->block_count = cpu_to_be16(cmd->blocks);

	err = vrpmb_exchange(rpmb, chain->frames, cmd->blocks);
	*chain = (struct vrpmb_chain){};
	if (err)
		return err;
	if (copy_to_user(u64_to_user_ptr(cmd->data_ptr), rpmb->response,
			 cmd->blocks * sizeof(*rpmb->response)))
		return -EFAULT;
	return 0;
}

static int vrpmb_command(struct vrpmb *rpmb, struct vrpmb_chain *chain,
			 const struct mmc_ioc_cmd *cmd)
{
	if (cmd->is_acmd || cmd->blksz != sizeof(struct vrpmb_frame) || !cmd->blocks)
		return -EINVAL;
	if (cmd->opcode == CMD_WRITE_MULTIPLE_BLOCK && cmd->write_flag)
		return vrpmb_write_command(rpmb, chain, cmd);
	if (cmd->opcode == CMD_READ_MULTIPLE_BLOCK && !cmd->write_flag)
		return vrpmb_read_command(rpmb, chain, cmd);
	return -EINVAL;
}

/* The commands of one ioctl. */
static int vrpmb_commands(struct vrpmb_file *file, const struct mmc_ioc_cmd *cmds,
			  unsigned int count)
{
	struct vrpmb *rpmb = file->rpmb;
	struct vrpmb_chain chain = {};
	unsigned int i;
	int err;

	err = vrpmb_begin(rpmb, true);
	if (err)
		return err;

	if (file->waiting) {
		rpmb->request[0] = file->frame;
		chain.frames = 1;
		chain.asks = true;
		file->waiting = false;
	}
	for (i = 0; !err && i < count; i++)
		err = vrpmb_command(rpmb, &chain, &cmds[i]);
	if (err)
		goto end;

	if (chain.asks) {
		/* The read command comes with the next ioctl. */
		file->frame = rpmb->request[--chain.frames];
		file->waiting = true;
	}
	/* PROGRAM_KEY, DATA_WRITE: the virtio device keeps the result to be asked for. */
	if (chain.frames)
		err = vrpmb_exchange(rpmb, chain.frames, 0);
end:
	vrpmb_end(rpmb);
	return err;
}

static long vrpmb_ioctl(struct file *filp, unsigned int request, unsigned long arg)
{
	struct vrpmb_file *file = filp->private_data;
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
		return vrpmb_commands(file, &one, 1);
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
		err = vrpmb_commands(file, cmds, count);
		kfree(cmds);
		return err;
	default:
		return -ENOTTY;
	}
}

static int vrpmb_open(struct inode *inode, struct file *filp)
{
	/* The misc core leaves its device here, and holds off its removal while we are in open. */
	struct vrpmb *rpmb = container_of(filp->private_data, struct vrpmb, misc);
	struct vrpmb_file *file = kzalloc(sizeof(*file), GFP_KERNEL);

	if (!file)
		return -ENOMEM;
	kref_get(&rpmb->kref);
	file->rpmb = rpmb;
	filp->private_data = file;
	return nonseekable_open(inode, filp);
}

static int vrpmb_release(struct inode *inode, struct file *filp)
{
	struct vrpmb_file *file = filp->private_data;

	vrpmb_put(file->rpmb);
	kfree(file);
	return 0;
}

static const struct file_operations vrpmb_fops = {
	.owner = THIS_MODULE,
	.open = vrpmb_open,
	.release = vrpmb_release,
	.unlocked_ioctl = vrpmb_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
};

int vrpmb_ioctl_register(struct vrpmb *rpmb)
{
	rpmb->misc.minor = MISC_DYNAMIC_MINOR;
	rpmb->misc.name = rpmb->name;
	rpmb->misc.fops = &vrpmb_fops;
	rpmb->misc.parent = &rpmb->vdev->dev;
	return misc_register(&rpmb->misc);
}

void vrpmb_ioctl_unregister(struct vrpmb *rpmb)
{
	misc_deregister(&rpmb->misc);
}
