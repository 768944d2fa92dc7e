/* The wire protocol between the host and the guest agent: one byte channel, many streams.
 *
 * pytest_fcvm/guest/frames.py has the same names and numbers in Python; tests/unit/guest/test_frames.py compares the two.
 *
 * FRAME    u32 length | u8 type | u32 stream | payload[length] | u8 0      (integers little-endian, length <= 65536)
 *          No secret contains a zero byte. A host may leave a frame half sent; the next host's secret can fill that frame up,
 *          but the frame then does not end in zero and is never executed.
 *
 * SESSION  host:  secret[16] HELLO{u32 version, nonce[16], next_secret[16]}
 *          agent: nonce[16]  WELCOME{u32 version, text build id}
 *          The agent looks for the current secret at every byte of its input, also inside frames. When it finds the secret, it
 *          drops an incomplete frame and everything it has queued, ends the streams of the session before (exec: see below),
 *          and reads frames from there. The first frame must be HELLO, which replaces the secret by next_secret. The host drops
 *          everything before its nonce. The first secret after power-on is PROTOCOL_BOOT_SECRET.
 *          The agent never acts on POLLHUP: the HELLO of the next host shows that a host has left.
 *
 * STREAMS  Only the host opens them, with ids that grow by any step within a session (0 is the session itself).
 *          OPEN{u8 kind, u32 body length, first bytes of the body}, further bytes in BODY frames; a body is a list of
 *          FIELDS: u16 tag | u32 length | bytes. Numbers are u64, texts and paths are bytes without a final zero, lists repeat
 *          their tag. A body has at most PROTOCOL_BODY_MAX bytes. Unknown tags are ignored.
 *          The agent answers every OPEN with one REPLY{u32 errno, fields}. The REPLY ends the stream of a verb (kind < 32), and
 *          any stream if errno is not 0. FIELD_MESSAGE then names the call that failed and its subject.
 *          DATA and EOF have a channel: 0 is stdin, stdout, the socket or the log, 1 is stderr.
 *          Credit: each side may send PROTOCOL_WINDOW bytes of DATA per stream, direction and channel, and as many more as
 *          WINDOW frames grant. Only DATA counts.
 *          A socket stream ends when both sides have sent EOF, or one side CLOSE. An exec stream ends with EXIT, which follows
 *          the last DATA. CLOSE from the host ends the command (SIGHUP to its process group, SIGKILL after 1 s). A command
 *          that goes on without its session gets EOF on stdin, and the agent keeps the last 64 KiB of each output for ATTACH.
 *          Frames for a stream that has ended are ignored. An id that was never opened is malformed.
 *          After every frame, the agent sends waiting REPLY, WINDOW, EVENT and CLOSE frames before DATA.
 *
 * FAULTS   On malformed input or DATA beyond credit, the agent sends ERROR{u64 offset into this session's input, text}, ends
 *          the session and discards input up to the secret. No input makes the agent exit.
 */
#ifndef FCVM_PROTOCOL_H
#define FCVM_PROTOCOL_H

enum {
    PROTOCOL_VERSION = 1,
    PROTOCOL_HEADER = 9,        /* bytes before the payload */
    PROTOCOL_PAYLOAD_MAX = 65536,
    PROTOCOL_BODY_MAX = 1114112, /* 1 MiB of arguments and 64 KiB of everything else */
    PROTOCOL_WINDOW = 65536,
    PROTOCOL_SECRET = 16,
    PROTOCOL_STREAMS_MAX = 16384, /* open at the same time; a further OPEN gets EAGAIN */
    PROTOCOL_VSOCK_PORT = 1024
};
#define PROTOCOL_BOOT_SECRET "fcvm-boot-secret"
#define PROTOCOL_PORT_NAME "fcvm.agent" /* of the virtio-serial port */

enum frame_type {
    FRAME_HELLO = 1,   /* host */
    FRAME_WELCOME = 2, /* agent */
    FRAME_OPEN = 3,    /* host */
    FRAME_BODY = 4,    /* host */
    FRAME_REPLY = 5,   /* agent */
    FRAME_DATA = 6,    /* both: u8 channel, bytes (the channel byte uses no credit) */
    FRAME_EOF = 7,     /* both: u8 channel */
    FRAME_WINDOW = 8,  /* both: u8 channel, u32 bytes */
    FRAME_CLOSE = 9,   /* both: u32 errno, 0 = no longer wanted */
    FRAME_EXIT = 10,   /* agent: fields EXIT_CODE or EXIT_SIGNAL, MESSAGE if the program could not be started, OOM_KILLS
                          if memory ran out meanwhile */
    FRAME_SIGNAL = 11, /* host: u8 signal, to the exec's process group */
    FRAME_EVENT = 12,  /* agent, stream 0: u8 event, fields */
    FRAME_ERROR = 13,  /* agent, stream 0: u64 offset, text */
    FRAME_RESIZE = 14  /* host: u16 rows, u16 columns, of the exec's terminal */
};

enum stream_kind {
    /* verbs: one REPLY */
    KIND_CONFIGURE = 1,   /* mount the rootfs, set up names, network and limits: HOSTNAME MACHINE_ID INTERFACE MAC ADDRESS
                             GATEWAY DNS* HOSTS* UPPER_MIB UPPER_DEVICE ROOT_DEVICE VOLUME* SHM_MIB SYSCTL* ULIMIT*. Once
                             per boot */
    KIND_START = 2,       /* start the workload: ARG+ ENV* CWD (made if it is missing) USER FLAGS(4 = an init: /run,
                             /run/lock and /tmp are empty). REPLY has PID. Once per boot */
    KIND_STATUS = 3,      /* REPLY: STATE (idle|running|exited|frozen), EXIT_CODE or EXIT_SIGNAL, OOM_KILLS */
    KIND_METRICS = 4,     /* REPLY: METRIC* "name=value" (units in the name) */
    KIND_QUIESCE = 5,     /* SECRET PEER_GATEWAY: freeze the workload's cgroup, give up the gateway's address unless
                             PEER_GATEWAY is 1, reply, then discard input up to SECRET */
    KIND_PERSONALISE = 6, /* ENTROPY REALTIME_NS MACHINE_ID BOOT_ID MAC ADDRESS GATEWAY DNS* HOSTS* INTERFACE, all
                             optional. HOSTS replace the earlier HOSTS; other lines of /etc/hosts stay. ARG* is a hook
                             command, which runs before the thaw. The REPLY goes out before the thaw.
                             FLAGS(16 = the workload stays frozen, and another PERSONALISE follows with the time of day at
                             which the host got the REPLY). The clock is never set back by less than a second.
                             With ENTROPY or MAC the guest gets another identity: connections to peers outside are reset */
    KIND_LISTENING = 7,   /* PORT PROTO: REPLY has LISTENING 0|1|2|3 (2: on a loopback address alone; 3: over IPv6 alone) */
    KIND_STOP = 8,        /* SIGNAL to the workload's first process */
    KIND_POWEROFF = 9,
    KIND_SYNC = 10,       /* sync(2) */
    KIND_FREEZE = 11,     /* freeze the workload's cgroup; the session goes on; PERSONALISE thaws */
    KIND_JOIN = 12,       /* INTERFACE MAC ADDRESS: bring up another interface, of a private network. HOSTS* replace the
                             earlier HOSTS. Comes before PERSONALISE */
    KIND_SUSPEND = 13,    /* SECRET RESUME_TOKEN: freeze the workload's cgroup, reply, then send nothing and discard input up
                             to one of the two. RESUME_TOKEN comes in the same VM: the session resumes, PERSONALISE thaws.
                             SECRET comes in a copy of the VM: a new session begins, and processes of EXEC go on without
                             their streams */
    /* streams: REPLY, then frames until the end */
    KIND_EXEC = 32,    /* ARG+ ENV* CWD USER FLAGS(1 = detached: keeps running when the stream is closed or lost; 2 = on a
                          terminal of ROWS and COLUMNS: all output on channel 0, EOF types Ctrl-D). REPLY has PID */
    KIND_CONNECT = 33, /* PORT PROTO(tcp | udp) ADDRESS(default: the interface's own): a connection from the gateway's
                          address. With udp, DATA has datagrams, each behind its length, u16. If the host has sent DATA
                          already, the REPLY may wait for the peer's first bytes */
    KIND_LOGS = 34,    /* FLAGS(8 = only output that no earlier stream was sent): output of the workload, first from the
                          ring. EOF after the workload has ended and everything is sent */
    KIND_TAR_IN = 35,  /* PATH USER FLAGS: extract a tar stream (channel 0, host to guest) below the directory PATH. Ends
                          with EXIT. FLAGS: 16 = PATH, its symlinks followed, is the place of the stream's one root: if
                          PATH is a directory, a file goes into it under the root's name, and a directory merges with it;
                          32 = as 16, but such a directory is emptied first and gets the root's owner, mode and time */
    KIND_TAR_OUT = 36, /* PATH: send PATH (file or directory) as a tar stream. Ends with EXIT */
    KIND_ATTACH = 37,  /* PID of an EXEC that goes on without its session, or has ended so: REPLY has PID and, if output was
                          dropped, METRIC dropped_bytes. Then as EXEC, beginning with the output that was kept */
    KIND_ACCEPT = 38   /* PORT ADDRESS: the next TCP connection that a program in the guest makes to it. The agent listens
                          from the first ACCEPT until none is open. The REPLY comes with the connection, which may be
                          never */
};

enum event_kind {
    EVENT_WORKLOAD_EXIT = 1, /* EXIT_CODE or EXIT_SIGNAL, OOM_KILLS; sent to each later session too, after WELCOME */
    EVENT_OOM = 2            /* OOM_KILLS */
};

enum field_tag {
    FIELD_ARG = 1,
    FIELD_ENV = 2,          /* NAME=value */
    FIELD_CWD = 3,
    FIELD_USER = 4,         /* user | uid [: group | gid], looked up in the image's own files */
    FIELD_HOSTNAME = 5,
    FIELD_MACHINE_ID = 6,   /* 32 hex digits */
    FIELD_BOOT_ID = 7,      /* UUID text */
    FIELD_MAC = 8,          /* 6 bytes */
    FIELD_ADDRESS = 9,      /* text "10.0.2.15/24"; in CONNECT without the prefix length */
    FIELD_GATEWAY = 10,     /* text */
    FIELD_DNS = 11,         /* text */
    FIELD_HOSTS = 12,       /* one line of /etc/hosts */
    FIELD_ENTROPY = 13,     /* 32 bytes */
    FIELD_REALTIME_NS = 14, /* since 1970 */
    FIELD_UPPER_MIB = 15,   /* size of the writable layer (tmpfs) */
    FIELD_SECRET = 16,
    FIELD_PORT = 17,
    FIELD_PROTO = 18,       /* text tcp | udp */
    FIELD_SIGNAL = 19,
    FIELD_PATH = 20,
    FIELD_FLAGS = 21,
    FIELD_MESSAGE = 22,
    FIELD_PID = 23,         /* in the workload's PID namespace */
    FIELD_EXIT_CODE = 24,
    FIELD_EXIT_SIGNAL = 25,
    FIELD_STATE = 26,
    FIELD_METRIC = 27,
    FIELD_ROOT_DEVICE = 28, /* text, /dev/vda */
    FIELD_INTERFACE = 29,   /* text, eth0 */
    FIELD_LISTENING = 30,
    FIELD_OOM_KILLS = 31,
    FIELD_PEER_GATEWAY = 32, /* 1: the guest has the gateway's address (connections come by CONNECT, no peer behind a
                               NIC has it); 0: the network has it. In CONFIGURE, QUIESCE and PERSONALISE */
    FIELD_ROWS = 33,
    FIELD_COLUMNS = 34,
    FIELD_UPPER_DEVICE = 35, /* text, /dev/vdb: the ext4 file system of the writable layer; without it, a tmpfs */
    FIELD_RESUME_TOKEN = 36, /* 16 bytes, as SECRET */
    FIELD_VOLUME = 37,      /* text, /var/lib/data: a directory on the file system of the writable layer, not of the
                               overlay; outer ones come first */
    FIELD_SYSCTL = 38,      /* text, vm.max_map_count=262144 */
    FIELD_ULIMIT = 39,      /* text, RESOURCE:SOFT:HARD, numbers as in Linux; -1: no limit */
    FIELD_SHM_MIB = 40      /* size of /dev/shm */
};

#endif
