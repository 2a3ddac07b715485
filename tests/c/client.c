/* SPDX-License-Identifier: Apache-2.0
 *
 * A migration client of KVM's stream devices, as source and as destination, in QEMU's framing of a
 * single channel.  Whoever loads it gives it the system calls and the two ends of its stream.
 * Every length of the peer is bounded before it is used.  Results are 0 or -errno.
 */
#include <errno.h>
#include <stddef.h>
#include <string.h>

#include "kvm_tdx_mig.h"

#define PAGE 4096u
#define MBMD_BYTES 48u
#define ENTRY_BYTES 8u
#define MAC_BYTES 16u
#define MAX_STREAMS 16u

enum mb_type { MB_IMMUTABLE = 0, MB_TD = 1, MB_VCPU = 2, MB_MEMORY = 16, MB_TOKEN = 32 };
enum section { SECTION_START = 0x09, SECTION_END = 0x0A, SECTION_FOOTER = 0x7E };
enum { RAM_CONTINUE = 0x20, RAM_STATE = 0x400, RAM_EPOCH = 0x800, ANOTHER_FOLLOWS = 1 };

static const char ram_block[] = "pc.ram";

/* Like the system calls; mmap answers -errno as an address.  `get` fails at the stream's end. */
struct client_calls {
    int (*create_device)(uint32_t type, int test);
    int (*ioctl)(int fd, unsigned long request, void *argument);
    void *(*mmap)(int fd, size_t length, int64_t offset);
    int (*munmap)(void *address, size_t length);
    int (*close)(int fd);
    int (*put)(const void *data, size_t length);
    int (*get)(void *data, size_t length);
};

struct stream {
    int fd;
    uint32_t pages;
    uint8_t *mbmd, *gpa_list, *mac_list, *buffers;
};

struct header {
    uint16_t flags;
    uint16_t count;
};

static struct client_calls os;
static struct stream streams[MAX_STREAMS];
static uint32_t stream_count;
static int block_was_named;

/* --- one stream device --- */

static int attributes(struct stream *stream, unsigned long request, uint32_t *pages)
{
    struct kvm_dev_tdx_mig_attr value = {0, *pages, 0};
    struct kvm_device_attr attr = {0, KVM_DEV_TDX_MIG_ATTR, sizeof(value), (uintptr_t)&value};
    int result = os.ioctl(stream->fd, request, &attr);

    *pages = value.buf_list_pages;
    return result;
}

static int map(struct stream *stream, enum map_page page, uint32_t count, uint8_t **where)
{
    intptr_t address = (intptr_t)os.mmap(stream->fd, count * (size_t)PAGE, page * (int64_t)PAGE);

    if (address < 0 && address > -4096)
        return (int)address;
    *where = (uint8_t *)address;
    return 0;
}

static uint32_t mac_pages(const struct stream *stream)
{
    return stream->pages > PAGE / MAC_BYTES ? 2 : 1;
}

static void close_stream(struct stream *stream)
{
    if (stream->mbmd)
        os.munmap(stream->mbmd, PAGE);
    if (stream->gpa_list)
        os.munmap(stream->gpa_list, PAGE);
    if (stream->mac_list)
        os.munmap(stream->mac_list, mac_pages(stream) * (size_t)PAGE);
    if (stream->buffers)
        os.munmap(stream->buffers, stream->pages * (size_t)PAGE);
    if (stream->fd > 0)
        os.close(stream->fd);
    memset(stream, 0, sizeof(*stream));
}

static int open_stream(struct stream *stream, uint32_t pages)
{
    int result;

    memset(stream, 0, sizeof(*stream));
    stream->fd = os.create_device(KVM_DEV_TYPE_TDX_MIG_STREAM, 0);
    if (stream->fd < 0)
        return stream->fd;
    stream->pages = pages;
    if ((result = attributes(stream, KVM_SET_DEVICE_ATTR, &stream->pages)) ||
        (result = attributes(stream, KVM_GET_DEVICE_ATTR, &stream->pages)) ||
        (result = map(stream, MAP_MBMD, 1, &stream->mbmd)) ||
        (result = map(stream, MAP_GPA_LIST, 1, &stream->gpa_list)) ||
        (result = map(stream, MAP_MAC_LIST, mac_pages(stream), &stream->mac_list)) ||
        (result = map(stream, MAP_BUFFERS, stream->pages, &stream->buffers)))
        close_stream(stream);
    return result;
}

static int command(struct stream *stream, enum tdx_command id, uint64_t data)
{
    struct kvm_tdx_cmd cmd;

    memset(&cmd, 0, sizeof(cmd));
    cmd.id = id;
    cmd.data = data;
    return os.ioctl(stream->fd, KVM_MEMORY_ENCRYPT_OP, &cmd);
}

static int command_with(struct stream *stream, enum tdx_command id, uint64_t *value)
{
    return command(stream, id, (uintptr_t)value);
}

/* --- set-up and clean-up of all of them --- */

void client_cleanup(void)
{
    while (stream_count)
        close_stream(&streams[--stream_count]);
}

int client_setup(const struct client_calls *calls, uint32_t count, uint32_t pages)
{
    int result;

    if (!count || count > MAX_STREAMS || stream_count)
        return -EINVAL;
    os = *calls;
    block_was_named = 0;
    while (stream_count < count) {
        result = open_stream(&streams[stream_count], pages);
        if (result) {
            client_cleanup();
            return result;
        }
        stream_count++;
    }
    return 0;
}

/* --- source --- */

static int put_byte(uint8_t byte)
{
    return os.put(&byte, 1);
}

static int put_be64(uint64_t value)
{
    uint8_t bytes[8];
    int i;

    for (i = 0; i < 8; i++)
        bytes[i] = (uint8_t)(value >> (56 - 8 * i));
    return os.put(bytes, sizeof(bytes));
}

static int put_bundle(struct stream *stream, uint64_t pages, uint64_t entries, uint16_t flags)
{
    struct header header = {flags, (uint16_t)pages};
    int result;

    if (pages > stream->pages)
        return -EPROTO;
    if ((result = os.put(&header, sizeof(header))) ||
        (result = os.put(stream->mbmd, MBMD_BYTES)) ||
        (pages && (result = os.put(stream->buffers, pages * PAGE))) ||
        (entries && (result = os.put(stream->gpa_list, entries * ENTRY_BYTES))) ||
        (entries && (result = os.put(stream->mac_list, entries * MAC_BYTES))))
        return result;
    return 0;
}

static int send_state(enum tdx_command id, uint16_t flags)
{
    uint64_t pages = 0;
    int result = command_with(&streams[0], id, &pages);

    return result ? result : put_bundle(&streams[0], pages, 0, flags);
}

static int send_token(uint64_t start)
{
    int result = command_with(&streams[0], EXPORT_TRACK, &start);

    return result ? result : put_bundle(&streams[0], 0, 0, 0);
}

int client_send_start(void)
{
    int result = put_byte(SECTION_START);

    return result ? result : send_state(EXPORT_STATE_IMMUTABLE, 0);
}

int client_send_epoch(void)
{
    int result = put_be64(RAM_EPOCH);

    return result ? result : send_token(0);
}

/* How many of the entries were refused, or -errno.  The bundle is sent whatever became of them. */
int client_send_pages(uint32_t index, const uint64_t *gpas, uint32_t count, int cancel)
{
    struct stream *stream = &streams[index];
    uint64_t entry, number = count, *list = (uint64_t *)(void *)stream->gpa_list;
    uint32_t i;
    int result, refused = 0;

    if (index >= stream_count || !count || count > stream->pages)
        return -EINVAL;
    for (i = 0; i < count; i++)
        list[i] = gpas[i] | (uint64_t)(cancel ? 2 : 1) << 52;
    result = command_with(stream, EXPORT_MEM, &number);
    if (result)
        return result;
    for (i = 0; i < count; i++) {
        entry = list[i];
        refused += (entry >> 56 & 31) != 0;
    }
    result = put_be64(gpas[0] | RAM_STATE | (block_was_named ? RAM_CONTINUE : 0));
    if (!result && !block_was_named) {
        result = put_byte(sizeof(ram_block) - 1);
        if (!result)
            result = os.put(ram_block, sizeof(ram_block) - 1);
        block_was_named = 1;
    }
    if (!result)
        result = put_bundle(stream, count, count, 0);
    return result ? result : refused;
}

int client_pause(void)
{
    return command(&streams[0], EXPORT_PAUSE, 0);
}

int client_send_end(uint32_t vcpus)
{
    int result = put_byte(SECTION_END);

    if (!result)
        result = send_state(EXPORT_STATE_TD, ANOTHER_FOLLOWS);
    while (!result && vcpus--)
        result = send_state(EXPORT_STATE_VP, ANOTHER_FOLLOWS);
    return result ? result : send_token((uint64_t)1 << 63);
}

int client_abort(uint64_t gfn_end)
{
#ifdef TDX_GEN_1B
    (void)gfn_end;
    return command(&streams[0], EXPORT_ABORT, 0);
#else
    return command_with(&streams[0], EXPORT_ABORT, &gfn_end);
#endif
}

/* --- destination --- */

static int import_command(uint8_t type)
{
    switch (type) {
    case MB_IMMUTABLE:
        return IMPORT_STATE_IMMUTABLE;
    case MB_TD:
        return IMPORT_STATE_TD;
    case MB_VCPU:
        return IMPORT_STATE_VP;
    case MB_MEMORY:
        return IMPORT_MEM;
    case MB_TOKEN:
        return IMPORT_TRACK;
    default:
        return -EPROTO;
    }
}

/* One bundle; 1 if another follows, 0 if not, or -errno. */
static int load_bundle(void)
{
    struct header header;
    struct stream *stream;
    uint8_t mbmd[MBMD_BYTES];
    uint16_t size, index;
    uint64_t count;
    int id, result;

    if ((result = os.get(&header, sizeof(header))) || (result = os.get(mbmd, sizeof(mbmd))))
        return result;
    memcpy(&size, mbmd, sizeof(size));
    memcpy(&index, mbmd + 4, sizeof(index));
    id = import_command(mbmd[6]);
    count = header.count;
    if (size != MBMD_BYTES || id < 0 || index >= stream_count || header.flags > ANOTHER_FOLLOWS)
        return -EPROTO;
    stream = &streams[index];
    if (count > stream->pages || (count == 0) != (id == IMPORT_TRACK))
        return -EPROTO;
    memcpy(stream->mbmd, mbmd, sizeof(mbmd));
    if (count && (result = os.get(stream->buffers, count * PAGE)))
        return result;
    if (id == IMPORT_MEM && ((result = os.get(stream->gpa_list, count * ENTRY_BYTES)) ||
                             (result = os.get(stream->mac_list, count * MAC_BYTES))))
        return result;
    result = command_with(stream, (enum tdx_command)id, &count);
    return result ? result : header.flags & ANOTHER_FOLLOWS;
}

static int load_ram(uint8_t first)
{
    uint8_t rest[7], length, name[256];
    uint64_t word = first;
    int i, result = os.get(rest, sizeof(rest));

    if (result)
        return result;
    for (i = 0; i < 7; i++)
        word = word << 8 | rest[i];
    if (word & RAM_STATE && !(word & RAM_CONTINUE)) {
        if ((result = os.get(&length, 1)) || (result = os.get(name, length)))
            return result;
        if (length != sizeof(ram_block) - 1 || memcmp(name, ram_block, length))
            return -EPROTO;
    } else if (!(word & (RAM_STATE | RAM_EPOCH))) {
        return -EPROTO;
    }
    result = load_bundle();
    return result == 1 ? -EPROTO : result;
}

/* Everything up to the start token, after which the TD may run; 0 or -errno. */
int client_load(void)
{
    uint8_t byte;
    int result;

    for (;;) {
        result = os.get(&byte, 1);
        if (result)
            return result;
        if (byte == SECTION_END) {
            while ((result = load_bundle()) == 1)
                ;
            return result;
        }
        result = byte == SECTION_START ? load_bundle() : load_ram(byte);
        if (result)
            return result < 0 ? result : -EPROTO;
    }
}

int client_load_end(void)
{
    return command(&streams[0], IMPORT_END, 0);
}
