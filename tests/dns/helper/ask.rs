//! Questions and answers.

use std::{
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    str::FromStr as _,
};

use anyhow::{Context as _, Result, bail};
use hickory_proto::{
    op::{Message, MessageType, OpCode, Query, ResponseCode},
    rr::{Name, RData, RecordType},
};
use nix::sys::socket::{setsockopt, sockopt};

/// Asked of the kernel, which gives twice that, or less.
const BUFFER: usize = 1 << 20;

/// A socket to ask a server on loopback.
pub fn open(at: SocketAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind((if at.is_ipv4() { "127.0.0.1" } else { "::1" }, 0))?;
    socket.connect(at)?;
    // Hundreds of answers at once must not be lost here: the default holds fewer than that.
    if setsockopt(&socket, sockopt::RcvBufForce, &BUFFER).is_err() {
        setsockopt(&socket, sockopt::RcvBuf, &BUFFER)?;
    }
    Ok(socket)
}

/// A question for IPv4 addresses.
pub fn question(id: u16, name: &str) -> Result<Vec<u8>> {
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_str(&format!("{name}."))?, RecordType::A));
    Ok(message.to_vec()?)
}

/// The number of the question, and the addresses of the answer to it.
pub fn answer(bytes: &[u8]) -> Result<(u16, Vec<Ipv4Addr>)> {
    let message = Message::from_vec(bytes).context("no DNS message")?;
    if message.metadata.response_code != ResponseCode::NoError {
        bail!("{}", message.metadata.response_code);
    }
    let addresses = message.answers.iter().filter_map(|r| match &r.data {
        RData::A(a) => Some(a.0),
        _ => None,
    });
    Ok((message.metadata.id, addresses.collect()))
}
