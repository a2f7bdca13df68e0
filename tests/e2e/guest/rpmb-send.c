// SPDX-License-Identifier: Apache-2.0
/*
 * Sends raw RPMB frames through an RPMB device node, for tests inside the guest.
 *
 *   rpmb-send [-s] DEVICE COUNT < REQUEST > RESPONSE
 *
 * REQUEST is a row of 512-byte frames. Neighbouring DATA_WRITE frames become one CMD25, neighbouring
 * RESULT_READ frames too, every other frame a CMD25 of its own. A CMD18 for COUNT frames follows, unless COUNT is 0, and what it read
 * is the RESPONSE. All commands go in one MMC_IOC_MULTI_CMD or, with -s, in an MMC_IOC_CMD each.
 *
 * Exit status: 0; 1 when an ioctl fails (its error is on stderr); 2 for wrong usage.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <linux/mmc/ioctl.h>

enum { FRAME = 512, REQ_RESP = 510, DATA_WRITE = 3, RESULT_READ = 5 };
enum { MAX_FRAMES = 512, MAX_COMMANDS = 256 };

static unsigned int type_of(const unsigned char *frame)
{
	return frame[REQ_RESP] << 8 | frame[REQ_RESP + 1];
}

/* Whether a frame joins the command of the frame before it. */
static int joins(const unsigned char *frame)
{
	unsigned int type = type_of(frame);

	return (type == DATA_WRITE || type == RESULT_READ) && type_of(frame - FRAME) == type;
}

static struct mmc_ioc_cmd command(unsigned int opcode, int write_flag, void *data)
{
	struct mmc_ioc_cmd cmd = {
		.opcode = opcode,
		.write_flag = write_flag,
		.blksz = FRAME,
		.blocks = 1,
	};

	mmc_ioc_cmd_set_data(cmd, data);
	return cmd;
}

int main(int argc, char **argv)
{
	static unsigned char request[MAX_FRAMES * FRAME];
	struct mmc_ioc_multi_cmd *multi;
	unsigned char *response, *frame;
	unsigned long count;
	size_t length, i;
	int device, single;
	char *end;

	single = argc > 1 && !strcmp(argv[1], "-s");
	if (argc - single != 3) {
		fprintf(stderr, "usage: rpmb-send [-s] DEVICE COUNT < REQUEST > RESPONSE\n");
		return 2;
	}
	count = strtoul(argv[2 + single], &end, 10);
	length = fread(request, 1, sizeof(request), stdin);
	if (*end || !length || length % FRAME || length == sizeof(request)) {
		fprintf(stderr, "rpmb-send: expected a COUNT and 1 to %d frames of %d bytes\n",
			MAX_FRAMES - 1, FRAME);
		return 2;
	}

	response = calloc(count + 1, FRAME);
	multi = calloc(1, sizeof(*multi) + MAX_COMMANDS * sizeof(multi->cmds[0]));
	if (!response || !multi) {
		perror("rpmb-send");
		return 1;
	}
	for (frame = request; frame < request + length; frame += FRAME) {
		struct mmc_ioc_cmd *last = &multi->cmds[multi->num_of_cmds - 1];

		if (frame > request && joins(frame)) {
			last->blocks++;
			continue;
		}
		if (multi->num_of_cmds == MAX_COMMANDS - 1) {
			fprintf(stderr, "rpmb-send: more than %d commands\n", MAX_COMMANDS - 1);
			return 2;
		}
		multi->cmds[multi->num_of_cmds++] = command(25, 1, frame);
	}
	if (count) {
		multi->cmds[multi->num_of_cmds] = command(18, 0, response);
		multi->cmds[multi->num_of_cmds++].blocks = count;
	}

	device = open(argv[1 + single], O_RDWR);
	if (device < 0) {
		perror(argv[1 + single]);
		return 1;
	}
	if (!single && ioctl(device, MMC_IOC_MULTI_CMD, multi)) {
		perror("MMC_IOC_MULTI_CMD");
		return 1;
	}
	for (i = 0; single && i < multi->num_of_cmds; i++) {
		if (ioctl(device, MMC_IOC_CMD, &multi->cmds[i])) {
			perror("MMC_IOC_CMD");
			return 1;
		}
	}
	return fwrite(response, FRAME, count, stdout) == count && !fflush(stdout) ? 0 : 1;
}
