/*
 * Rewind: put a guest back to a checkpoint in the same process.
 *
 * The guest's RAM must be a private mapping of a file. A page that the guest
 * writes becomes a private page, and dropping that page brings the file's page
 * back. Device state is loaded from memory. Translated code is kept, except for
 * that of the pages that were dropped.
 *
 * The build script puts this file into QEMU's migration directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <sys/socket.h>
#include "qemu/error-report.h"
#include "qemu/module.h"
#include "qemu/notify.h"
#include "qemu/seqlock.h"
#include "qapi/error.h"
#include "qapi/qmp/dispatch.h"
#include "qapi/qmp/qdict.h"
#include "qapi/qmp/qlist.h"
#include "qapi/qmp/qstring.h"
#include "block/block.h"
#include "chardev/char-fd.h"
#include "chardev/char-socket.h"
#include "exec/exec-all.h"
#include "hw/virtio/virtio-serial.h"
#include "io/channel-buffer.h"
#include "io/channel-file.h"
#include "monitor/monitor-internal.h"
#include "softmmu/timers-state.h"
#include "sysemu/cpus.h"
#include "sysemu/hw_accel.h"
#include "sysemu/runstate.h"
#include "sysemu/sysemu.h"
#include "sysemu/tcg.h"
#include "accel/tcg/tb-context.h"
#include "qemu-file.h"
#include "savevm.h"
#include "rewind.h"

static struct {
    GByteArray *devices;  /* NULL before the checkpoint */
    GPtrArray *ports;     /* of VirtIOSerialPort */
    QDict *arguments;     /* of a rewind that has none */
} checkpoint;

bool rewind_keeps_translations;

static GByteArray *save_devices(Error **errp)
{
    QIOChannelBuffer *buffer = qio_channel_buffer_new(64 * 1024);
    QEMUFile *file = qemu_file_new_output(QIO_CHANNEL(buffer));
    GByteArray *saved = NULL;

    if (qemu_save_device_state(file) >= 0) {
        qemu_fflush(file);
    }
    if (qemu_file_get_error(file)) {
        error_setg(errp, "cannot save the device state");
    } else {
        saved = g_byte_array_append(g_byte_array_new(), buffer->data,
                                    buffer->usage);
    }
    qemu_fclose(file);
    object_unref(OBJECT(buffer));
    return saved;
}

static bool load_devices(Error **errp)
{
    GByteArray *saved = checkpoint.devices;
    QIOChannelBuffer *buffer = qio_channel_buffer_new(saved->len);
    QEMUFile *file;
    bool loaded;

    memcpy(buffer->data, saved->data, saved->len);
    buffer->usage = saved->len;
    file = qemu_file_new_input(QIO_CHANNEL(buffer));
    /* By this QEMU sees to it that ticks never go back, as they do here. */
    timers_state.cpu_ticks_prev = 0;
    cpu_synchronize_all_pre_loadvm();
    rewind_keeps_translations = true;
    loaded = qemu_get_be32(file) == QEMU_VM_FILE_MAGIC &&
             qemu_get_be32(file) == QEMU_VM_FILE_VERSION &&
             qemu_load_device_state(file) >= 0;
    rewind_keeps_translations = false;
    if (!loaded) {
        error_setg(errp, "cannot load the device state");
    }
    qemu_fclose(file);
    object_unref(OBJECT(buffer));
    return loaded;
}

static int find_port(Object *object, void *opaque)
{
    if (object_dynamic_cast(object, TYPE_VIRTIO_SERIAL_PORT)) {
        g_ptr_array_add(checkpoint.ports, object);
    }
    return 0;
}

/* A reset keeps a port throttled until the host reads what was written. */
static void unthrottle_ports(void)
{
    for (guint i = 0; i < checkpoint.ports->len; i++) {
        VirtIOSerialPort *port = g_ptr_array_index(checkpoint.ports, i);

        if (port->throttled) {
            virtio_serial_throttle_port(port, false);
        }
    }
}

static bool discard_input(Chardev *chardev, Error **errp)
{
    SocketChardev *socket = SOCKET_CHARDEV(chardev);
    char bytes[4096];

    while (socket->sioc &&
           recv(socket->sioc->fd, bytes, sizeof(bytes), MSG_DONTWAIT) > 0) {
        continue;
    }
    return true;
}

static bool truncate_file(Chardev *chardev, Error **errp)
{
    int fd = QIO_CHANNEL_FILE(FD_CHARDEV(chardev)->ioc_out)->fd;

    if (ftruncate(fd, 0) < 0 || lseek(fd, 0, SEEK_SET) < 0) {
        error_setg_errno(errp, errno, "cannot truncate %s", chardev->label);
        return false;
    }
    return true;
}

static const struct ChardevAction {
    const char *argument;
    const char *type;
    bool (*apply)(Chardev *chardev, Error **errp);
} chardev_actions[] = {
    { "discard-input", TYPE_CHARDEV_SOCKET, discard_input },
    { "truncate", TYPE_CHARDEV_FILE, truncate_file },
};

/* Look for the character devices that an action shall have, or act on them. */
static bool visit_chardevs(const struct ChardevAction *action,
                           QDict *arguments, bool apply, Error **errp)
{
    QObject *value = qdict_get(arguments, action->argument);
    QList *names = qobject_to(QList, value);
    QListEntry *entry;

    if (value && !names) {
        error_setg(errp, "'%s' is no list", action->argument);
        return false;
    }
    if (!names) {
        return true;
    }
    QLIST_FOREACH_ENTRY(names, entry) {
        QString *name = qobject_to(QString, qlist_entry_obj(entry));
        Chardev *found = name ? qemu_chr_find(qstring_get_str(name)) : NULL;

        if (!found || !object_dynamic_cast(OBJECT(found), action->type)) {
            error_setg(errp, "'%s' names no %s", action->argument,
                       action->type);
            return false;
        }
        if (apply && !action->apply(found, errp)) {
            return false;
        }
    }
    return true;
}

static bool act_on_chardevs(QDict *arguments, bool apply, Error **errp)
{
    for (size_t i = 0; i < ARRAY_SIZE(chardev_actions); i++) {
        if (!visit_chardevs(&chardev_actions[i], arguments, apply, errp)) {
            return false;
        }
    }
    return true;
}

/* See that a rewind is possible. Nothing has changed where it is not. */
static bool may_rewind(QDict *arguments, Error **errp)
{
    if (!checkpoint.devices) {
        error_setg(errp, "there is no checkpoint");
        return false;
    }
    if (!runstate_is_running() && !runstate_check(RUN_STATE_PAUSED) &&
        !runstate_check(RUN_STATE_IO_ERROR)) {
        error_setg(errp, "the VM neither runs nor is paused");
        return false;
    }
    if (qemu_shutdown_requested_get() || qemu_reset_requested_get()) {
        error_setg(errp, "the guest shuts down");
        return false;
    }
    return act_on_chardevs(arguments, false, errp);
}

/*
 * Put RAM, devices and character devices back.
 *
 * A reset comes first, as it does when QEMU loads a snapshot. It drops what
 * devices keep outside of their saved state: queued packets, half-written
 * elements, failed requests. A reset may write to RAM, and loading reads the
 * rings in RAM, so RAM is put back between the two.
 */
static bool put_back(QDict *arguments, QDict *report, Error **errp)
{
    unsigned blocks = tb_ctx.tb_phys_invalidate_count;
    int64_t start = g_get_monotonic_time();
    int64_t was_reset, had_ram;
    size_t pages = 0;

    vm_stop(RUN_STATE_PAUSED);
    bdrv_drain_all();
    qemu_system_reset(SHUTDOWN_CAUSE_SNAPSHOT_LOAD);
    unthrottle_ports();
    was_reset = g_get_monotonic_time();
    if (!rewind_ram_restore(&pages, errp)) {
        return false;
    }
    had_ram = g_get_monotonic_time();
    if (!load_devices(errp) || !act_on_chardevs(arguments, true, errp)) {
        return false;
    }
    qdict_put_int(report, "pages", pages);
    qdict_put_int(report, "blocks", tb_ctx.tb_phys_invalidate_count - blocks);
    qdict_put_int(report, "reset-us", was_reset - start);
    qdict_put_int(report, "ram-us", had_ram - was_reset);
    qdict_put_int(report, "device-us", g_get_monotonic_time() - had_ram);
    qdict_put_int(report, "total-us", g_get_monotonic_time() - start);
    qdict_put_int(report, "tb-flushes", tb_ctx.tb_flush_count);
    return true;
}

static void checkpoint_command(QDict *arguments, QObject **reply, Error **errp)
{
    if (checkpoint.devices) {
        error_setg(errp, "there is a checkpoint already");
        return;
    }
    if (!runstate_check(RUN_STATE_PAUSED)) {
        error_setg(errp, "the VM is not paused");
        return;
    }
    bdrv_drain_all();
    if (!act_on_chardevs(arguments, false, errp) || !rewind_ram_save(errp)) {
        return;
    }
    checkpoint.ports = g_ptr_array_new();
    object_child_foreach_recursive(object_get_root(), find_port, NULL);
    checkpoint.arguments = qobject_ref(arguments);
    checkpoint.devices = save_devices(errp);
    *reply = checkpoint.devices ? QOBJECT(qdict_new()) : NULL;
}

static void rewind_command(QDict *arguments, QObject **reply, Error **errp)
{
    QDict *report;
    Error *error = NULL;

    if (!qdict_size(arguments) && checkpoint.arguments) {
        arguments = checkpoint.arguments;
    }
    if (!may_rewind(arguments, errp)) {
        return;
    }
    report = qdict_new();
    if (!put_back(arguments, report, &error)) {
        /* The guest is neither here nor there, and must not run again. */
        error_reportf_err(error, "x-fcvm-rewind: ");
        exit(EXIT_FAILURE);
    }
    if (qdict_get_try_bool(arguments, "flush-translations", false)) {
        tb_flush(first_cpu);
    }
    *reply = QOBJECT(report);
}

static void put_base64(QDict *report, const char *name, GByteArray *bytes)
{
    g_autofree char *text = g_base64_encode(bytes->data, bytes->len);

    qdict_put_str(report, name, text);
}

static void state_command(QDict *arguments, QObject **reply, Error **errp)
{
    GByteArray *now;
    QDict *report;

    if (!checkpoint.devices || runstate_is_running()) {
        error_setg(errp, "there is no checkpoint, or the VM is running");
        return;
    }
    now = save_devices(errp);
    if (!now) {
        return;
    }
    report = qdict_new();
    put_base64(report, "state", now);
    put_base64(report, "checkpoint", checkpoint.devices);
    g_byte_array_free(now, true);
    *reply = QOBJECT(report);
}

static void add_commands(Notifier *notifier, void *data)
{
    qmp_register_command(&qmp_commands, "x-fcvm-checkpoint",
                         checkpoint_command, 0, 0);
    qmp_register_command(&qmp_commands, "x-fcvm-rewind",
                         rewind_command, 0, 0);
    qmp_register_command(&qmp_commands, "x-fcvm-state",
                         state_command, 0, 0);
}

static void add_commands_later(void)
{
    static Notifier notifier = { .notify = add_commands };

    qemu_add_machine_init_done_notifier(&notifier);
}

type_init(add_commands_later);
