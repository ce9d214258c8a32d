//! ipset over netlink: a small codec and a blocking client.
//!
//! It is ours because one change of an endpoint must not cost a process, and because the `ipset`
//! program reads /etc/protocols once per line. Operators still use that program to look.

mod message;

use std::fmt;

use nix::errno::Errno;

pub use message::{Entry, Header, Key, MAX_ELEMENTS, SetSpec, SetType, SkbMark, Verb};

use super::{
    Error,
    nfnl::{Nfnl, NlError, Reply, Request},
};

/// An entry takes up to 100 bytes; attributes end at 64 KiB.
const ENTRIES_PER_MESSAGE: usize = 400;

const IPSET_ERR_FIND_TYPE: i32 = 4098;
const IPSET_ERR_MAX_SETS: i32 = 4099;
const IPSET_ERR_BUSY: i32 = 4100;
const IPSET_ERR_EXIST_SETNAME2: i32 = 4101;
const IPSET_ERR_TYPE_MISMATCH: i32 = 4102;
const IPSET_ERR_EXIST: i32 = 4103;
const IPSET_ERR_REFERENCED: i32 = 4108;
const IPSET_ERR_SKBINFO: i32 = 4114;
const IPSET_ERR_HASH_FULL: i32 = 4352;

/// A set and what it holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Listing {
    /// Its header.
    pub header: Header,
    /// Its entries.
    pub entries: Vec<Entry>,
    /// Entries of a shape that we never write.
    pub strange: usize,
}

/// One change of an entry.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Change {
    /// Name of the set.
    pub set: String,
    /// Adding or deleting.
    pub verb: Verb,
    /// The entry.
    pub entry: Entry,
}

/// The ipsets of this network namespace.
pub struct Ipset {
    socket: Option<Nfnl>,
    writes: u64,
}

impl fmt::Debug for Ipset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ipset").field("writes", &self.writes).finish_non_exhaustive()
    }
}

impl Default for Ipset {
    fn default() -> Self {
        Self::new()
    }
}

impl Ipset {
    /// A client; it opens its socket when first used, in the network namespace of that thread.
    pub fn new() -> Self {
        Self { socket: None, writes: 0 }
    }

    /// Writing commands sent since the start.
    pub fn writes(&self) -> u64 {
        self.writes
    }

    /// Creates a set. The same set already there is no error, another of that name is.
    pub fn create(&mut self, spec: &SetSpec) -> Result<(), Error> {
        self.write(&spec.name, &message::create(spec))
    }

    /// Destroys a set; a missing one is no error.
    pub fn destroy(&mut self, name: &str) -> Result<(), Error> {
        match self.write_raw(&message::destroy(name)) {
            Err(NlError::Kernel(e)) if e == Errno::ENOENT as i32 => Ok(()),
            other => other.map_err(|e| error(name, e)),
        }
    }

    /// Exchanges the contents of two sets of one type, in one step.
    pub fn swap(&mut self, one: &str, other: &str) -> Result<(), Error> {
        self.write(one, &message::swap(one, other))
    }

    /// Whether the kernel has a set type.
    pub fn has_type(&mut self, kind: SetType) -> bool {
        let family = crate::model::ids::Family::V4;
        self.connect().is_ok_and(|socket| socket.get(&message::has_type(kind, family)).is_ok())
    }

    /// The headers of all sets; empty where the kernel has no ipset.
    pub fn headers(&mut self) -> Result<Vec<Header>, Error> {
        match self.dump(&message::list_headers()) {
            Ok(messages) => Ok(messages.iter().filter_map(|m| message::parse_header(m)).collect()),
            // nfnetlink doesn't know the subsystem: the module isn't there, so there are no sets.
            Err(NlError::Kernel(e)) if e == Errno::EINVAL as i32 => Ok(Vec::new()),
            Err(e) => Err(error("ipset", e)),
        }
    }

    /// A set with its entries; `None` where there is none of that name.
    pub fn list(&mut self, name: &str) -> Result<Option<Listing>, Error> {
        let messages = match self.dump(&message::list(name)) {
            Ok(messages) => messages,
            Err(NlError::Kernel(e)) if e == Errno::ENOENT as i32 || e == Errno::EINVAL as i32 => {
                return Ok(None);
            }
            Err(e) => return Err(error(name, e)),
        };
        let Some(header) = messages.iter().find_map(|m| message::parse_header(m)) else { return Ok(None) };
        let mut listing = Listing { header, entries: Vec::new(), strange: 0 };
        for entry in messages.iter().flat_map(|m| message::parse_entries(m)) {
            match entry {
                Some(entry) => listing.entries.push(entry),
                None => listing.strange += 1,
            }
        }
        Ok(Some(listing))
    }

    /// Changes entries, in order; the results line up. Adding replaces, deleting what is gone is a success.
    pub fn change(&mut self, changes: &[Change]) -> Vec<Result<(), Error>> {
        let mut results: Vec<Option<Result<(), Error>>> = vec![None; changes.len()];
        // Runs of one set and verb become one message; after an error the rest of its run is sent again.
        let mut runs: Vec<(usize, usize)> = Vec::new();
        for (at, change) in changes.iter().enumerate() {
            match runs.last_mut() {
                Some((start, end))
                    if changes[*start].set == change.set
                        && changes[*start].verb == change.verb
                        && *end - *start < ENTRIES_PER_MESSAGE =>
                {
                    *end = at + 1;
                }
                _ => runs.push((at, at + 1)),
            }
        }
        while !runs.is_empty() {
            let requests: Vec<_> =
                runs.iter().map(|(start, end)| change_request(&changes[*start..*end])).collect();
            let replies = match self.transact(&requests) {
                Ok(replies) => replies,
                Err(e) => {
                    for (start, end) in runs {
                        results[start..end].fill(Some(Err(error(&changes[start].set, e))));
                    }
                    break;
                }
            };
            runs = runs
                .into_iter()
                .zip(replies)
                .filter_map(|((start, end), reply)| settle(changes, &mut results, start, end, &reply))
                .collect();
        }
        results.into_iter().map(|r| r.unwrap_or(Ok(()))).collect()
    }

    fn connect(&mut self) -> Result<&mut Nfnl, NlError> {
        if self.socket.is_none() {
            let socket =
                Nfnl::open().map_err(|e| e.raw_os_error().map_or(NlError::Malformed, NlError::Kernel))?;
            self.socket = Some(socket);
        }
        self.socket.as_mut().ok_or(NlError::Malformed)
    }

    fn dump(&mut self, request: &Request) -> Result<Vec<Vec<u8>>, NlError> {
        self.connect()?.dump(request)
    }

    fn transact(&mut self, requests: &[Request]) -> Result<Vec<Reply>, NlError> {
        self.writes += requests.len() as u64;
        let result = self.connect()?.transact(requests);
        if result.is_err() {
            // Answers that come late must not be taken for answers to what we ask next.
            self.socket = None;
        }
        result
    }

    fn write_raw(&mut self, request: &Request) -> Result<(), NlError> {
        let reply = self.transact(std::slice::from_ref(request))?.pop().ok_or(NlError::Malformed)?;
        if reply.error == 0 { Ok(()) } else { Err(NlError::Kernel(reply.error)) }
    }

    fn write(&mut self, name: &str, request: &Request) -> Result<(), Error> {
        self.write_raw(request).map_err(|e| error(name, e))
    }
}

fn change_request(run: &[Change]) -> Request {
    let entries: Vec<_> = run.iter().map(|c| c.entry).collect();
    message::change(run[0].verb, &run[0].set, &entries)
}

/// Notes the results of one run; returns what has to be sent again.
fn settle(
    changes: &[Change],
    results: &mut [Option<Result<(), Error>>],
    start: usize,
    end: usize,
    reply: &Reply,
) -> Option<(usize, usize)> {
    let change = &changes[start];
    // Without that flag the kernel calls a missing entry an error in its own words.
    let gone = reply.error == IPSET_ERR_EXIST
        || (change.verb == Verb::Del && reply.error == Errno::ENOENT as i32 && end - start == 1);
    if reply.error == 0 {
        results[start..end].fill(Some(Ok(())));
        return None;
    }
    let failed = message::failed_entry(&reply.payload).filter(|place| start + place < end);
    let Some(place) = failed else {
        // The message as a whole was refused, or the set is missing.
        results[start..end].fill(Some(Err(error(&change.set, NlError::Kernel(reply.error)))));
        return None;
    };
    let at = start + place;
    results[start..at].fill(Some(Ok(())));
    results[at] = Some(if gone {
        Ok(())
    } else {
        let object = format!("{} {}", change.set, changes[at].entry.key);
        Err(error(&object, NlError::Kernel(reply.error)))
    });
    (at + 1 < end).then_some((at + 1, end))
}

/// ipset's error numbers in words; `object` is a set, or a set and an entry.
fn error(object: &str, cause: NlError) -> Error {
    let set = object.split(' ').next().unwrap_or(object);
    let named = format!("ipset {object}");
    let failed = |reason: String| Error::Failed { object: named.clone(), reason };
    let NlError::Kernel(number) = cause else {
        return failed("the kernel's answer is malformed".into());
    };
    match number {
        IPSET_ERR_FIND_TYPE => Error::MissingFeature {
            feature: format!("ipset type for {object}"),
            advice: "load the modules ip_set_hash_ipport, ip_set_hash_ip and ip_set_hash_netnet".into(),
        },
        IPSET_ERR_MAX_SETS => {
            failed("the kernel's number of sets is used up; remove unused sets (`ipset list -n`)".into())
        }
        IPSET_ERR_BUSY | IPSET_ERR_REFERENCED => Error::Transient {
            object: named,
            reason: format!(
                "in use by a rule; `iptables-save | grep {set}` and `nft list ruleset` show where"
            ),
        },
        IPSET_ERR_EXIST_SETNAME2 => failed("a set of the new name exists already".into()),
        IPSET_ERR_TYPE_MISMATCH => {
            failed(format!("has another type than ours; destroy it: `ipset destroy {set}`"))
        }
        IPSET_ERR_SKBINFO => failed(format!("was made without skbinfo; destroy it: `ipset destroy {set}`")),
        IPSET_ERR_HASH_FULL => failed(format!(
            "the set is full: `ipset list -t {set}` shows its maxelem; one that is below {MAX_ELEMENTS} is not as we \
             made it and is replaced, otherwise serve fewer ports"
        )),
        _ => match Errno::from_raw(number) {
            Errno::EPERM | Errno::EACCES => Error::Permission { object: named },
            Errno::EEXIST => failed(format!("exists with another type; destroy it: `ipset destroy {set}`")),
            Errno::EINVAL => Error::MissingFeature {
                feature: "ipset".into(),
                advice: "load the module ip_set (kernel option IP_SET)".into(),
            },
            Errno::ENOENT => failed("there is no such set".into()),
            e @ (Errno::EAGAIN | Errno::EBUSY | Errno::EINTR | Errno::ENOBUFS | Errno::ENOMEM) => {
                Error::Transient { object: named, reason: e.desc().into() }
            }
            Errno::UnknownErrno => failed(format!("ipset error {number}")),
            e => failed(e.desc().into()),
        },
    }
}

#[cfg(test)]
mod tests;
