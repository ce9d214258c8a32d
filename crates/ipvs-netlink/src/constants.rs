//! Numbers of the kernel's interface, named as the kernel names them.
//!
//! Source: `include/uapi/linux/ip_vs.h` of Linux 6.1 (every value below stands there), unless a comment says
//! otherwise. They are part of the kernel's stable interface: new ones are added at the end, none change.

/// Name under which the family is registered; its number is given out at run time (`IPVS_GENL_NAME`).
pub const IPVS_GENL_NAME: &str = "IPVS";
/// Version in the generic netlink header (`IPVS_GENL_VERSION`).
pub const IPVS_GENL_VERSION: u8 = 1;

/// Add a service; also what the kernel calls a service in its answers.
pub const IPVS_CMD_NEW_SERVICE: u8 = 1;
/// Change a service.
pub const IPVS_CMD_SET_SERVICE: u8 = 2;
/// Delete a service.
pub const IPVS_CMD_DEL_SERVICE: u8 = 3;
/// Read one service or dump all.
pub const IPVS_CMD_GET_SERVICE: u8 = 4;
/// Add a destination; also what the kernel calls a destination in its answers.
pub const IPVS_CMD_NEW_DEST: u8 = 5;
/// Change a destination.
pub const IPVS_CMD_SET_DEST: u8 = 6;
/// Delete a destination.
pub const IPVS_CMD_DEL_DEST: u8 = 7;
/// Dump the destinations of a service.
pub const IPVS_CMD_GET_DEST: u8 = 8;
/// Start a synchronisation daemon; also what the kernel calls a daemon in its answers.
pub const IPVS_CMD_NEW_DAEMON: u8 = 9;
/// Stop a synchronisation daemon.
pub const IPVS_CMD_DEL_DAEMON: u8 = 10;
/// Dump the synchronisation daemons.
pub const IPVS_CMD_GET_DAEMON: u8 = 11;
/// Set the timeouts; also what the kernel calls its answer to `IPVS_CMD_GET_CONFIG`.
pub const IPVS_CMD_SET_CONFIG: u8 = 12;
/// Read the timeouts.
pub const IPVS_CMD_GET_CONFIG: u8 = 13;
/// Only in the answer to `IPVS_CMD_GET_INFO`.
pub const IPVS_CMD_SET_INFO: u8 = 14;
/// Read version and table size.
pub const IPVS_CMD_GET_INFO: u8 = 15;
/// Zero the counters of one service or of all.
pub const IPVS_CMD_ZERO: u8 = 16;
/// Delete every service.
pub const IPVS_CMD_FLUSH: u8 = 17;

/// Nested: a service.
pub const IPVS_CMD_ATTR_SERVICE: u16 = 1;
/// Nested: a destination.
pub const IPVS_CMD_ATTR_DEST: u16 = 2;
/// Nested: a synchronisation daemon.
pub const IPVS_CMD_ATTR_DAEMON: u16 = 3;
/// u32, seconds.
pub const IPVS_CMD_ATTR_TIMEOUT_TCP: u16 = 4;
/// u32, seconds.
pub const IPVS_CMD_ATTR_TIMEOUT_TCP_FIN: u16 = 5;
/// u32, seconds.
pub const IPVS_CMD_ATTR_TIMEOUT_UDP: u16 = 6;

/// u16: `AF_INET` or `AF_INET6`.
pub const IPVS_SVC_ATTR_AF: u16 = 1;
/// u16: `IPPROTO_*`.
pub const IPVS_SVC_ATTR_PROTOCOL: u16 = 2;
/// 16 bytes; a v4 address stands in the first four.
pub const IPVS_SVC_ATTR_ADDR: u16 = 3;
/// u16, big-endian.
pub const IPVS_SVC_ATTR_PORT: u16 = 4;
/// u32.
pub const IPVS_SVC_ATTR_FWMARK: u16 = 5;
/// String, at most [`IP_VS_SCHEDNAME_MAXLEN`] bytes with its NUL.
pub const IPVS_SVC_ATTR_SCHED_NAME: u16 = 6;
/// `struct ip_vs_flags`: u32 flags, u32 mask.
pub const IPVS_SVC_ATTR_FLAGS: u16 = 7;
/// u32, seconds.
pub const IPVS_SVC_ATTR_TIMEOUT: u16 = 8;
/// v4: a mask, big-endian; v6: a prefix length, native-endian u32.
pub const IPVS_SVC_ATTR_NETMASK: u16 = 9;
/// Nested: counters of 32 bits.
pub const IPVS_SVC_ATTR_STATS: u16 = 10;
/// String, at most [`IP_VS_PENAME_MAXLEN`] bytes with its NUL.
pub const IPVS_SVC_ATTR_PE_NAME: u16 = 11;
/// Nested: counters of 64 bits.
pub const IPVS_SVC_ATTR_STATS64: u16 = 12;

/// 16 bytes; a v4 address stands in the first four.
pub const IPVS_DEST_ATTR_ADDR: u16 = 1;
/// u16, big-endian.
pub const IPVS_DEST_ATTR_PORT: u16 = 2;
/// u32: `IP_VS_CONN_F_*` under [`IP_VS_CONN_F_FWD_MASK`].
pub const IPVS_DEST_ATTR_FWD_METHOD: u16 = 3;
/// u32, in truth an int.
pub const IPVS_DEST_ATTR_WEIGHT: u16 = 4;
/// u32.
pub const IPVS_DEST_ATTR_U_THRESH: u16 = 5;
/// u32.
pub const IPVS_DEST_ATTR_L_THRESH: u16 = 6;
/// u32.
pub const IPVS_DEST_ATTR_ACTIVE_CONNS: u16 = 7;
/// u32.
pub const IPVS_DEST_ATTR_INACT_CONNS: u16 = 8;
/// u32.
pub const IPVS_DEST_ATTR_PERSIST_CONNS: u16 = 9;
/// Nested: counters of 32 bits.
pub const IPVS_DEST_ATTR_STATS: u16 = 10;
/// u16: `AF_INET` or `AF_INET6`.
pub const IPVS_DEST_ATTR_ADDR_FAMILY: u16 = 11;
/// Nested: counters of 64 bits.
pub const IPVS_DEST_ATTR_STATS64: u16 = 12;
/// u8: `IP_VS_CONN_F_TUNNEL_TYPE_*`.
pub const IPVS_DEST_ATTR_TUN_TYPE: u16 = 13;
/// u16, big-endian.
pub const IPVS_DEST_ATTR_TUN_PORT: u16 = 14;
/// u16: `IP_VS_TUNNEL_ENCAP_FLAG_*`.
pub const IPVS_DEST_ATTR_TUN_FLAGS: u16 = 15;

/// u32: `IP_VS_STATE_*`.
pub const IPVS_DAEMON_ATTR_STATE: u16 = 1;
/// String, at most [`IP_VS_IFNAME_MAXLEN`] bytes with its NUL.
pub const IPVS_DAEMON_ATTR_MCAST_IFN: u16 = 2;
/// u32.
pub const IPVS_DAEMON_ATTR_SYNC_ID: u16 = 3;
/// u16, bytes of UDP payload.
pub const IPVS_DAEMON_ATTR_SYNC_MAXLEN: u16 = 4;
/// 4 bytes.
pub const IPVS_DAEMON_ATTR_MCAST_GROUP: u16 = 5;
/// 16 bytes.
pub const IPVS_DAEMON_ATTR_MCAST_GROUP6: u16 = 6;
/// u16, native-endian.
pub const IPVS_DAEMON_ATTR_MCAST_PORT: u16 = 7;
/// u8.
pub const IPVS_DAEMON_ATTR_MCAST_TTL: u16 = 8;

/// Connections scheduled.
pub const IPVS_STATS_ATTR_CONNS: u16 = 1;
/// Packets in.
pub const IPVS_STATS_ATTR_INPKTS: u16 = 2;
/// Packets out.
pub const IPVS_STATS_ATTR_OUTPKTS: u16 = 3;
/// Bytes in; 64 bits in both kinds of counters.
pub const IPVS_STATS_ATTR_INBYTES: u16 = 4;
/// Bytes out; 64 bits in both kinds of counters.
pub const IPVS_STATS_ATTR_OUTBYTES: u16 = 5;
/// Connections a second.
pub const IPVS_STATS_ATTR_CPS: u16 = 6;
/// Packets in a second.
pub const IPVS_STATS_ATTR_INPPS: u16 = 7;
/// Packets out a second.
pub const IPVS_STATS_ATTR_OUTPPS: u16 = 8;
/// Bytes in a second.
pub const IPVS_STATS_ATTR_INBPS: u16 = 9;
/// Bytes out a second.
pub const IPVS_STATS_ATTR_OUTBPS: u16 = 10;
/// Alignment, no content.
pub const IPVS_STATS_ATTR_PAD: u16 = 11;

/// u32: one byte each for major, minor and patch version.
pub const IPVS_INFO_ATTR_VERSION: u16 = 1;
/// u32: buckets of the connection table.
pub const IPVS_INFO_ATTR_CONN_TAB_SIZE: u16 = 2;

/// A client stays on its destination for the service's timeout.
pub const IP_VS_SVC_F_PERSISTENT: u32 = 0x0001;
/// Set by the kernel alone: the service stands in its table.
pub const IP_VS_SVC_F_HASHED: u32 = 0x0002;
/// Every UDP packet is scheduled on its own.
pub const IP_VS_SVC_F_ONEPACKET: u32 = 0x0004;
/// First flag whose meaning is the scheduler's.
pub const IP_VS_SVC_F_SCHED1: u32 = 0x0008;
/// Second flag whose meaning is the scheduler's.
pub const IP_VS_SVC_F_SCHED2: u32 = 0x0010;
/// Third flag whose meaning is the scheduler's.
pub const IP_VS_SVC_F_SCHED3: u32 = 0x0020;

/// Which bits of a destination's flags say how to forward.
pub const IP_VS_CONN_F_FWD_MASK: u32 = 0x0007;
/// Masquerading (NAT).
pub const IP_VS_CONN_F_MASQ: u32 = 0x0000;
/// This machine.
pub const IP_VS_CONN_F_LOCALNODE: u32 = 0x0001;
/// Tunnelling.
pub const IP_VS_CONN_F_TUNNEL: u32 = 0x0002;
/// Direct routing.
pub const IP_VS_CONN_F_DROUTE: u32 = 0x0003;
/// Cache bypass.
pub const IP_VS_CONN_F_BYPASS: u32 = 0x0004;

/// IP in IP.
pub const IP_VS_CONN_F_TUNNEL_TYPE_IPIP: u8 = 0;
/// Generic UDP encapsulation.
pub const IP_VS_CONN_F_TUNNEL_TYPE_GUE: u8 = 1;
/// Generic routing encapsulation.
pub const IP_VS_CONN_F_TUNNEL_TYPE_GRE: u8 = 2;

/// No checksum of the tunnel's own.
pub const IP_VS_TUNNEL_ENCAP_FLAG_NOCSUM: u16 = 0;
/// Checksum over the tunnel's payload.
pub const IP_VS_TUNNEL_ENCAP_FLAG_CSUM: u16 = 1;
/// Remote checksum offload (GUE).
pub const IP_VS_TUNNEL_ENCAP_FLAG_REMCSUM: u16 = 2;

/// The daemon sends.
pub const IP_VS_STATE_MASTER: u32 = 1;
/// The daemon receives.
pub const IP_VS_STATE_BACKUP: u32 = 2;

/// Longest name of a scheduler in bytes, its NUL included.
pub const IP_VS_SCHEDNAME_MAXLEN: usize = 16;
/// Longest name of a persistence engine in bytes, its NUL included.
pub const IP_VS_PENAME_MAXLEN: usize = 16;
/// Longest name of an interface in bytes, its NUL included.
pub const IP_VS_IFNAME_MAXLEN: usize = 16;

/// `AF_INET`, from `include/linux/socket.h`.
pub const AF_INET: u16 = 2;
/// `AF_INET6`, from `include/linux/socket.h`.
pub const AF_INET6: u16 = 10;
/// `IPPROTO_TCP`, from `include/uapi/linux/in.h`.
pub const IPPROTO_TCP: u8 = 6;
/// `IPPROTO_UDP`, from `include/uapi/linux/in.h`.
pub const IPPROTO_UDP: u8 = 17;
/// `IPPROTO_SCTP`, from `include/uapi/linux/in.h`.
pub const IPPROTO_SCTP: u8 = 132;
