//! The cheap look: whether IPVS, routes and sysctls are as we left them.

use std::{
    collections::{HashMap, HashSet},
    time::Instant,
};

use super::Engine;
use crate::{
    dataplane::{Error, Listed},
    model::{
        ids::{Family, Mark},
        kernel::{RealServerConfig, RealServerKey, VirtualServer, VirtualServerKey},
    },
    reconcile::rotation::Rotation,
};

/// So many that a list has left out are looked at one by one.
const MISSING: usize = 32;
/// After a list that has left out more there is none for so many looks, and after one that has left out fewer for so many no dump.
const PARTLY_LISTED: u32 = 60;

impl Engine {
    /// Compares what is cheap to look at with what we know we wrote: routes, sysctls, and some IPVS services in rotation. Says
    /// what differs.
    ///
    /// # Errors
    /// When the kernel can't be read.
    pub fn look_at_some(&mut self, rotation: &mut Rotation) -> Result<Option<String>, Error> {
        let ranges = self.settings.node.ranges;
        let routes = self.dataplane.host.vip_routes(&ranges)?;
        if routes != self.known.routes {
            return Ok(Some("the route of a VIP range is not as it should be".into()));
        }
        for (path, value) in &self.known.sysctls {
            if self.merged.state().sysctls.contains_key(path)
                && self.dataplane.host.sysctl(path)?.is_some_and(|found| found != *value)
            {
                return Ok(Some(format!("sysctl {} was changed", path.replace('/', "."))));
            }
        }
        if self.merged.state().timeouts.is_some()
            && let Some(known) = self.known.timeouts
            && self.dataplane.ipvs.timeouts()? != known
        {
            return Ok(Some("the IPVS timeouts were changed".into()));
        }
        let start = Instant::now();
        for done in 0..self.known.virtual_servers.len().min(rotation.most) {
            if done >= rotation.least && start.elapsed() > rotation.budget {
                break;
            }
            let Some(key) = rotation.next(&self.known) else { break };
            if let Some(found) = self.look_at_server(key)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// Compares all of IPVS with what we know we wrote: by the kernel's list for people, and what that says is not as it should be
    /// once more, exactly; where there is no such list, or a part of it, all services, and no destinations. Says what differs.
    ///
    /// # Errors
    /// When the kernel can't be read.
    pub fn look_at_all(&mut self) -> Result<Option<String>, Error> {
        let not_known = self.not_known();
        let found = self.compare_all()?;
        if found.is_none() {
            self.not_known = not_known;
        }
        Ok(found)
    }

    /// Whether the kernel counts more or fewer services of IPv4 than it did at the last look at all of them that found nothing, but
    /// for our own changes.
    pub fn counts_otherwise(&mut self) -> bool {
        let now = self.not_known();
        self.not_known.is_some() && now.is_some() && self.not_known != now
    }

    fn not_known(&mut self) -> Option<i64> {
        let known = self.known.virtual_servers.keys().filter(|key| key.family == Family::V4).count();
        Some(i64::from(self.dataplane.ipvs.count()?) - i64::try_from(known).ok()?)
    }

    fn compare_all(&mut self) -> Result<Option<String>, Error> {
        if self.partly_listed > 0 {
            self.partly_listed -= 1;
            return self.look_by_dump();
        }
        let (ours, settings) = (&self.ours, &self.settings);
        let keep = |mark| Self::is_ours(ours, settings, mark);
        let mut comparison = Comparison::new(&self.known.virtual_servers);
        if !self.dataplane.ipvs.list(&keep, &mut |found| comparison.see(found))? {
            return self.look_by_dump();
        }
        let Suspicion { different, missing, strangers } = comparison.end();
        for key in different {
            if let Some(found) = self.look_at_server(key)? {
                return Ok(Some(found));
            }
        }
        for key in strangers {
            if self.dataplane.ipvs.service(key)?.is_some() {
                return Ok(Some(unwanted(key)));
            }
        }
        if missing.is_empty() {
            return Ok(None);
        }
        for key in missing.iter().take(MISSING) {
            if let Some(found) = self.look_at_server(*key)? {
                return Ok(Some(found));
            }
        }
        // They are there: the list is a part. A stranger may be left out, too: that is looked for now and then.
        if missing.len() > MISSING {
            self.partly_listed = PARTLY_LISTED;
        } else if self.strangers_rest > 0 {
            self.strangers_rest -= 1;
            return Ok(None);
        } else {
            self.strangers_rest = PARTLY_LISTED;
        }
        self.look_by_dump()
    }

    /// All services, and no destinations.
    fn look_by_dump(&mut self) -> Result<Option<String>, Error> {
        let (ours, settings) = (&self.ours, &self.settings);
        let mut found = self.dataplane.ipvs.dump_services(&|mark| Self::is_ours(ours, settings, mark))?;
        for (key, server) in &self.known.virtual_servers {
            let config = match found.remove(key) {
                Some(config) => Some(config),
                None => self.dataplane.ipvs.service(*key)?,
            };
            if config.as_ref() != Some(&server.config) {
                return Ok(Some(differs(*key)));
            }
        }
        Ok(found.into_keys().next().map(unwanted))
    }

    /// One of the services that we know of, with its destinations.
    fn look_at_server(&mut self, key: VirtualServerKey) -> Result<Option<String>, Error> {
        // It may have been taken out since the round began.
        let Some(server) = self.known.virtual_servers.get(&key) else { return Ok(None) };
        if self.dataplane.ipvs.service(key)?.as_ref() != Some(&server.config) {
            return Ok(Some(differs(key)));
        }
        let found = self.dataplane.ipvs.reals(key)?;
        let same = same_reals(server, found.iter().map(|(real, (config, _))| (real, config)));
        Ok((!same).then(|| format!("destinations of IPVS service {key} are not as they should be")))
    }
}

fn differs(key: VirtualServerKey) -> String {
    format!("IPVS service {key} is missing or different")
}

fn unwanted(key: VirtualServerKey) -> String {
    format!("IPVS service {key} has one of our marks and is not wanted")
}

/// What a list says that is to be looked at exactly: it does not tell everything, and may leave something out.
#[derive(Default)]
struct Suspicion {
    /// What we know and is listed otherwise.
    different: Vec<VirtualServerKey>,
    /// What we know and is not listed.
    missing: Vec<VirtualServerKey>,
    /// What may be there and we don't know.
    strangers: Vec<VirtualServerKey>,
}

/// What was listed, beside what we know of.
struct Comparison<'a> {
    known: &'a HashMap<VirtualServerKey, VirtualServer>,
    seen: HashSet<VirtualServerKey>,
    /// How many have a mark and no destinations, which would tell their family, and how many of those are like one of ours.
    empty: HashMap<Mark, (usize, usize)>,
    suspicion: Suspicion,
}

impl<'a> Comparison<'a> {
    fn new(known: &'a HashMap<VirtualServerKey, VirtualServer>) -> Self {
        let seen = HashSet::with_capacity(known.len());
        Self { known, seen, empty: HashMap::new(), suspicion: Suspicion::default() }
    }

    fn see(&mut self, found: &Listed<'_>) {
        let Some((first, _)) = found.reals.first() else {
            let mut like = with(found.mark).filter_map(|key| self.known.get(&key));
            let like = like.any(|known| known.reals.is_empty() && same_config(known, found));
            let (listed, as_known) = self.empty.entry(found.mark).or_default();
            *listed += 1;
            *as_known += usize::from(like);
            return;
        };
        let key = VirtualServerKey { family: Family::of(&first.addr), mark: found.mark };
        let server = self.known.get(&key);
        let same = server.is_some_and(|server| {
            same_config(server, found)
                && same_reals(server, found.reals.iter().map(|(real, config)| (real, config)))
        });
        if server.is_some() {
            self.seen.insert(key);
        }
        if !same {
            self.suspect(found.mark, server.map(|_| key));
        }
    }

    /// `key`, and whatever else may be there with its mark: a destination of the other family does not tell the service's.
    fn suspect(&mut self, mark: Mark, key: Option<VirtualServerKey>) {
        self.suspicion.different.extend(key);
        self.suspicion.strangers.extend(with(mark).filter(|key| !self.known.contains_key(key)));
    }

    fn end(mut self) -> Suspicion {
        for (mark, (listed, as_known)) in std::mem::take(&mut self.empty) {
            let is_empty =
                |key: &VirtualServerKey| self.known.get(key).is_some_and(|server| server.reals.is_empty());
            let known: Vec<_> = with(mark).filter(is_empty).collect();
            if known.len() == listed && listed == as_known {
                self.seen.extend(known);
            } else {
                self.suspect(mark, None);
            }
        }
        self.suspicion.missing.extend(self.known.keys().filter(|key| !self.seen.contains(key)));
        self.suspicion
    }
}

/// What may have this mark.
fn with(mark: Mark) -> impl Iterator<Item = VirtualServerKey> {
    Family::ALL.into_iter().map(move |family| VirtualServerKey { family, mark })
}

fn same_reals<'a>(
    server: &VirtualServer,
    mut found: impl ExactSizeIterator<Item = (&'a RealServerKey, &'a RealServerConfig)>,
) -> bool {
    found.len() == server.reals.len() && found.all(|(real, config)| server.reals.get(real) == Some(config))
}

fn same_config(server: &VirtualServer, found: &Listed<'_>) -> bool {
    found.plain && *server.config.scheduler == *found.scheduler
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::model::kernel::VirtualServerConfig;

    const MARK: Mark = Mark(0x100);

    fn server(reals: &[(RealServerKey, RealServerConfig)]) -> VirtualServer {
        let config = VirtualServerConfig { scheduler: "rr".into(), flags: 0 };
        VirtualServer { config, protocol: None, reals: Arc::new(reals.iter().copied().collect()) }
    }

    /// What is different or missing, and strangers, for what is known of a mark and what is listed with it.
    fn compare(
        known: &[(Family, &[(RealServerKey, RealServerConfig)])],
        listed: &[&[(RealServerKey, RealServerConfig)]],
    ) -> (Vec<Family>, Vec<Family>) {
        let key = |family| VirtualServerKey { family, mark: MARK };
        let known = known.iter().map(|(family, reals)| (key(*family), server(reals))).collect();
        let mut comparison = Comparison::new(&known);
        for reals in listed {
            comparison.see(&Listed { mark: MARK, scheduler: "rr", plain: true, reals });
        }
        let families = |mut keys: Vec<VirtualServerKey>| {
            keys.sort();
            keys.iter().map(|key| key.family).collect()
        };
        let Suspicion { mut different, missing, strangers } = comparison.end();
        different.extend(missing);
        (families(different), families(strangers))
    }

    /// A list has both with one mark, and without their family where they have no destinations.
    #[test]
    fn of_two_families_with_one_mark_the_one_that_lost_its_destinations_is_suspected() {
        let real = |addr: &str| {
            let addr = addr.parse().unwrap();
            [(RealServerKey { addr, port: 80 }, RealServerConfig { weight: 1 })]
        };
        let (four, six) = (real("10.244.1.11"), real("fd00::11"));
        let (v4, v6) = (Family::V4, Family::V6);
        let both: [(Family, &[_]); 2] = [(v4, &four), (v6, &six)];
        assert_eq!(compare(&both, &[&six, &four]), (vec![], vec![]));
        assert_eq!(compare(&both, &[&[], &four]), (vec![v6], vec![]));
        assert_eq!(compare(&both, &[&[], &[]]), (vec![v4, v6], vec![]));
        assert_eq!(compare(&both, &[&four]), (vec![v6], vec![]));
        let one: [(Family, &[_]); 2] = [(v4, &four), (v6, &[])];
        assert_eq!(compare(&one, &[&four, &[]]), (vec![], vec![]));
        assert_eq!(compare(&one, &[&[], &[]]), (vec![v4, v6], vec![]));
        assert_eq!(compare(&one, &[&four, &six]), (vec![v6], vec![]));
        let none: [(Family, &[_]); 2] = [(v4, &[]), (v6, &[])];
        assert_eq!(compare(&none, &[&[], &[]]), (vec![], vec![]));
        assert_eq!(compare(&none, &[&[]]), (vec![v4, v6], vec![]));
        let single: [(Family, &[_]); 1] = [(v4, &four)];
        assert_eq!(compare(&single, &[&four]), (vec![], vec![]));
        assert_eq!(compare(&single, &[&four, &six]), (vec![], vec![v6]));
        assert_eq!(compare(&single, &[&four, &[]]), (vec![], vec![v6]));
        assert_eq!(compare(&single, &[&[]]), (vec![v4], vec![v6]));
        assert_eq!(compare(&[], &[&six]), (vec![], vec![v4, v6]));
        // Another's of IPv4, with a destination of IPv6 in front, beside ours of IPv6.
        let ours: [(Family, &[_]); 1] = [(v6, &six)];
        let tunnel = [six[0], four[0]];
        assert_eq!(compare(&ours, &[&tunnel, &six]), (vec![v6], vec![v4]));
    }
}
