//! What is done with a packet: the manners of the protocol. No input makes it panic.

use std::{
    collections::{BTreeSet, HashSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Instant,
};

use arc_swap::{ArcSwap, ArcSwapOption};
use hickory_proto::{
    op::{Message, OpCode, Query, ResponseCode},
    rr::{DNSClass, Name, RecordType},
};

use super::{
    answer::{Answer, is_short, main_addresses},
    limit::{Allowed, Rate},
    message::{self, LARGEST_UDP, PLAIN_UDP, Packet, Shape},
    quick,
    table::Table,
    zone::{is_localhost, is_loopback, is_of_top_level},
};
use crate::metrics::DnsMetrics;

/// How a packet came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transport {
    /// One datagram; its sender may be forged.
    Udp,
    /// A connection.
    Tcp,
}

impl Transport {
    fn label(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::Tcp => "tcp",
        }
    }

    /// The longest answer to a client that takes datagrams of so many bytes.
    fn longest(self, payload: u16) -> u16 {
        match self {
            Self::Udp => payload.clamp(PLAIN_UDP, LARGEST_UDP),
            Self::Tcp => u16::MAX,
        }
    }
}

/// What answers are made from; shared with who changes it.
#[derive(Debug)]
pub struct Shared {
    /// All names.
    pub table: ArcSwap<Table>,
    /// The node's own addresses, which may ask whatever they are.
    pub node: ArcSwap<BTreeSet<IpAddr>>,
    /// Ranges that its pods have their addresses from, where they may ask for that; nothing as long as the source may yet say them.
    pub pods: ArcSwapOption<Allowed>,
}

/// Whether a client gets answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum May {
    /// It does.
    Ask,
    /// It does not.
    Not,
    /// It does where it is one of this node's pods, whose ranges are not known yet: a refusal it would take as final.
    NotKnown,
}

/// Names that are looked up elsewhere.
pub trait Elsewhere: Send + Sync {
    /// Whether there is someone to ask for a name.
    fn covers(&self, name: &Name) -> bool;
    /// Whether the question is our own, come back to us, or its sender forwards to us what we forward to it.
    fn is_loop(&self, name: &Name, client: IpAddr) -> bool;
}

/// What is done with a packet.
#[derive(Debug)]
pub enum Action {
    /// Nothing.
    Ignore,
    /// Nothing yet: the source has not told everything.
    Later(Box<Asked>),
    /// This is sent back.
    Reply(Vec<u8>),
    /// Someone else has to be asked.
    Forward(Box<Asked>),
}

/// A question that is not answered at once.
#[derive(Debug)]
pub struct Asked {
    /// The request.
    pub request: Message,
    /// Its question.
    pub query: Query,
    client: IpAddr,
    transport: Transport,
    limit: u16,
    /// Bytes of the request.
    length: usize,
    began: Instant,
}

/// Answers packets.
pub struct Handler<E> {
    /// What answers are made from.
    pub shared: Arc<Shared>,
    /// Who else is asked.
    pub elsewhere: Option<Arc<E>>,
    /// Who may ask.
    pub allowed: Allowed,
    /// How fast.
    pub rate: Rate,
    /// What is counted.
    pub metrics: DnsMetrics,
    /// Until when questions about our names wait for the source to be read, and for the kernel to serve what it says: they get no
    /// answer, since a client asks again after silence (resolv.conf(5): after 5 s) and takes a SERVFAIL as final.
    pub patient_until: Instant,
    /// Services and aliases of earlier runs, in lower case, by which names of endpoints are told from the world's until then.
    pub remembered: HashSet<Vec<u8>>,
}

impl<E> Handler<E> {
    /// Whether a client gets answers.
    pub fn may(&self, client: IpAddr) -> May {
        let client = client.to_canonical();
        if self.allowed.contains(client) || self.shared.node.load().contains(&client) {
            return May::Ask;
        }
        match &*self.shared.pods.load() {
            Some(pods) if pods.contains(client) => May::Ask,
            None if Instant::now() < self.patient_until => May::NotKnown,
            _ => May::Not,
        }
    }
}

impl<E: Elsewhere> Handler<E> {
    /// What is done with a packet from there.
    pub fn handle(&self, bytes: &[u8], from: SocketAddr, transport: Transport) -> Action {
        self.take(bytes, from, transport, quick::Question::read(bytes))
    }

    /// The same of a packet that may be the commonest question.
    pub(super) fn take(
        &self,
        bytes: &[u8],
        from: SocketAddr,
        transport: Transport,
        question: Option<quick::Question<'_>>,
    ) -> Action {
        let began = Instant::now();
        let client = from.ip().to_canonical();
        let read = || message::read(bytes);
        let packet = if question.is_some() { None } else { Some(read()) };
        if matches!(packet, Some(Packet::Noise)) || from.port() == 0 {
            self.metrics.limited("noise");
            return Action::Ignore;
        }
        let may = self.may(client);
        if may == May::NotKnown {
            self.metrics.limited("early");
            return Action::Ignore;
        }
        let allowed = may == May::Ask;
        let within = transport == Transport::Tcp || self.rate.take(client, allowed, began);
        if let Some(question) = question.filter(|_| allowed && within)
            && let Some(reply) = self.quick(&question, client, transport, began)
        {
            return Action::Reply(reply);
        }
        let (request, query) = match packet.unwrap_or_else(read) {
            Packet::Question(request, query) if allowed || within => (*request, query),
            Packet::Malformed(metadata) if allowed && within => {
                // What another operation has in the place of a question is not known here.
                let code = match metadata.op_code {
                    OpCode::Query => ResponseCode::FormErr,
                    _ => ResponseCode::NotImp,
                };
                let took = began.elapsed();
                self.metrics.answered("none", code_label(code), transport.label(), "refused", took);
                return Action::Reply(message::bare(&metadata, code));
            }
            _ => {
                self.metrics.limited(if allowed { "rate" } else { "client" });
                return Action::Ignore;
            }
        };
        let payload = request.edns.as_ref().map_or(PLAIN_UDP, |e| e.max_payload());
        let limit = transport.longest(payload);
        let length = bytes.len();
        let asked = Box::new(Asked { request, query, client, transport, limit, length, began });
        if !allowed {
            self.metrics.limited("client");
            return self.reply(&asked, &Answer::code(ResponseCode::Refused), "refused", false);
        }
        if !within {
            self.metrics.limited("rate");
            return self.reply(&asked, &Answer::default(), "refused", true);
        }
        self.look(asked)
    }

    /// The answer to the commonest question where it is about a service that has such addresses.
    fn quick(
        &self,
        question: &quick::Question<'_>,
        client: IpAddr,
        transport: Transport,
        began: Instant,
    ) -> Option<Vec<u8>> {
        let table = self.shared.table.load();
        let service = question.service(&table)?;
        let family = question.family();
        let addresses = main_addresses(service, family);
        if addresses.is_empty() {
            return None;
        }
        let (udp, recursive) = (transport == Transport::Udp, self.elsewhere.is_some());
        let limit = transport.longest(question.payload());
        let times = question.times(addresses.len(), limit);
        let reply = if udp && !self.rate.take_amplified(client, times, began) {
            self.metrics.limited("rate");
            question.truncated(recursive)
        } else {
            question.answer(&addresses, service.ttl, limit, recursive)
        };
        self.metrics.answered_address(family, transport.label(), began.elapsed());
        Some(reply)
    }

    /// What is done with a question by now.
    pub fn look(&self, asked: Box<Asked>) -> Action {
        match self.decide(&asked) {
            Decision::Answer(answer, from) => self.reply(&asked, &answer, from, false),
            Decision::Elsewhere => Action::Forward(asked),
            Decision::TooEarly => Action::Later(asked),
        }
    }

    fn decide(&self, asked: &Asked) -> Decision {
        let client = asked.client;
        let code = |code| Decision::Answer(Answer::code(code), "refused");
        if asked.request.metadata.op_code != OpCode::Query {
            return code(ResponseCode::NotImp);
        }
        if asked.request.version() > 0 {
            return code(ResponseCode::BADVERS);
        }
        let (name, kind) = (asked.query.name(), asked.query.query_type());
        if asked.query.query_class() != DNSClass::IN
            || matches!(kind, RecordType::AXFR | RecordType::IXFR | RecordType::OPT | RecordType::TSIG)
        {
            return code(ResponseCode::Refused);
        }
        let table = self.shared.table.load();
        // An address of the node is many clients': none of them a pod whose namespace is known.
        let pod = (!self.shared.node.load().contains(&client)).then_some(client);
        if let Some(answer) = table.answer(name, kind, pod) {
            let early = self.is_early(&table, &answer);
            return if early { Decision::TooEarly } else { Decision::Answer(answer, "mesh") };
        }
        if !table.is_synced() && self.may_be_ours(name, kind, pod.is_some()) {
            // What others say of it would be taken for the truth, too.
            let failed = Answer::code(ResponseCode::ServFail);
            let early = self.is_early(&table, &failed);
            return if early { Decision::TooEarly } else { Decision::Answer(failed, "mesh") };
        }
        match &self.elsewhere {
            // Who asks us without wanting a lookup elsewhere wants what is ours.
            Some(elsewhere) if asked.request.metadata.recursion_desired => {
                if elsewhere.is_loop(name, client) || !elsewhere.covers(name) {
                    code(ResponseCode::Refused)
                } else if kind == RecordType::ANY {
                    Decision::Answer(Answer::any(name), "forward")
                } else {
                    Decision::Elsewhere
                }
            }
            _ => code(ResponseCode::Refused),
        }
    }

    /// The answer to a question that was asked elsewhere. What aliases of others lead to in our zone we answer ourselves.
    pub fn forwarded(&self, asked: Box<Asked>, answer: &Answer) -> Action {
        let table = self.shared.table.load();
        let Some(ours) = table.complete(&asked.query, answer) else {
            let as_asked = answer.as_asked(asked.query.name());
            return self.reply(&asked, as_asked.as_ref().unwrap_or(answer), "forward", false);
        };
        if self.is_early(&table, &ours) {
            return Action::Later(asked);
        }
        let as_asked = ours.as_asked(asked.query.name());
        self.reply(&asked, as_asked.as_ref().unwrap_or(&ours), "forward", false)
    }

    /// Whether a name outside our zones may be one that we have an answer to when we know everything: a short name that `a_pod`
    /// may have asked for, as far as it can't be one of the world's, or the name of a pod's address. Of two labels, as those of
    /// endpoints (`db-0.db`), most are the world's.
    fn may_be_ours(&self, name: &Name, kind: RecordType, a_pod: bool) -> bool {
        if is_localhost(name) || is_loopback(name) || is_of_top_level(name, kind) {
            return false;
        }
        let labels: Vec<&[u8]> = name.iter().take(4).collect();
        let below_one =
            || matches!(labels[..], [_, of] if self.remembered.contains(&of.to_ascii_lowercase()));
        a_pod && (is_short(&labels) || below_one())
            || kind == RecordType::PTR && name.parse_arpa_name().is_ok()
    }

    /// Whether there may still be a better answer in time.
    fn is_early(&self, table: &Table, answer: &Answer) -> bool {
        (!table.is_synced() || answer.soon) && Instant::now() < self.patient_until
    }

    fn reply(&self, asked: &Asked, answer: &Answer, from: &'static str, empty: bool) -> Action {
        let mut shape = Shape {
            limit: asked.limit,
            authoritative: from == "mesh" && answer.code != ResponseCode::ServFail,
            recursive: self.elsewhere.is_some(),
            empty,
        };
        let write = |shape| message::write(&asked.request, &asked.query, answer, shape);
        let mut reply = write(shape);
        let times = reply.as_ref().map_or(0, |reply| reply.len() / asked.length.max(1));
        if asked.transport == Transport::Udp && !self.rate.take_amplified(asked.client, times, asked.began) {
            self.metrics.limited("rate");
            shape.empty = true;
            reply = write(shape);
        }
        let (reply, code) = match reply {
            Ok(reply) => (reply, answer.code),
            Err(e) => {
                tracing::debug!("the answer to {} can't be written: {e}", asked.query);
                let code = ResponseCode::ServFail;
                (message::bare(&asked.request.metadata, code), code)
            }
        };
        let kind = kind_label(asked.query.query_type());
        let took = asked.began.elapsed();
        self.metrics.answered(kind, code_label(code), asked.transport.label(), from, took);
        Action::Reply(reply)
    }
}

enum Decision {
    Answer(Answer, &'static str),
    Elsewhere,
    TooEarly,
}

/// The types that are counted by name: what anyone can send must not make a series each.
fn kind_label(kind: RecordType) -> &'static str {
    match kind {
        RecordType::A => "A",
        RecordType::AAAA => "AAAA",
        RecordType::SRV => "SRV",
        RecordType::PTR => "PTR",
        RecordType::SOA => "SOA",
        RecordType::NS => "NS",
        RecordType::TXT => "TXT",
        RecordType::MX => "MX",
        RecordType::CNAME => "CNAME",
        RecordType::HTTPS => "HTTPS",
        RecordType::ANY => "ANY",
        _ => "other",
    }
}

fn code_label(code: ResponseCode) -> &'static str {
    match code {
        ResponseCode::NoError => "NOERROR",
        ResponseCode::FormErr => "FORMERR",
        ResponseCode::ServFail => "SERVFAIL",
        ResponseCode::NXDomain => "NXDOMAIN",
        ResponseCode::NotImp => "NOTIMP",
        ResponseCode::Refused => "REFUSED",
        ResponseCode::BADVERS => "BADVERS",
        _ => "other",
    }
}
