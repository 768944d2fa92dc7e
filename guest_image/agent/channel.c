#include "channel.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

#include "boot.h"
#include "loop.h"
#include "protocol.h"
#include "report.h"

enum { BACKLOG = 4096, PORT_WAIT_S = 10 };

enum channel_kind { CHANNEL_PORT, CHANNEL_VSOCK, CHANNEL_GIVEN };

static void on_channel(struct source *source, uint32_t events);
static void on_connection(struct source *source, uint32_t events);

static enum channel_kind kind;
static struct source channel = {.fd = -1, .ready = on_channel};
static struct source listener = {.fd = -1, .ready = on_connection};
static bool can_read, can_write;
static char port_path[272];

static void on_channel(struct source *source, uint32_t events)
{
    (void)source;
    /* On a virtio port EPOLLHUP does not show that a host left and came back, so it only means "read". */
    if (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR))
        can_read = true;
    if (events & (EPOLLOUT | EPOLLERR))
        can_write = true;
}

static void adopt(int fd)
{
    loop_close(&channel);
    channel.fd = fd;
    can_read = can_write = true;
    if (loop_add(&channel, EPOLLIN | EPOLLOUT | EPOLLRDHUP))
        report_fatal("epoll_ctl", "channel");
}

static void on_connection(struct source *source, uint32_t events)
{
    int fd;

    (void)events;
    /* The newest connection is the channel: an older one belongs to a host that is gone. */
    while ((fd = accept4(source->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0)
        adopt(fd);
}

static bool port_has_our_name(const char *port)
{
    char path[320], name[64] = "";
    int length = snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", port);
    if (length < 0 || (size_t)length >= sizeof path)
        return false;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    ssize_t got = read(fd, name, sizeof name - 1);
    close(fd);
    if (got <= 0)
        return false;
    name[strcspn(name, "\n")] = 0;
    return strcmp(name, PROTOCOL_PORT_NAME) == 0;
}

/* Put the path of our port into port_path, or an empty text. */
static bool find_port(const void *argument)
{
    DIR *ports = opendir("/sys/class/virtio-ports");
    struct dirent *entry;

    (void)argument;
    port_path[0] = 0;
    while (ports && !port_path[0] && (entry = readdir(ports)))
        if (entry->d_name[0] != '.' && port_has_our_name(entry->d_name))
            snprintf(port_path, sizeof port_path, "/dev/%s", entry->d_name);
    if (ports)
        closedir(ports);
    return port_path[0] && access(port_path, F_OK) == 0;
}

static bool has_virtio_console(void)
{
    DIR *devices = opendir("/sys/bus/virtio/drivers/virtio_console");
    struct dirent *entry;
    bool found = false;

    while (devices && !found && (entry = readdir(devices)))
        found = strncmp(entry->d_name, "virtio", 6) == 0;
    if (devices)
        closedir(devices);
    return found;
}

/* The device announces its ports and their names after its driver has started. */
static int open_virtio_port(void)
{
    if (!has_virtio_console() || !boot_wait_for(find_port, NULL, PORT_WAIT_S))
        return -1;
    int fd = open(port_path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0)
        report_fatal("open", port_path);
    return fd;
}

static void listen_on_vsock(void)
{
    struct sockaddr_vm address = {
        .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = PROTOCOL_VSOCK_PORT};

    listener.fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (listener.fd < 0)
        report_fatal("no virtio port named " PROTOCOL_PORT_NAME "; socket", "AF_VSOCK");
    if (bind(listener.fd, (struct sockaddr *)&address, sizeof address))
        report_fatal("bind", "AF_VSOCK");
    if (listen(listener.fd, BACKLOG))
        report_fatal("listen", "AF_VSOCK");
    if (loop_add(&listener, EPOLLIN))
        report_fatal("epoll_ctl", "AF_VSOCK");
}

void channel_find(void)
{
    int fd = open_virtio_port();

    if (fd >= 0) {
        kind = CHANNEL_PORT;
        adopt(fd);
    } else {
        kind = CHANNEL_VSOCK;
        report_power_off_by_reset();
        listen_on_vsock();
    }
}

void channel_use(int fd)
{
    kind = CHANNEL_GIVEN;
    fcntl(fd, F_SETFL, O_NONBLOCK);
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    adopt(fd);
}

bool channel_can_read(void)
{
    return can_read && channel.fd >= 0;
}

bool channel_can_write(void)
{
    return can_write && channel.fd >= 0;
}

static void lose_channel(void)
{
    if (kind == CHANNEL_GIVEN)
        report_power_off();
    if (kind == CHANNEL_VSOCK)
        loop_close(&channel);
}

size_t channel_read(void *bytes, size_t size)
{
    if (!channel_can_read())
        return 0;
    ssize_t got = read(channel.fd, bytes, size);
    if (got > 0)
        return (size_t)got;
    can_read = false;
    if (got == 0 || (errno != EAGAIN && errno != EINTR))
        lose_channel();
    else if (errno == EINTR)
        can_read = true;
    return 0;
}

size_t channel_write(const void *bytes, size_t size)
{
    if (!channel_can_write())
        return 0;
    ssize_t put = write(channel.fd, bytes, size);
    if (put > 0)
        return (size_t)put;
    can_write = put < 0 && errno == EINTR;
    if (put < 0 && errno != EAGAIN && errno != EINTR && kind != CHANNEL_PORT)
        lose_channel();
    return 0;
}
