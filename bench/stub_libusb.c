/* A libusb-1.0 with one device: a SuperSpeed disk (Bulk-Only Transport) over the file in $STUB_IMAGE.
 *
 * bench/native.py builds it, and puts it before the real library with LD_LIBRARY_PATH, so that usbredirect and farplug
 * redirect the same device without hardware. The disk knows TEST UNIT READY, READ(10) and WRITE(10). A transfer is
 * executed when it is submitted; its callback is called when the program handles events, as with the real library: a
 * submission and a completion cost a system call each, which stand for those of usbfs. There is no hotplug.
 *
 * The declarations are those of libusb-1.0's libusb.h, whose binary interface is stable; types that are only passed
 * through are void. REFUSED functions exist because python-libusb1 looks them up. Sources: libusb-1.0's documentation;
 * USB Mass Storage Class, Bulk-Only Transport 1.0; SBC-3.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/time.h>
#include <unistd.h>

enum { ERROR_IO = -1, ERROR_NOT_FOUND = -5, ERROR_NOT_SUPPORTED = -12 };
enum { COMPLETED = 0, STALL = 4 };
enum { TYPE_BULK = 2, FREE_BUFFER = 2, FREE_TRANSFER = 4 };
enum { BUS = 1, ADDRESS = 2, SPEED_SUPER = 4, ENDPOINT_IN = 0x81, ENDPOINT_OUT = 0x02, BLOCK = 512 };

struct iso_packet {
    unsigned length, actual_length;
    int status;
};

struct transfer {
    void *handle;
    uint8_t flags;
    unsigned char endpoint, type;
    unsigned timeout;
    int status, length, actual_length;
    void (*callback)(struct transfer *);
    void *user_data;
    unsigned char *buffer;
    int iso_packets;
    struct iso_packet iso_packet[];
};

struct device_descriptor {
    uint8_t bLength, bDescriptorType;
    uint16_t bcdUSB;
    uint8_t bDeviceClass, bDeviceSubClass, bDeviceProtocol, bMaxPacketSize0;
    uint16_t idVendor, idProduct, bcdDevice;
    uint8_t iManufacturer, iProduct, iSerialNumber, bNumConfigurations;
};

struct endpoint_descriptor {
    uint8_t bLength, bDescriptorType, bEndpointAddress, bmAttributes;
    uint16_t wMaxPacketSize;
    uint8_t bInterval, bRefresh, bSynchAddress;
    const unsigned char *extra;
    int extra_length;
};

struct interface_descriptor {
    uint8_t bLength, bDescriptorType, bInterfaceNumber, bAlternateSetting, bNumEndpoints;
    uint8_t bInterfaceClass, bInterfaceSubClass, bInterfaceProtocol, iInterface;
    const struct endpoint_descriptor *endpoint;
    const unsigned char *extra;
    int extra_length;
};

struct interface {
    const struct interface_descriptor *altsetting;
    int num_altsetting;
};

struct config_descriptor {
    uint8_t bLength, bDescriptorType;
    uint16_t wTotalLength;
    uint8_t bNumInterfaces, bConfigurationValue, iConfiguration, bmAttributes, MaxPower;
    const struct interface *interface;
    const unsigned char *extra;
    int extra_length;
};

struct companion_descriptor {
    uint8_t bLength, bDescriptorType, bMaxBurst, bmAttributes;
    uint16_t wBytesPerInterval;
};

struct watched {
    int fd;
    short events;
};

/* --- the device ---------------------------------------------------------------------------------------------------- */

static const struct device_descriptor device_descriptor = {
    .bLength = 18, .bDescriptorType = 1, .bcdUSB = 0x0300, .bMaxPacketSize0 = 9,
    .idVendor = 0x46f4, .idProduct = 0x0001, .bcdDevice = 0x0100, .bNumConfigurations = 1,
};
static const unsigned char companion[6] = {6, 0x30, 15, 0, 0, 0};
static const struct endpoint_descriptor endpoints[2] = {
    {7, 5, ENDPOINT_IN, TYPE_BULK, 1024, 0, 0, 0, companion, sizeof companion},
    {7, 5, ENDPOINT_OUT, TYPE_BULK, 1024, 0, 0, 0, companion, sizeof companion},
};
static const struct interface_descriptor setting = {9, 4, 0, 0, 2, 8, 6, 0x50, 0, endpoints, NULL, 0};
static const struct interface interface = {&setting, 1};
static const struct config_descriptor configuration = {9, 2, 44, 1, 1, 0, 0x80, 50, &interface, NULL, 0};
static const struct companion_descriptor companion_descriptor = {6, 0x30, 15, 0, 0};

static int image = -1;
static enum { COMMAND, DATA, STATUS } stage;
static unsigned char status_wrapper[13];
static off_t position;
static uint32_t remaining; /* bytes of the data stage */
static int is_read;

static uint32_t big_endian(const unsigned char *bytes) {
    return (uint32_t)bytes[0] << 24 | bytes[1] << 16 | bytes[2] << 8 | bytes[3];
}

/* Begin the command of a command block wrapper. */
static void begin(const unsigned char *wrapper) {
    const unsigned char *cdb = wrapper + 15;
    memcpy(&remaining, wrapper + 8, sizeof remaining);
    memcpy(status_wrapper, "USBS", 4);
    memcpy(status_wrapper + 4, wrapper + 4, 4);
    memset(status_wrapper + 8, 0, 5);
    is_read = cdb[0] == 0x28;
    if (is_read || cdb[0] == 0x2a) {
        position = (off_t)big_endian(cdb + 2) * BLOCK;
    } else if (cdb[0] != 0) {
        memcpy(status_wrapper + 8, &remaining, sizeof remaining);
        status_wrapper[12] = 1;
        remaining = 0;
    }
    stage = remaining ? DATA : STATUS;
}

/* Execute a bulk transfer, and return its status. */
static int bulk(struct transfer *transfer) {
    int in = transfer->endpoint == ENDPOINT_IN;
    size_t length = transfer->length;
    if (stage == COMMAND && !in && length == 31 && !memcmp(transfer->buffer, "USBC", 4)) {
        begin(transfer->buffer);
        transfer->actual_length = 31;
        return COMPLETED;
    }
    if (stage == DATA && in == is_read && length <= remaining) {
        ssize_t moved = in ? pread(image, transfer->buffer, length, position)
                           : pwrite(image, transfer->buffer, length, position);
        if (moved == (ssize_t)length) {
            position += moved;
            remaining -= moved;
            if (!remaining) stage = STATUS;
            transfer->actual_length = moved;
            return COMPLETED;
        }
    }
    if (stage == STATUS && in && length >= sizeof status_wrapper) {
        memcpy(transfer->buffer, status_wrapper, sizeof status_wrapper);
        stage = COMMAND;
        transfer->actual_length = sizeof status_wrapper;
        return COMPLETED;
    }
    return STALL;
}

/* --- transfers and events ------------------------------------------------------------------------------------------ */

enum { QUEUE = 4096 };
static pthread_mutex_t queue_lock = PTHREAD_MUTEX_INITIALIZER, event_lock = PTHREAD_MUTEX_INITIALIZER;
static struct transfer *queue[QUEUE]; /* executed transfers, whose callbacks were not called yet */
static unsigned first, last;
static struct watched event = {-1, POLLIN};

static void wake(void) {
    uint64_t one = 1;
    if (write(event.fd, &one, sizeof one) != sizeof one) abort();
}

struct transfer *libusb_alloc_transfer(int packets) {
    return calloc(1, sizeof(struct transfer) + packets * sizeof(struct iso_packet));
}

void libusb_free_transfer(struct transfer *transfer) {
    if (transfer && transfer->flags & FREE_BUFFER) free(transfer->buffer);
    free(transfer);
}

int libusb_submit_transfer(struct transfer *transfer) {
    pthread_mutex_lock(&queue_lock);
    int full = last - first == QUEUE;
    if (!full) {
        transfer->actual_length = 0;
        transfer->status = transfer->type == TYPE_BULK ? bulk(transfer) : STALL;
        queue[last++ % QUEUE] = transfer;
        wake();
    }
    pthread_mutex_unlock(&queue_lock);
    return full ? ERROR_IO : 0;
}

int libusb_cancel_transfer(struct transfer *transfer) {
    (void)transfer;
    return ERROR_NOT_FOUND; /* it is executed */
}

static int handle_events(int milliseconds) {
    struct pollfd polled = {event.fd, POLLIN, 0};
    poll(&polled, 1, milliseconds);
    pthread_mutex_lock(&event_lock); /* callbacks are called one after the other */
    uint64_t count;
    if (read(event.fd, &count, sizeof count) < 0) count = 0;
    for (;;) {
        pthread_mutex_lock(&queue_lock);
        struct transfer *transfer = first == last ? NULL : queue[first++ % QUEUE];
        pthread_mutex_unlock(&queue_lock);
        if (!transfer) break;
        int flags = transfer->flags;
        transfer->callback(transfer);
        if (flags & FREE_TRANSFER) libusb_free_transfer(transfer);
    }
    pthread_mutex_unlock(&event_lock);
    return 0;
}

int libusb_handle_events(void *context) { (void)context; return handle_events(60000); }
int libusb_handle_events_completed(void *context, int *completed) { (void)context, (void)completed; return handle_events(60000); }
int libusb_handle_events_timeout(void *context, struct timeval *timeout) {
    (void)context;
    return handle_events(timeout->tv_sec * 1000 + timeout->tv_usec / 1000);
}
void libusb_interrupt_event_handler(void *context) { (void)context, wake(); }

const struct watched **libusb_get_pollfds(void *context) {
    (void)context;
    const struct watched **list = calloc(2, sizeof *list);
    list[0] = &event;
    return list;
}
void libusb_free_pollfds(const struct watched **list) { free(list); }

/* --- the library, the list of devices, the handle ------------------------------------------------------------------ */

static char the_context, the_device, the_handle;

int libusb_init(void **context) {
    if (context) *context = &the_context;
    if (image >= 0) return 0;
    const char *path = getenv("STUB_IMAGE");
    image = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    event.fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (image >= 0 && event.fd >= 0) return 0;
    fprintf(stderr, "stub libusb: STUB_IMAGE is not a file that can be opened\n");
    return ERROR_IO;
}
int libusb_init_context(void **context, const void *options, int count) { (void)options, (void)count; return libusb_init(context); }
void libusb_exit(void *context) { (void)context; }
int libusb_set_option(void *context, int option, ...) { (void)context, (void)option; return 0; }
void libusb_set_log_cb(void *context, void *callback, int mode) { (void)context, (void)callback, (void)mode; }
const char *libusb_error_name(int code) { (void)code; return "error of the stub libusb"; }
const char *libusb_strerror(int code) { return libusb_error_name(code); }
int libusb_has_capability(uint32_t capability) { return capability == 0; }

ssize_t libusb_get_device_list(void *context, void ***list) {
    (void)context;
    *list = calloc(2, sizeof **list);
    (*list)[0] = &the_device;
    return 1;
}
void libusb_free_device_list(void **list, int unref) { (void)unref, free(list); }
void *libusb_ref_device(void *device) { return device; }
void libusb_unref_device(void *device) { (void)device; }
uint8_t libusb_get_bus_number(void *device) { (void)device; return BUS; }
uint8_t libusb_get_device_address(void *device) { (void)device; return ADDRESS; }
uint8_t libusb_get_port_number(void *device) { (void)device; return 1; }
int libusb_get_port_numbers(void *device, uint8_t *ports, int count) { (void)device; return count ? ports[0] = 1 : 0; }
int libusb_get_device_speed(void *device) { (void)device; return SPEED_SUPER; }
int libusb_get_device_descriptor(void *device, struct device_descriptor *descriptor) {
    (void)device;
    *descriptor = device_descriptor;
    return 0;
}
int libusb_get_config_descriptor(void *device, uint8_t index, const struct config_descriptor **descriptor) {
    (void)device;
    *descriptor = &configuration;
    return index ? ERROR_NOT_FOUND : 0;
}
int libusb_get_active_config_descriptor(void *device, const struct config_descriptor **descriptor) {
    return libusb_get_config_descriptor(device, 0, descriptor);
}
int libusb_get_config_descriptor_by_value(void *device, uint8_t value, const struct config_descriptor **descriptor) {
    return libusb_get_config_descriptor(device, value - 1, descriptor);
}
void libusb_free_config_descriptor(void *descriptor) { (void)descriptor; }
int libusb_get_ss_endpoint_companion_descriptor(void *context, const void *endpoint, const struct companion_descriptor **descriptor) {
    (void)context, (void)endpoint;
    *descriptor = &companion_descriptor;
    return 0;
}
void libusb_free_ss_endpoint_companion_descriptor(void *descriptor) { (void)descriptor; }

int libusb_open(void *device, void **handle) { (void)device; *handle = &the_handle; return 0; }
void *libusb_open_device_with_vid_pid(void *context, uint16_t vendor, uint16_t product) {
    (void)context;
    return vendor == device_descriptor.idVendor && product == device_descriptor.idProduct ? &the_handle : NULL;
}
void libusb_close(void *handle) { (void)handle, wake(); }
void *libusb_get_device(void *handle) { (void)handle; return &the_device; }
int libusb_get_configuration(void *handle, int *value) { (void)handle; *value = 1; return 0; }
int libusb_set_configuration(void *handle, int value) { (void)handle; return value == 1 ? 0 : ERROR_NOT_FOUND; }
int libusb_set_interface_alt_setting(void *handle, int number, int alternate) {
    (void)handle;
    return number || alternate ? ERROR_NOT_FOUND : 0;
}
int libusb_claim_interface(void *handle, int number) { (void)handle; return number ? ERROR_NOT_FOUND : 0; }
int libusb_release_interface(void *handle, int number) { (void)handle; return number ? ERROR_NOT_FOUND : 0; }
int libusb_kernel_driver_active(void *handle, int number) { (void)handle, (void)number; return 0; }
int libusb_detach_kernel_driver(void *handle, int number) { (void)handle, (void)number; return ERROR_NOT_FOUND; }
int libusb_attach_kernel_driver(void *handle, int number) { (void)handle, (void)number; return ERROR_NOT_FOUND; }
int libusb_set_auto_detach_kernel_driver(void *handle, int on) { (void)handle, (void)on; return 0; }
int libusb_clear_halt(void *handle, unsigned char endpoint) { (void)handle, (void)endpoint; return 0; }
int libusb_reset_device(void *handle) {
    (void)handle;
    pthread_mutex_lock(&queue_lock);
    stage = COMMAND;
    pthread_mutex_unlock(&queue_lock);
    return 0;
}

#define REFUSED(name) int libusb_##name(void) { return ERROR_NOT_SUPPORTED; }
REFUSED(alloc_streams)
REFUSED(bulk_transfer)
REFUSED(control_transfer)
REFUSED(event_handler_active)
REFUSED(event_handling_ok)
REFUSED(free_streams)
REFUSED(get_max_iso_packet_size)
REFUSED(get_max_packet_size)
REFUSED(get_next_timeout)
REFUSED(get_parent)
REFUSED(get_string_descriptor_ascii)
REFUSED(get_version)
REFUSED(handle_events_locked)
REFUSED(hotplug_deregister_callback)
REFUSED(hotplug_register_callback)
REFUSED(interrupt_transfer)
REFUSED(lock_event_waiters)
REFUSED(lock_events)
REFUSED(set_debug)
REFUSED(set_pollfd_notifiers)
REFUSED(setlocale)
REFUSED(transfer_set_stream_id)
REFUSED(try_lock_events)
REFUSED(unlock_event_waiters)
REFUSED(unlock_events)
REFUSED(wait_for_event)
REFUSED(wrap_sys_device)
