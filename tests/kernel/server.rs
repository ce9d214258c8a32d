//! Servers in pods and nodes. One thread a server, all of its sockets in one poll.
//!
//! Over TCP and SCTP a server says `NAME peer=IP:PORT local=IP:PORT` at once when somebody connects and returns what it is
//! sent; over UDP it answers each datagram with that line, filled up with dots to the length of the datagram, from the
//! address that the datagram was sent to.

use std::io::{ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use nix::libc::{in_pktinfo, in6_pktinfo};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::{Ipv4PacketInfo, Ipv6RecvPacketInfo};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, SockaddrIn6, SockaddrStorage, recvmsg,
    sendmsg, setsockopt,
};
use socket2::{Domain, Protocol, Socket, Type};

use crate::ns::Netns;
use crate::runner::Proto;

/// One port that a server listens on.
#[derive(Debug, Clone, Copy)]
pub struct Listen {
    /// The protocol.
    pub proto: Proto,
    /// The address; the unspecified one listens on all of its family.
    pub addr: SocketAddr,
}

/// TCP and UDP (and SCTP, if asked for) on all addresses of both families.
pub fn everywhere(ports: &[u16], sctp: bool) -> Vec<Listen> {
    let mut all = Vec::new();
    for &port in ports {
        for ip in [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)] {
            for proto in Proto::ALL {
                if proto != Proto::Sctp || sctp {
                    all.push(Listen { proto, addr: SocketAddr::new(ip, port) });
                }
            }
        }
    }
    all
}

/// A running server; dropping it closes its sockets and connections.
pub struct Server {
    stop: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Opens the sockets in `ns` and serves them.
    pub fn start(ns: &Netns, name: &str, listen: &[Listen]) -> Result<Server> {
        let sockets = ns.enter(|| listen.iter().map(open).collect::<Result<Vec<_>>>())?;
        let (stop, stopped) = UnixStream::pair()?;
        let name = name.to_owned();
        let thread = std::thread::Builder::new()
            .name(format!("server {name}"))
            .spawn(move || serve(&name, sockets, &stopped))?;
        Ok(Server { stop, thread: Some(thread) })
    }

    /// Stops it, as dropping does.
    pub fn stop(self) {}
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.stop.write_all(b"x");
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

enum Item {
    Listener(Socket),
    Datagram(Socket, IpAddr),
    Connection(Socket, Vec<u8>),
}

impl Item {
    fn socket(&self) -> &Socket {
        match self {
            Item::Listener(s) | Item::Datagram(s, _) | Item::Connection(s, _) => s,
        }
    }
}

/// The kind of socket for a protocol.
pub fn socket(proto: Proto, to: IpAddr) -> std::io::Result<Socket> {
    let domain = if to.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
    match proto {
        Proto::Tcp => Socket::new(domain, Type::STREAM, Some(Protocol::TCP)),
        Proto::Udp => Socket::new(domain, Type::DGRAM, Some(Protocol::UDP)),
        Proto::Sctp => Socket::new(domain, Type::STREAM, Some(Protocol::from(132))),
    }
}

fn open(listen: &Listen) -> Result<Item> {
    let open = || -> Result<Item> {
        let ip = listen.addr.ip();
        let socket = socket(listen.proto, ip)?;
        if ip.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.set_nonblocking(true)?;
        if listen.proto != Proto::Udp {
            socket.set_reuse_address(true)?;
        }
        socket.bind(&listen.addr.into())?;
        if listen.proto == Proto::Udp {
            if ip.is_ipv4() {
                setsockopt(&socket, Ipv4PacketInfo, &true)?;
            } else {
                setsockopt(&socket, Ipv6RecvPacketInfo, &true)?;
            }
            return Ok(Item::Datagram(socket, ip));
        }
        socket.listen(1024)?;
        Ok(Item::Listener(socket))
    };
    open().with_context(|| format!("listening on {:?} {}", listen.proto, listen.addr))
}

fn serve(name: &str, mut items: Vec<Item>, stopped: &UnixStream) {
    let mut buffer = vec![0_u8; 70_000];
    loop {
        let ready: Vec<PollFlags> = {
            let mut fds = vec![PollFd::new(stopped.as_fd(), PollFlags::POLLIN)];
            fds.extend(items.iter().map(|item| {
                let waiting = matches!(item, Item::Connection(_, out) if !out.is_empty());
                let flags = if waiting { PollFlags::POLLIN | PollFlags::POLLOUT } else { PollFlags::POLLIN };
                PollFd::new(item.socket().as_fd(), flags)
            }));
            if poll(&mut fds, PollTimeout::NONE).is_err() {
                continue;
            }
            fds.iter().map(|fd| fd.revents().unwrap_or(PollFlags::empty())).collect()
        };
        if ready.first().is_some_and(|r| !r.is_empty()) {
            return;
        }
        let mut fresh = Vec::new();
        let mut flags = ready.into_iter().skip(1);
        items.retain_mut(|item| {
            if flags.next().is_none_or(|r| r.is_empty()) {
                return true;
            }
            match item {
                Item::Listener(socket) => {
                    while let Ok((connection, _)) = socket.accept() {
                        if let Some(connection) = greet(name, connection) {
                            fresh.push(connection);
                        }
                    }
                    true
                }
                Item::Datagram(socket, ip) => {
                    while answer(name, socket, *ip, &mut buffer).is_some() {}
                    true
                }
                Item::Connection(socket, out) => echo(socket, out, &mut buffer),
            }
        });
        items.append(&mut fresh);
    }
}

fn greet(name: &str, socket: Socket) -> Option<Item> {
    socket.set_nonblocking(true).ok()?;
    let peer = socket.peer_addr().ok()?.as_socket()?;
    let local = socket.local_addr().ok()?.as_socket()?;
    let line = format!("{name} peer={peer} local={local}\n");
    (&socket).write_all(line.as_bytes()).ok()?;
    Some(Item::Connection(socket, Vec::new()))
}

/// Returns whether the connection goes on.
fn echo(socket: &Socket, out: &mut Vec<u8>, buffer: &mut [u8]) -> bool {
    loop {
        while !out.is_empty() {
            match (&mut &*socket).write(out) {
                Ok(n) => drop(out.drain(..n)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return true,
                Err(_) => return false,
            }
        }
        match (&mut &*socket).read(buffer) {
            Ok(0) => return false,
            Ok(n) => out.extend_from_slice(buffer.get(..n).unwrap_or_default()),
            Err(e) if e.kind() == ErrorKind::WouldBlock => return true,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(_) => return false,
        }
    }
}

fn answer(name: &str, socket: &Socket, bound: IpAddr, buffer: &mut [u8]) -> Option<()> {
    let fd = socket.as_raw_fd();
    let mut space = nix::cmsg_space!(in_pktinfo, in6_pktinfo);
    let (size, peer, v4, v6) = {
        let mut io = [IoSliceMut::new(buffer)];
        let message =
            recvmsg::<SockaddrStorage>(fd, &mut io, Some(&mut space), MsgFlags::MSG_DONTWAIT).ok()?;
        let (mut v4, mut v6) = (None, None);
        for control in message.cmsgs().ok()? {
            match control {
                ControlMessageOwned::Ipv4PacketInfo(info) => v4 = Some(info),
                ControlMessageOwned::Ipv6PacketInfo(info) => v6 = Some(info),
                _ => {}
            }
        }
        (message.bytes, message.address?, v4, v6)
    };
    let port = socket.local_addr().ok()?.as_socket()?.port();
    let local = match (v4, v6) {
        (Some(info), _) => IpAddr::V4(Ipv4Addr::from(u32::from_be(info.ipi_addr.s_addr))),
        (_, Some(info)) => IpAddr::V6(Ipv6Addr::from(info.ipi6_addr.s6_addr)),
        _ => bound,
    };
    let peer: SocketAddr = if let Some(a) = peer.as_sockaddr_in() {
        SocketAddr::from((a.ip(), a.port()))
    } else {
        let a = peer.as_sockaddr_in6()?;
        SocketAddr::from((a.ip(), a.port()))
    };
    let mut line = format!("{name} peer={peer} local={}\n", SocketAddr::new(local, port)).into_bytes();
    line.resize(line.len().max(size), b'.');
    let io = [IoSlice::new(&line)];
    let flags = MsgFlags::MSG_DONTWAIT;
    match (peer, v4, v6) {
        (SocketAddr::V4(to), Some(mut info), _) => {
            info.ipi_ifindex = 0;
            info.ipi_spec_dst = info.ipi_addr;
            let control = [ControlMessage::Ipv4PacketInfo(&info)];
            let _ = sendmsg(fd, &io, &control, flags, Some(&SockaddrIn::from(to)));
        }
        (SocketAddr::V6(to), _, Some(mut info)) => {
            if !to.ip().is_unicast_link_local() {
                info.ipi6_ifindex = 0;
            }
            let control = [ControlMessage::Ipv6PacketInfo(&info)];
            let _ = sendmsg(fd, &io, &control, flags, Some(&SockaddrIn6::from(to)));
        }
        _ => {}
    }
    Some(())
}
