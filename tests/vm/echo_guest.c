/* A guest of one file for the engine's tests: loads the kernel's modules, then answers lines on the agent's port.
 *
 *   ping X -> pong X        set X -> ok        get -> what was set last        file PATH -> its first line
 *   net -> ok (10.0.2.15/24 and a default route by the first interface)
 *   serve PORT TEXT -> ok (TCP: TEXT to each client)        dial ADDRESS PORT -> what came first, or why not
 *   say TEXT -> ok (TEXT on the console)        panic        poweroff
 *   code N -> N (writes a function that returns N, and calls it)        call -> what that function returns
 *   work N -> ok (N MiB of memory written, a file and a process made)
 *   nap MS -> the milliseconds that a sleep of MS took        now -> the milliseconds since the boot
 *   flood -> as much as the port takes ("full" on the console)
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <net/route.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static char value[4096] = "unset";

static void load_modules(void) {
    FILE *order = fopen("/modules/order", "r");
    char name[128], path[160];
    while (order && fscanf(order, "%127s", name) == 1) {
        snprintf(path, sizeof path, "/modules/%s", name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (syscall(SYS_finit_module, fd, "", 0) != 0) printf("insmod %s: %s\n", name, strerror(errno));
        close(fd);
    }
}

static int read_file(const char *path, char *text, size_t size) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got = fd < 0 ? -1 : read(fd, text, size - 1);
    if (fd >= 0) close(fd);
    if (got < 0) return -1;
    text[got] = 0;
    text[strcspn(text, "\n")] = 0;
    return 0;
}

static int open_port(void) {
    char path[512], name[64];
    for (;;) {
        DIR *ports = opendir("/sys/class/virtio-ports");
        for (struct dirent *entry; ports && (entry = readdir(ports));) {
            snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
            if (read_file(path, name, sizeof name) == 0 && strcmp(name, "fcvm.agent") == 0) {
                snprintf(path, sizeof path, "/dev/%s", entry->d_name);
                closedir(ports);
                return open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
            }
        }
        if (ports) closedir(ports);
        nanosleep(&(struct timespec){.tv_nsec = 2000000}, NULL);
    }
}

static void bring_up_network(void) {
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct ifreq request = {.ifr_name = "eth0"};
    struct sockaddr_in *address = (struct sockaddr_in *)&request.ifr_addr;
    address->sin_family = AF_INET;
    inet_pton(AF_INET, "10.0.2.15", &address->sin_addr);
    if (ioctl(fd, SIOCSIFADDR, &request)) perror("SIOCSIFADDR");
    inet_pton(AF_INET, "255.255.255.0", &address->sin_addr);
    if (ioctl(fd, SIOCSIFNETMASK, &request)) perror("SIOCSIFNETMASK");
    request.ifr_flags = IFF_UP | IFF_RUNNING;
    if (ioctl(fd, SIOCSIFFLAGS, &request)) perror("SIOCSIFFLAGS");
    struct rtentry route = {.rt_flags = RTF_UP | RTF_GATEWAY};
    struct sockaddr_in any = {.sin_family = AF_INET}, gateway = any;
    inet_pton(AF_INET, "10.0.2.2", &gateway.sin_addr);
    memcpy(&route.rt_dst, &any, sizeof any);
    memcpy(&route.rt_genmask, &any, sizeof any);
    memcpy(&route.rt_gateway, &gateway, sizeof gateway);
    if (ioctl(fd, SIOCADDRT, &route)) perror("SIOCADDRT");
    close(fd);
}

static void dial(const char *argument, char *reply, size_t size) {
    char address[64] = "";
    int port = 0;
    sscanf(argument, "%63s %d", address, &port);
    struct sockaddr_in there = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    inet_pton(AF_INET, address, &there.sin_addr);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct timeval limit = {.tv_sec = 3};
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    char text[64] = "";
    if (connect(fd, (struct sockaddr *)&there, sizeof there) || read(fd, text, sizeof text - 1) < 0)
        snprintf(text, sizeof text, "error %d", errno);
    snprintf(reply, size, "%s\n", text);
    close(fd);
}

static void serve(const char *argument) {
    int port = atoi(argument);
    const char *text = strchr(argument, ' ');
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int));
    if (bind(listener, (struct sockaddr *)&here, sizeof here) || listen(listener, 16)) perror("listen");
    if (fork() == 0) {
        for (;;) {
            int peer = accept(listener, NULL, NULL);
            if (write(peer, text + 1, strlen(text + 1)) < 0) perror("write");
            close(peer);
        }
    }
    close(listener);
}

static unsigned char *function; /* a page of code, present from the start */

static int call_function(void) { return ((int (*)(void))(void *)function)(); }

static int write_function(int result) {
    unsigned char code[] = {0xb8, 0, 0, 0, 0, 0xc3}; /* mov eax, result; ret */
    memcpy(code + 1, &result, sizeof result);
    memcpy(function, code, sizeof code);
    return call_function();
}

static void work(int mib) {
    static int round;
    char path[32];
    unsigned char *memory = mmap(NULL, (size_t)mib << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (size_t at = 0; memory != MAP_FAILED && at < (size_t)mib << 20; at += 512) memory[at] = (unsigned char)(at + 1);
    snprintf(path, sizeof path, "/work%d", round++);
    FILE *file = fopen(path, "w");
    for (int i = 0; file && i < 1000; i++) fprintf(file, "line %d of %s\n", i, path);
    if (file) fclose(file);
    pid_t child = fork();
    if (child == 0) _exit(write_function(7));
    waitpid(child, NULL, 0);
    if (memory != MAP_FAILED) munmap(memory, (size_t)mib << 20);
}

static int now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int)(time.tv_sec * 1000 + time.tv_nsec / 1000000);
}

static int nap(int ms) {
    int before = now();
    nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L}, NULL);
    return now() - before;
}

static void flood(int port) {
    char line[1024];
    memset(line, 'x', sizeof line);
    while (write(port, line, sizeof line) > 0) continue;
    printf("full\n");
}

static void end(int how) {
    sync();
    reboot(how);
}

static void answer(int port, char *line, char *reply, size_t size) {
    snprintf(reply, size, "ok\n");
    if (strncmp(line, "ping ", 5) == 0) snprintf(reply, size, "pong %s\n", line + 5);
    else if (strncmp(line, "set ", 4) == 0) snprintf(value, sizeof value, "%s", line + 4);
    else if (strcmp(line, "get") == 0) snprintf(reply, size, "%s\n", value);
    else if (strncmp(line, "file ", 5) == 0) {
        char now[200] = "";
        read_file(line + 5, now, sizeof now);
        snprintf(reply, size, "%s\n", now);
    } else if (strcmp(line, "net") == 0) bring_up_network();
    else if (strncmp(line, "serve ", 6) == 0) serve(line + 6);
    else if (strncmp(line, "dial ", 5) == 0) dial(line + 5, reply, size);
    else if (strncmp(line, "say ", 4) == 0) printf("%s\n", line + 4);
    else if (strncmp(line, "code ", 5) == 0) snprintf(reply, size, "%d\n", write_function(atoi(line + 5)));
    else if (strcmp(line, "call") == 0) snprintf(reply, size, "%d\n", call_function());
    else if (strncmp(line, "work ", 5) == 0) work(atoi(line + 5));
    else if (strcmp(line, "now") == 0) snprintf(reply, size, "%d\n", now());
    else if (strcmp(line, "flood") == 0) flood(port);
    else if (strncmp(line, "nap ", 4) == 0) snprintf(reply, size, "%d\n", nap(atoi(line + 4)));
    else if (strcmp(line, "panic") == 0) {
        int fd = open("/proc/sysrq-trigger", O_WRONLY | O_CLOEXEC);
        if (write(fd, "c", 1) < 0) perror("sysrq");
    } else if (strcmp(line, "poweroff") == 0) end(RB_POWER_OFF);
    else snprintf(reply, size, "unknown %s\n", line);
}

static void converse(int port) {
    static char input[4096], output[8192];
    size_t have = 0, queued = 0;
    int events = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET};
    epoll_ctl(events, EPOLL_CTL_ADD, port, &event);
    for (;;) {
        epoll_wait(events, &event, 1, -1);
        for (ssize_t got; (got = read(port, input + have, sizeof input - have)) > 0;) {
            have += (size_t)got;
            for (char *stop; (stop = memchr(input, '\n', have));) {
                *stop = 0;
                answer(port, input, output + queued, sizeof output - queued);
                queued += strlen(output + queued);
                have -= (size_t)(stop + 1 - input);
                memmove(input, stop + 1, have);
            }
        }
        for (ssize_t sent; queued && (sent = write(port, output, queued)) > 0;) {
            queued -= (size_t)sent;
            memmove(output, output + sent, queued);
        }
    }
}

int main(void) {
    mount("none", "/dev", "devtmpfs", 0, NULL);
    mount("none", "/proc", "proc", 0, NULL);
    mount("none", "/sys", "sysfs", 0, NULL);
    dup2(open("/dev/console", O_RDWR), 0);
    dup2(0, 1);
    dup2(0, 2);
    setvbuf(stdout, NULL, _IONBF, 0);
    load_modules();
    function = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int port = open_port();
    printf("fcvm-agent: ready\n");
    converse(port);
}
