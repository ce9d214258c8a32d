//! The client: blocking, batched, typed errors.

mod batch;
mod frame;
mod link;
mod request;
#[cfg(test)]
mod tests;

use std::fmt;
use std::time::Duration;

use netlink_packet_core::DecodeError;

use self::link::{KernelSocket, Link};
use crate::command::{Command, Object, check_service, service};
use crate::destination::Destination;
use crate::error::Error;
use crate::service::{Service, ServiceId};
use crate::settings::{Daemon, Info, Timeouts};
use crate::wire::{IpvsAttribute, IpvsCommand, IpvsMessage};

/// Most commands in one datagram.
const MAX_BATCH: usize = 128;
/// Room that an answer takes in the receive buffer, in bytes as the kernel counts them: a small packet counts
/// for 768 on x86-64, one with words for no more than 1,280.
const ANSWER_COST: usize = 2048;
/// How often a dump is tried whose table changes underneath, or part of which is lost.
const MAX_DUMPS: usize = 5;

/// How a [`Client`] is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Longest wait for one datagram of an answer; at most a day. 5 s by default.
    pub timeout: Duration,
    /// Receive buffer in bytes, before the kernel doubles it. 1 MiB by default. A smaller one makes for smaller
    /// batches, so that their answers always fit.
    pub receive_buffer: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { timeout: Duration::from_secs(5), receive_buffer: 1 << 20 }
    }
}

/// A blocking client of IPVS.
///
/// IPVS has one table in each network namespace. A client belongs for its whole life to the namespace that the
/// thread which opened it was in at that moment.
///
/// The kernel runs a command while it is being sent, so the only thing that takes time is the work itself.
/// Reading needs `CAP_NET_ADMIN` too.
pub struct Client {
    link: Link,
    family: u16,
    batch_size: usize,
    writes: u64,
}

impl Client {
    /// Opens a socket and looks up the family. The kernel loads the module `ip_vs` for that if it is not
    /// loaded and can be; else this is [`Error::NoIpvs`].
    pub fn open() -> Result<Self, Error> {
        Self::open_with(Options::default())
    }

    /// [`open`](Client::open) with other than the usual timeout or buffer.
    pub fn open_with(options: Options) -> Result<Self, Error> {
        let io = |source| Error::Io { object: Object::Socket, source };
        let socket = KernelSocket::open(options.receive_buffer).map_err(io)?;
        let batch_size = (socket.receive_buffer().map_err(io)? / ANSWER_COST).clamp(1, MAX_BATCH);
        let link = Link::new(Box::new(socket), options.timeout).map_err(io)?;
        Self::on(link, batch_size)
    }

    fn on(link: Link, batch_size: usize) -> Result<Self, Error> {
        let mut client = Self { link, family: 0, batch_size, writes: 0 };
        client.refresh_family()?;
        Ok(client)
    }

    /// Sets the longest wait for one datagram of an answer.
    pub fn set_timeout(&mut self, timeout: Duration) -> Result<(), Error> {
        self.link.set_timeout(timeout).map_err(|source| Error::Io { object: Object::Socket, source })
    }

    /// How many commands that change something were ever sent, refused ones and repetitions included.
    pub fn writes(&self) -> u64 {
        self.writes
    }

    /// The number of the family at present. It changes when the module is loaded anew.
    pub fn family_id(&self) -> u16 {
        self.family
    }

    /// Runs one command.
    pub fn execute(&mut self, command: &Command) -> Result<(), Error> {
        // One command gives one result.
        self.batch(std::slice::from_ref(command)).pop().unwrap_or(Ok(()))
    }

    /// Runs commands in their order and gives the result of each at its place.
    ///
    /// A refused command does not stop those after it. If the socket itself fails, the rest is
    /// [`Error::NotSent`]. Up to 128 commands go in one datagram, no more than have room for their answers.
    pub fn batch(&mut self, commands: &[Command]) -> Vec<Result<(), Error>> {
        let mut results = Vec::with_capacity(commands.len());
        let mut alive = true;
        for chunk in commands.chunks(self.batch_size.max(1)) {
            if alive {
                alive = self.run_chunk(chunk, &mut results);
            } else {
                results.extend(chunk.iter().map(|command| Err(Error::NotSent { object: command.object() })));
            }
        }
        results
    }

    /// All services of the network namespace.
    ///
    /// A dump is put together piece by piece, and IPVS of Linux 6.1 does not tell when the table changed in
    /// between: with another writer about, services that were there all the time may be missing or come twice.
    /// Before acting on a missing one, ask for it by [`service`](Client::service). Where a kernel does tell
    /// (`NLM_F_DUMP_INTR`), the dump is taken again, five times at most.
    pub fn services(&mut self) -> Result<Vec<Service>, Error> {
        self.whole_dump(|client, all| client.for_each_service(|service| all.push(service)))
    }

    /// Calls `visit` with each service, holding one at a time in memory.
    ///
    /// Nothing is taken again here, as `visit` has seen the first part already: see
    /// [`Error::DumpInterrupted`] and [`Error::AnswerLost`].
    pub fn for_each_service(&mut self, mut visit: impl FnMut(Service)) -> Result<(), Error> {
        let message = IpvsMessage { command: IpvsCommand::GetService, attributes: Vec::new() };
        self.dump(Object::Services, &message, |message| {
            visit(parse_service(&message)?);
            Ok(())
        })
    }

    /// One service, or nothing if it is not there.
    pub fn service(&mut self, id: &ServiceId) -> Result<Option<Service>, Error> {
        let object = Object::Service(*id);
        check_service(id).map_err(|reason| Error::Invalid { object, reason })?;
        let message = IpvsMessage { command: IpvsCommand::GetService, attributes: vec![service(id)] };
        match self.get(object, &message, parse_service) {
            Ok(service) => Ok(Some(service)),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The destinations of a service. The kernel gives none for a service that is not there, without an error.
    ///
    /// What is said of dumps at [`services`](Client::services) holds here too.
    pub fn destinations(&mut self, id: &ServiceId) -> Result<Vec<Destination>, Error> {
        self.whole_dump(|client, all| client.for_each_destination(id, |destination| all.push(destination)))
    }

    /// Calls `visit` with each destination of a service; compare [`for_each_service`](Client::for_each_service).
    pub fn for_each_destination(
        &mut self,
        id: &ServiceId,
        mut visit: impl FnMut(Destination),
    ) -> Result<(), Error> {
        let object = Object::Destinations(*id);
        check_service(id).map_err(|reason| Error::Invalid { object, reason })?;
        let message = IpvsMessage { command: IpvsCommand::GetDestination, attributes: vec![service(id)] };
        self.dump(object, &message, |message| {
            let attributes = message.attributes.iter().find_map(|attribute| match attribute {
                IpvsAttribute::Destination(attributes) => Some(attributes),
                _ => None,
            });
            let attributes = attributes.ok_or("a message without IPVS_CMD_ATTR_DEST")?;
            visit(Destination::from_attributes(attributes, id.family())?);
            Ok(())
        })
    }

    /// Version and size of the connection table.
    pub fn info(&mut self) -> Result<Info, Error> {
        let message = IpvsMessage { command: IpvsCommand::GetInfo, attributes: Vec::new() };
        self.get(Object::Info, &message, |message| Info::from_attributes(&message.attributes))
    }

    /// The timeouts of the network namespace.
    pub fn timeouts(&mut self) -> Result<Timeouts, Error> {
        let message = IpvsMessage { command: IpvsCommand::GetConfig, attributes: Vec::new() };
        self.get(Object::Timeouts, &message, |message| Ok(Timeouts::from_attributes(&message.attributes)))
    }

    /// The synchronisation daemons that run in the network namespace: none, one, or one of each kind.
    pub fn daemons(&mut self) -> Result<Vec<Daemon>, Error> {
        let message = IpvsMessage { command: IpvsCommand::GetDaemon, attributes: Vec::new() };
        self.whole_dump(|client, all| {
            client.dump(Object::Daemons, &message, |message| {
                let attributes = message.attributes.iter().find_map(|attribute| match attribute {
                    IpvsAttribute::Daemon(attributes) => Some(attributes),
                    _ => None,
                });
                all.push(Daemon::from_attributes(
                    attributes.ok_or("a message without IPVS_CMD_ATTR_DAEMON")?,
                )?);
                Ok(())
            })
        })
    }

    /// Takes a dump until one is whole.
    fn whole_dump<T>(
        &mut self,
        mut dump: impl FnMut(&mut Self, &mut Vec<T>) -> Result<(), Error>,
    ) -> Result<Vec<T>, Error> {
        let mut attempt = 1;
        loop {
            let mut all = Vec::new();
            match dump(self, &mut all) {
                Ok(()) => return Ok(all),
                Err(Error::DumpInterrupted { .. } | Error::AnswerLost { .. }) if attempt < MAX_DUMPS => {
                    attempt += 1;
                }
                Err(error) => return Err(error),
            }
        }
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("family", &self.family)
            .field("writes", &self.writes)
            .finish_non_exhaustive()
    }
}

fn parse_service(message: &IpvsMessage) -> Result<Service, DecodeError> {
    let attributes = message.attributes.iter().find_map(|attribute| match attribute {
        IpvsAttribute::Service(attributes) => Some(attributes),
        _ => None,
    });
    Service::from_attributes(attributes.ok_or("a message without IPVS_CMD_ATTR_SERVICE")?)
}
