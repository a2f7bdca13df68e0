/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Play recorded requests and compare the answers.
 *
 *   rpmb-play route FILE             through /dev/rpmb-route, the kernel's RPMB subsystem
 *   rpmb-play supplicant FILE        by the steps of tee-supplicant, through /dev/mmcblk0rpmb
 *
 * FILE has records: frames of the request, frames of the answer (u32 each), the request, the answer.
 * What was read or answered is printed: the identity, the number of requests, and how long they took.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/mmc/ioctl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#define FRAME 512
#define MAX_FRAMES 1024
#define WRITE_MULTIPLE 25
#define READ_MULTIPLE 18
#define RELIABLE (1u << 31)
#define PROGRAM_KEY 1
#define DATA_WRITE 3
#define RESULT_READ 5

static unsigned char request[4 + MAX_FRAMES * FRAME], expected[MAX_FRAMES * FRAME];
static unsigned char answer[MAX_FRAMES * FRAME];

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void command(struct mmc_ioc_multi_cmd *multi, unsigned int opcode, unsigned int flag,
		    void *data, unsigned int blocks)
{
	struct mmc_ioc_cmd *cmd = &multi->cmds[multi->num_of_cmds++];

	cmd->opcode = opcode;
	cmd->write_flag = flag;
	cmd->blksz = FRAME;
	cmd->blocks = blocks;
	cmd->data_ptr = (uintptr_t)data;
}

/* tee-supplicant leaves the answer's buffer as it is but for the type of a RESULT_READ. */
static int by_supplicant(int device, unsigned int frames, unsigned int room)
{
	static unsigned char memory[sizeof(struct mmc_ioc_multi_cmd) + 3 * sizeof(struct mmc_ioc_cmd)];
	struct mmc_ioc_multi_cmd *multi = (void *)memory;
	unsigned char *first = request + 4;
	unsigned int type = first[FRAME - 1];

	memset(memory, 0, sizeof(memory));
	if (type == PROGRAM_KEY || type == DATA_WRITE) {
		command(multi, WRITE_MULTIPLE, 1 | RELIABLE, first, frames);
		answer[FRAME - 2] = 0;
		answer[FRAME - 1] = RESULT_READ;
		command(multi, WRITE_MULTIPLE, 1, answer, frames);
	} else {
		command(multi, WRITE_MULTIPLE, 1, first, frames);
	}
	command(multi, READ_MULTIPLE, 0, answer, room);
	return ioctl(device, MMC_IOC_MULTI_CMD, multi);
}

static int by_route(int device, unsigned int frames, unsigned int room)
{
	uint32_t count = room;
	size_t length = 4 + frames * FRAME;

	memcpy(request, &count, 4);
	if (write(device, request, length) != (ssize_t)length)
		return -1;
	return read(device, answer, room * FRAME) == (ssize_t)(room * FRAME) ? 0 : -1;
}

static void show(const char *name)
{
	char path[128], text[128];
	ssize_t length;
	int fd;

	snprintf(path, sizeof(path), "/sys/class/mmc_host/mmc0/mmc0:0001/%s", name);
	fd = open(path, O_RDONLY);
	if (fd < 0)
		die(path);
	length = read(fd, text, sizeof(text));
	if (length <= 0)
		die(path);
	printf("%s %.*s", name, (int)length, text);
	close(fd);
}

static int compare(const void *one, const void *other)
{
	const unsigned int *a = one, *b = other;

	return (*a > *b) - (*a < *b);
}

int main(int argc, char **argv)
{
	static unsigned int took[100000];
	int supplicant = argc == 3 && !strcmp(argv[1], "supplicant");
	struct timespec start, end;
	unsigned int number = 0, i;
	uint32_t counts[2];
	char text[128];
	ssize_t length;
	FILE *file;
	int device;

	if (argc != 3 || (!supplicant && strcmp(argv[1], "route"))) {
		fprintf(stderr, "usage: rpmb-play route|supplicant FILE\n");
		return 2;
	}
	if (supplicant) {
		show("cid");
		show("raw_rpmb_size_mult");
		show("rel_sectors");
	}
	device = open(supplicant ? "/dev/mmcblk0rpmb" : "/dev/rpmb-route", O_RDWR);
	if (device < 0)
		die("open");
	if (!supplicant) {
		length = read(device, text, sizeof(text));
		if (length <= 0)
			die("/dev/rpmb-route");
		printf("%.*s", (int)length, text);
	}
	file = fopen(argv[2], "r");
	if (!file)
		die(argv[2]);
	for (; fread(counts, sizeof(counts), 1, file) == 1; number++) {
		if (counts[0] > MAX_FRAMES || counts[1] > MAX_FRAMES ||
		    number == sizeof(took) / sizeof(took[0]) ||
		    fread(request + 4, FRAME, counts[0], file) != counts[0] ||
		    fread(expected, FRAME, counts[1], file) != counts[1]) {
			fprintf(stderr, "rpmb-play: %s is not a file of records\n", argv[2]);
			return 1;
		}
		memset(answer, 0xa5, counts[1] * FRAME);
		clock_gettime(CLOCK_MONOTONIC, &start);
		if ((supplicant ? by_supplicant : by_route)(device, counts[0], counts[1])) {
			fprintf(stderr, "request %u: %s\n", number, strerror(errno));
			return 1;
		}
		clock_gettime(CLOCK_MONOTONIC, &end);
		took[number] = (end.tv_sec - start.tv_sec) * 1000000 +
			       (end.tv_nsec - start.tv_nsec) / 1000;
		if (memcmp(answer, expected, counts[1] * FRAME)) {
			for (i = 0; answer[i] == expected[i]; i++)
				;
			fprintf(stderr, "request %u: byte %u of the answer is %02x, expected %02x; "
				"the frame's result is %02x%02x\n", number, i, answer[i], expected[i],
				answer[i / FRAME * FRAME + 508], answer[i / FRAME * FRAME + 509]);
			return 1;
		}
	}
	qsort(took, number, sizeof(took[0]), compare);
	printf("%u requests, p50 %u us, p99 %u us\n", number, took[number / 2],
	       took[number * 99 / 100]);
	return 0;
}
