//! [`Ipvs`] on the real kernel, by the `ipvs-netlink` crate.

mod count;
mod listing;

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io::BufReader,
    net::IpAddr,
    sync::Arc,
};

use ipvs_netlink::{
    AddressFamily, Client, Command, DestinationConfig, DestinationId, Forwarding, Options, ServiceConfig,
    ServiceFlags, ServiceId,
};

use self::count::Counter;
use super::{Counters, Error, Ipvs, IpvsChange, Listed};
use crate::model::{
    ids::{Family, Mark},
    kernel::{
        RealServerConfig, RealServerKey, Timeouts, VirtualServer, VirtualServerConfig, VirtualServerKey,
    },
};

/// The IPVS table of the network namespace in which the client was opened.
pub struct KernelIpvs {
    client: Client,
    counter: Option<Counter>,
    /// It was told that the list for people is not as we know it.
    no_list: bool,
}

/// With this in the environment each change goes to the kernel in a message of its own, as tests want that stop after each.
const SINGLY: &str = "MESHLB_IPVS_SINGLY";

impl KernelIpvs {
    /// Opens it; the kernel loads ip_vs where it can.
    ///
    /// # Errors
    /// [`Error::MissingFeature`] without ip_vs, [`Error::Permission`] without CAP_NET_ADMIN.
    pub fn open() -> Result<Self, Error> {
        let mut options = Options::default();
        if std::env::var_os(SINGLY).is_some() {
            // What the kernel makes of this, twice as much, has room for one answer.
            options.receive_buffer = 2000;
        }
        let client = Client::open_with(options).map_err(error)?;
        Ok(Self { client, counter: Counter::open(), no_list: false })
    }
}

fn error(error: ipvs_netlink::Error) -> Error {
    use ipvs_netlink::Error as E;
    match error {
        E::NoIpvs => Error::MissingFeature {
            feature: "IPVS".into(),
            advice: "load it with `modprobe ip_vs`, or use a kernel built with CONFIG_IP_VS".into(),
        },
        E::PermissionDenied { object } => Error::Permission { object: object.to_string() },
        other => Error::Failed { object: "ipvs".into(), reason: other.to_string() },
    }
}

fn service_id(key: VirtualServerKey) -> ServiceId {
    let family = match key.family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    };
    ServiceId::Fwmark { family, mark: key.mark.0 }
}

fn key_of(id: &ServiceId) -> Option<VirtualServerKey> {
    match id {
        ServiceId::Fwmark { family, mark } => {
            let family = match family {
                AddressFamily::Inet => Family::V4,
                AddressFamily::Inet6 => Family::V6,
            };
            Some(VirtualServerKey { family, mark: Mark(*mark) })
        }
        ServiceId::Address { .. } => None,
    }
}

fn service_config(config: &VirtualServerConfig) -> ServiceConfig {
    let mut out = ServiceConfig::new(config.scheduler.to_string());
    out.flags = ServiceFlags::from_bits(config.flags);
    out
}

fn virtual_config(config: &ServiceConfig) -> VirtualServerConfig {
    VirtualServerConfig { scheduler: config.scheduler.as_str().into(), flags: config.flags.bits() }
}

fn destination_id(real: RealServerKey) -> DestinationId {
    DestinationId { addr: real.addr, port: real.port }
}

fn command(change: &IpvsChange) -> Command {
    let weight = |config: &RealServerConfig| {
        DestinationConfig::masquerade(i32::try_from(config.weight).unwrap_or(i32::MAX))
    };
    match change {
        IpvsChange::AddService(key, config) => Command::AddService(service_id(*key), service_config(config)),
        IpvsChange::SetService(key, config) => Command::SetService(service_id(*key), service_config(config)),
        IpvsChange::DelService(key) => Command::DelService(service_id(*key)),
        IpvsChange::AddReal(key, real, config) => {
            Command::AddDestination(service_id(*key), destination_id(*real), weight(config))
        }
        IpvsChange::SetReal(key, real, config) => {
            Command::SetDestination(service_id(*key), destination_id(*real), weight(config))
        }
        IpvsChange::DelReal(key, real) => Command::DelDestination(service_id(*key), destination_id(*real)),
    }
}

impl KernelIpvs {
    /// A second try for a change that met an object in another condition than expected: adding what is
    /// there sets it, setting what is gone adds it, deleting what is gone is done.
    fn settle(&mut self, change: &IpvsChange, failed: ipvs_netlink::Error) -> Result<(), Error> {
        use ipvs_netlink::Error as E;
        let again = match (change, &failed) {
            (IpvsChange::AddService(key, config), E::AlreadyExists { .. }) => {
                IpvsChange::SetService(*key, config.clone())
            }
            (IpvsChange::SetService(key, config), E::NotFound { .. }) => {
                IpvsChange::AddService(*key, config.clone())
            }
            (IpvsChange::AddReal(key, real, config), E::AlreadyExists { .. }) => {
                IpvsChange::SetReal(*key, *real, *config)
            }
            (IpvsChange::SetReal(key, real, config), E::NotFound { .. }) => {
                IpvsChange::AddReal(*key, *real, *config)
            }
            (IpvsChange::DelService(_) | IpvsChange::DelReal(..), E::NotFound { .. }) => return Ok(()),
            _ => return Err(error(failed)),
        };
        self.client.execute(&command(&again)).map_err(error)
    }
}

impl Ipvs for KernelIpvs {
    fn dump(
        &mut self,
        keep: &dyn Fn(Mark) -> bool,
    ) -> Result<HashMap<VirtualServerKey, VirtualServer>, Error> {
        let services = self.dump_services(keep)?;
        let mut out = HashMap::with_capacity(services.len());
        for (key, config) in services {
            let destinations = self.client.destinations(&service_id(key)).map_err(error)?;
            let reals = destinations.iter().map(|d| (real_key(&d.id), real_config(&d.config)));
            let reals = Arc::new(reals.collect());
            out.insert(key, VirtualServer { config, protocol: None, reals });
        }
        Ok(out)
    }

    fn dump_services(
        &mut self,
        keep: &dyn Fn(Mark) -> bool,
    ) -> Result<HashMap<VirtualServerKey, VirtualServerConfig>, Error> {
        let mut out = HashMap::new();
        for service in self.client.services().map_err(error)? {
            let Some(key) = key_of(&service.id).filter(|key| keep(key.mark)) else { continue };
            out.insert(key, virtual_config(&service.config));
        }
        Ok(out)
    }

    fn count(&mut self) -> Option<u32> {
        self.counter.as_ref()?.services()
    }

    fn list(
        &mut self,
        keep: &dyn Fn(Mark) -> bool,
        each: &mut dyn FnMut(&Listed<'_>),
    ) -> Result<bool, Error> {
        // Not there (a /proc without it), or not as we know it: there is a dearer way.
        let Ok(file) = File::open(listing::PATH) else { return Ok(false) };
        let read = listing::read(BufReader::with_capacity(16 << 10, file), keep, each);
        if let Err(e) = &read
            && !std::mem::replace(&mut self.no_list, true)
        {
            tracing::warn!("{}: {e}; what others change in IPVS is noticed later", listing::PATH);
        }
        Ok(read.is_ok())
    }

    fn service(&mut self, key: VirtualServerKey) -> Result<Option<VirtualServerConfig>, Error> {
        match self.client.service(&service_id(key)) {
            Ok(found) => Ok(found.map(|service| virtual_config(&service.config))),
            // A kernel without IPv6 (`ip_vs_genl_parse_service`) has none of it.
            Err(ipvs_netlink::Error::Kernel { errno, .. }) if errno == nix::libc::EAFNOSUPPORT => Ok(None),
            Err(e) => Err(error(e)),
        }
    }

    fn reals(
        &mut self,
        key: VirtualServerKey,
    ) -> Result<BTreeMap<RealServerKey, (RealServerConfig, Counters)>, Error> {
        let destinations = self.client.destinations(&service_id(key)).map_err(error)?;
        Ok(destinations
            .iter()
            .map(|d| {
                let counters = Counters {
                    connections: d.stats.connections,
                    in_packets: d.stats.in_packets,
                    out_packets: d.stats.out_packets,
                    in_bytes: d.stats.in_bytes,
                    out_bytes: d.stats.out_bytes,
                    active: d.active,
                    inactive: d.inactive,
                };
                (real_key(&d.id), (real_config(&d.config), counters))
            })
            .collect())
    }

    fn apply(&mut self, changes: &[IpvsChange]) -> Vec<Result<(), Error>> {
        let commands: Vec<Command> = changes.iter().map(command).collect();
        let results = self.client.batch(&commands);
        changes
            .iter()
            .zip(results)
            .map(|(change, result)| match result {
                Ok(()) => Ok(()),
                Err(failed) => self.settle(change, failed),
            })
            .collect()
    }

    fn timeouts(&mut self) -> Result<Timeouts, Error> {
        let t = self.client.timeouts().map_err(error)?;
        Ok(Timeouts { tcp: t.tcp, tcp_fin: t.tcp_fin, udp: t.udp })
    }

    fn set_timeouts(&mut self, t: Timeouts) -> Result<(), Error> {
        let timeouts = ipvs_netlink::Timeouts { tcp: t.tcp, tcp_fin: t.tcp_fin, udp: t.udp };
        self.client.execute(&Command::SetTimeouts(timeouts)).map_err(error)
    }

    fn foreign(&mut self, keep: &dyn Fn(Mark) -> bool) -> Result<Vec<String>, Error> {
        let services = self.client.services().map_err(error)?;
        let ours = |id: &ServiceId| key_of(id).is_some_and(|key| keep(key.mark));
        Ok(services.iter().filter(|s| !ours(&s.id)).map(|s| s.id.to_string()).collect())
    }

    fn writes(&self) -> u64 {
        self.client.writes()
    }
}

fn real_key(id: &DestinationId) -> RealServerKey {
    let addr: IpAddr = id.addr;
    RealServerKey { addr, port: id.port }
}

/// The weight by which a destination is known that somebody has changed in ways that we never do. (Weights are less:
/// the kernel refuses those of 2^31 and more.)
pub const ALTERED: u32 = u32::MAX;

/// A destination with another forwarding method than masquerading, or with a limit to its connections, is not as
/// we want it, whatever its weight: one that we never write makes the comparison say so.
fn real_config(config: &DestinationConfig) -> RealServerConfig {
    let limited = config.upper_threshold != 0 || config.lower_threshold != 0;
    match config.forwarding {
        Forwarding::Masquerade | Forwarding::Local if !limited => {
            RealServerConfig { weight: u32::try_from(config.weight).unwrap_or(0) }
        }
        _ => altered(),
    }
}

fn altered() -> RealServerConfig {
    RealServerConfig { weight: ALTERED }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_destination_that_somebody_limits_or_forwards_otherwise_is_not_as_we_want_it() {
        let config = |forwarding| DestinationConfig::new(forwarding, 1);
        let ours = RealServerConfig { weight: 1 };
        assert_eq!(real_config(&config(Forwarding::Masquerade)), ours);
        assert_eq!(real_config(&config(Forwarding::Local)), ours);
        for altered in [
            config(Forwarding::DirectRoute),
            DestinationConfig { upper_threshold: 1, ..config(Forwarding::Masquerade) },
            DestinationConfig { lower_threshold: 1, ..config(Forwarding::Masquerade) },
        ] {
            assert_ne!(real_config(&altered), ours, "{altered:?}");
        }
    }
}
