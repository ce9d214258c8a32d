//! What others changed: the difference between what we left in the kernel and what is there.

use std::collections::BTreeMap;

use super::Engine;
use crate::{dataplane::ProgramState, plan::Observed};

/// How many things differ, by kind: the values of the label `kind` of `meshlb_drift_total`.
pub type Drift = BTreeMap<&'static str, u64>;

impl Engine {
    /// What was found changed since the last call.
    pub fn take_drift(&mut self) -> Drift {
        std::mem::take(&mut self.drift)
    }

    /// Compares what is there with what the last turn left, if that went well.
    pub(super) fn find_drift(&mut self, observed: &Observed) {
        if !self.known_good {
            return;
        }
        let (known, drift) = (&self.known, &mut self.drift);
        let mut add = |kind, n: usize| {
            if n > 0 {
                *drift.entry(kind).or_default() += n as u64;
            }
        };
        for (key, server) in &known.virtual_servers {
            match observed.virtual_servers.get(key) {
                Some(found) => {
                    add("ipvs_service", usize::from(found.config != server.config));
                    if found.reals != server.reals {
                        let lost = server
                            .reals
                            .iter()
                            .filter(|(real, config)| found.reals.get(real) != Some(config));
                        let extra = found.reals.keys().filter(|real| !server.reals.contains_key(real));
                        add("ipvs_destination", lost.count() + extra.count());
                    }
                }
                None => add("ipvs_service", 1),
            }
        }
        let extra = observed.virtual_servers.keys().filter(|key| !known.virtual_servers.contains_key(key));
        add("ipvs_service", extra.count());
        if known.elements != observed.elements {
            let lost = known.elements.iter().filter(|(e, mark)| observed.elements.get(e) != Some(mark));
            let extra = observed.elements.keys().filter(|e| !known.elements.contains_key(e));
            add("set_element", lost.count() + extra.count());
        }
        let rules = known.program.is_some()
            && known.program == self.merged.state().program
            && observed.program != ProgramState::Installed;
        add("rules", usize::from(rules));
        let routes =
            known.routes.iter().filter(|(family, route)| observed.routes.get(*family) != Some(route));
        add("route", routes.count());
        let sysctls = known
            .sysctls
            .iter()
            .filter(|(path, value)| observed.sysctls.get(*path).is_some_and(|found| found != *value));
        add("sysctl", sysctls.count());
        add("ipvs_timeouts", usize::from(known.timeouts.is_some_and(|known| known != observed.timeouts)));
    }
}
