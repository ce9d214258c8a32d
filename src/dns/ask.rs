//! Asks a DNS server as a client does, for `explain`.

use std::{
    io,
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    time::Duration,
};

use hickory_proto::{
    op::{Edns, Message, Query, ResponseCode},
    rr::{Name, RData, RecordType},
};

/// For one try; there are two.
const PATIENCE: Duration = Duration::from_millis(700);

/// The addresses that a server answers for a name; by TCP where they don't fit into a datagram.
///
/// # Errors
/// A text for people.
pub fn addresses(server: SocketAddr, name: &str, kind: RecordType) -> Result<Vec<IpAddr>, String> {
    let answer = answer(server, name, kind)?;
    Ok(answer.answers.iter().filter_map(|record| record.data.ip_addr()).collect())
}

/// The addresses of a name, or with SRV the places of a port, each `host:port`; and whether there are more than fit into an answer.
///
/// # Errors
/// A text for people.
pub fn texts(server: SocketAddr, name: &str, kind: RecordType) -> Result<(Vec<String>, bool), String> {
    let answer = answer(server, name, kind)?;
    let found = answer.answers.iter().filter_map(|record| match &record.data {
        RData::SRV(srv) => Some(format!("{}:{}", srv.target.to_ascii().trim_end_matches('.'), srv.port)),
        data => data.ip_addr().map(|ip| ip.to_string()),
    });
    Ok((found.collect(), answer.metadata.truncation))
}

fn answer(server: SocketAddr, name: &str, kind: RecordType) -> Result<Message, String> {
    let name = Name::from_ascii(name).map_err(|e| e.to_string())?;
    let mut request = Message::query();
    request.metadata.recursion_desired = true;
    request.add_query(Query::query(name, kind));
    let mut edns = Edns::new();
    edns.set_max_payload(super::message::LARGEST_UDP);
    request.set_edns(edns);
    let bytes = request.to_vec().map_err(|e| e.to_string())?;
    let mut answer = udp(server, &bytes, request.metadata.id)?;
    if answer.metadata.truncation {
        answer = tcp(server, &bytes).map_err(|e| format!("no answer by TCP: {e}"))?;
    }
    match answer.metadata.response_code {
        ResponseCode::NoError => Ok(answer),
        code => Err(format!("{code}")),
    }
}

fn udp(server: SocketAddr, bytes: &[u8], id: u16) -> Result<Message, String> {
    let any: SocketAddr = if server.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0; 16], 0).into() };
    let ask = || -> io::Result<Message> {
        let socket = UdpSocket::bind(any)?;
        socket.connect(server)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.send(bytes)?;
        let mut buffer = [0; 4096];
        let n = socket.recv(&mut buffer)?;
        let answer = Message::from_vec(&buffer[..n]).map_err(io::Error::other)?;
        if answer.metadata.id == id { Ok(answer) } else { Err(io::ErrorKind::InvalidData.into()) }
    };
    ask().or_else(|_| ask()).map_err(|e| match e.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => "no answer; does the agent run?".to_owned(),
        _ => format!("no answer: {e}"),
    })
}

fn tcp(server: SocketAddr, bytes: &[u8]) -> io::Result<Message> {
    let mut stream = TcpStream::connect_timeout(&server, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let length = u16::try_from(bytes.len()).map_err(io::Error::other)?;
    stream.write_all(&length.to_be_bytes())?;
    stream.write_all(bytes)?;
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut answer)?;
    Message::from_vec(&answer).map_err(io::Error::other)
}
