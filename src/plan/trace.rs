//! What becomes of a packet in a given state: the packet path of `docs/how-it-works.md` as a function. Pure; the properties
//! of plans and `explain` ask it.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    net::IpAddr,
};

use super::Observed;
use crate::{
    dataplane::ProgramState,
    model::{
        ids::{Family, Mark, PerFamily},
        kernel::{
            Element, Elements, FamilyProgram, KernelState, Program, RealServerKey, Target, VipRoute,
            VirtualServer, VirtualServerKey,
        },
    },
};

/// Who sends a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum From {
    /// A pod of this node, with its address.
    Pod(IpAddr),
    /// A process of this node, from the node's own address.
    Node,
    /// The same, from and to 127.0.0.1 or ::1.
    Loopback,
    /// Another machine, by one of the node's uplinks.
    Outside,
}

/// The first packet of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packet {
    /// Who sends it.
    pub from: From,
    /// Where to. Its address is not looked at for [`From::Loopback`], but for its family.
    pub to: Target,
}

/// A real server that a packet may be sent to.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Choice {
    /// Its address, with the port that the packet then has.
    pub real: RealServerKey,
    /// Whether it sees the node's address in the place of the client's.
    pub masqueraded: bool,
}

/// What becomes of a packet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Fate {
    /// Nothing of ours concerns it.
    NotOurs,
    /// It is for a VIP and no route makes VIPs local.
    NoRoute,
    /// It reaches whichever socket of the host listens: what the guard is there to prevent.
    HostSocket,
    /// It is refused at once.
    Refused(Refusal),
    /// IPVS sends it to one of these.
    Balanced(VirtualServerKey, Vec<Choice>),
}

/// Why a packet is refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// No entry leads anywhere: no such port, or no endpoint.
    NoEntry,
    /// An entry leads to a mark that IPVS does not have.
    NoServer(Mark),
    /// The IPVS service has no destination that takes connections.
    NoDestination(Mark),
}

impl fmt::Display for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotOurs => f.write_str("not for a service"),
            Self::NoRoute => f.write_str("not delivered: the VIP range has no local route"),
            Self::HostSocket => f.write_str("NOT GUARDED: reaches a socket of the host, if one listens"),
            Self::Refused(Refusal::NoEntry) => f.write_str("refused: no set entry leads to an endpoint"),
            Self::Refused(Refusal::NoServer(mark)) => {
                write!(f, "refused: there is no IPVS service with mark {mark}")
            }
            Self::Refused(Refusal::NoDestination(mark)) => {
                write!(f, "refused: no destination of mark {mark} takes connections")
            }
            Self::Balanced(_, choices) => {
                let hidden = choices.iter().filter(|c| c.masqueraded).count();
                match choices.len() {
                    1 => f.write_str("goes to the one endpoint, ")?,
                    n => write!(f, "goes to one of {n} endpoints, ")?,
                }
                match choices.len() - hidden {
                    0 => f.write_str("which sees the node's address"),
                    _ if hidden == 0 => f.write_str("which sees the client's address"),
                    seen => write!(f, "of which {seen} see the client's address and {hidden} the node's"),
                }
            }
        }
    }
}

/// The part of a state that decides.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    servers: &'a HashMap<VirtualServerKey, VirtualServer>,
    elements: &'a Elements,
    program: Option<&'a Program>,
    routes: &'a PerFamily<VipRoute>,
}

impl<'a> View<'a> {
    /// A desired state, or a kernel in memory.
    pub fn of(state: &'a KernelState) -> Self {
        Self {
            servers: &state.virtual_servers,
            elements: &state.elements,
            program: state.program.as_ref(),
            routes: &state.routes,
        }
    }

    /// A kernel that was read. None where its rules are not as they should be: nobody can say what they do.
    pub fn observed(observed: &'a Observed, wanted: Option<&'a Program>) -> Option<Self> {
        let program = match observed.program {
            ProgramState::Installed => wanted,
            ProgramState::Absent => None,
            ProgramState::Drifted(_) => return None,
        };
        Some(Self {
            servers: &observed.virtual_servers,
            elements: &observed.elements,
            program,
            routes: &observed.routes,
        })
    }

    /// What becomes of a packet.
    pub fn trace(&self, packet: Packet) -> Fate {
        let family = Family::of(&packet.to.addr);
        let program = self.program.and_then(|program| program.families.get(family));
        let range = self.routes.get(family).map(|route| route.range);
        let asks_vip = packet.from != From::Loopback
            && (range.is_some_and(|range| range.contains(&packet.to.addr))
                || program.is_some_and(|p| p.range.contains(&packet.to.addr)));
        if asks_vip {
            return self.for_vip(packet, family, program);
        }
        let Some(program) = program else { return Fate::NotOurs };
        let published = match packet.from {
            From::Loopback => Element::Loopback(family, packet.to.protocol, packet.to.port),
            From::Pod(_) | From::Node | From::Outside => Element::Published(packet.to),
        };
        let Some(mark) = self.mark(&published) else { return Fate::NotOurs };
        match packet.from {
            // Marked where it leaves, by its port.
            From::Node | From::Loopback => self.by_mark(packet, family, mark, true),
            // Sent to the ingress address, which leads on as a VIP does.
            From::Pod(_) | From::Outside => {
                let to = Target { addr: program.ingress, ..packet.to };
                match self.mark(&Element::Vip(to)) {
                    Some(mark) => self.by_mark(packet, family, mark, true),
                    None => Fate::Refused(Refusal::NoEntry),
                }
            }
        }
    }

    fn for_vip(&self, packet: Packet, family: Family, program: Option<&FamilyProgram>) -> Fate {
        if self.routes.get(family).is_none() {
            return Fate::NoRoute;
        }
        if program.is_none() {
            return Fate::HostSocket;
        }
        match self.mark(&Element::Vip(packet.to)) {
            Some(mark) => {
                let elsewhere = matches!(packet.from, From::Node | From::Outside);
                self.by_mark(packet, family, mark, elsewhere)
            }
            None => Fate::Refused(Refusal::NoEntry),
        }
    }

    /// `foreign`: a remote endpoint would not answer this client by way of this node.
    fn by_mark(&self, packet: Packet, family: Family, mark: Mark, foreign: bool) -> Fate {
        if mark == Mark::NOWHERE {
            return Fate::Refused(Refusal::NoEntry);
        }
        let key = VirtualServerKey { family, mark };
        let Some(server) = self.servers.get(&key) else { return Fate::Refused(Refusal::NoServer(mark)) };
        let taking = server.reals.iter().filter(|(_, config)| config.weight > 0);
        let choices: Vec<Choice> = taking
            .map(|(real, _)| {
                // Port 0 keeps the port that was asked for.
                let port = if real.port == 0 { packet.to.port } else { real.port };
                let remote = !self.elements.contains_key(&Element::Local(real.addr));
                let masqueraded = foreign && remote || self.comes_back_past_us(packet.from, real.addr);
                Choice { real: RealServerKey { addr: real.addr, port }, masqueraded }
            })
            .collect();
        if choices.is_empty() {
            Fate::Refused(Refusal::NoDestination(mark))
        } else {
            Fate::Balanced(key, choices)
        }
    }

    /// A pod that reaches itself, or another one on a bridge whose traffic netfilter does not see.
    fn comes_back_past_us(&self, from: From, real: IpAddr) -> bool {
        let From::Pod(pod) = from else { return false };
        let bridges = self.program.map_or(&[][..], |program| &program.masquerade_bridges);
        pod == real && self.elements.contains_key(&Element::Endpoint(real))
            || bridges.iter().any(|b| b.subnet.contains(&pod) && b.subnet.contains(&real))
    }

    fn mark(&self, element: &Element) -> Option<Mark> {
        self.elements.get(element).copied().flatten()
    }
}

/// The packets that ask an entry: from everywhere that it serves.
pub fn packets(element: &Element) -> Vec<Packet> {
    let pod = |family| match family {
        Family::V4 => IpAddr::from([192, 0, 2, 77]),
        Family::V6 => IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 77]),
    };
    match element {
        Element::Vip(to) | Element::Published(to) => {
            let from = [From::Pod(pod(element.family())), From::Node, From::Outside];
            from.into_iter().map(|from| Packet { from, to: *to }).collect()
        }
        Element::Loopback(family, protocol, port) => {
            let addr = match family {
                Family::V4 => IpAddr::from([127, 0, 0, 1]),
                Family::V6 => IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]),
            };
            vec![Packet { from: From::Loopback, to: Target { addr, protocol: *protocol, port: *port } }]
        }
        Element::Local(_) | Element::Endpoint(_) | Element::Own(_) => Vec::new(),
    }
}

/// Choices by real server.
pub fn choices(fate: &Fate) -> BTreeMap<RealServerKey, bool> {
    match fate {
        Fate::Balanced(_, choices) => choices.iter().map(|c| (c.real, c.masqueraded)).collect(),
        _ => BTreeMap::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, sync::Arc};

    use super::*;
    use crate::model::{
        ids::Protocol,
        kernel::{BridgeSubnet, RealServerConfig, VirtualServerConfig},
    };

    const VIP: [u8; 4] = [10, 200, 7, 7];
    const NODE: [u8; 4] = [192, 168, 50, 1];
    const INGRESS: [u8; 4] = [10, 200, 0, 1];
    const HERE: [u8; 4] = [10, 244, 1, 11];
    const THERE: [u8; 4] = [10, 244, 2, 21];

    fn to(addr: impl Into<IpAddr>, port: u16) -> Target {
        Target { addr: addr.into(), protocol: Protocol::Tcp, port }
    }

    /// One service, published as 30080, with an endpoint here and one elsewhere.
    fn state() -> KernelState {
        let family = FamilyProgram {
            range: "10.200.0.0/16".parse().unwrap(),
            ingress: INGRESS.into(),
            node: NODE.into(),
        };
        let real = |addr: [u8; 4], weight| {
            (RealServerKey { addr: addr.into(), port: 8080 }, RealServerConfig { weight })
        };
        let mut state = KernelState {
            program: Some(Program {
                mask: 0x3fff,
                families: PerFamily { v4: Some(family), v6: None },
                masquerade_bridges: vec![],
                uplinks: vec![],
                outside: vec![],
            }),
            ..KernelState::default()
        };
        state.routes.v4 = Some(VipRoute { range: family_range(), source: NODE.into() });
        let mark = Mark(0x100);
        state.virtual_servers.insert(
            VirtualServerKey { family: Family::V4, mark },
            VirtualServer {
                config: VirtualServerConfig { scheduler: "rr".into(), flags: 0 },
                protocol: None,
                reals: Arc::new(
                    [real(HERE, 1), real(THERE, 1), real([10, 244, 2, 22], 0)].into_iter().collect(),
                ),
            },
        );
        for element in [
            Element::Vip(to(VIP, 80)),
            Element::Vip(to(INGRESS, 30080)),
            Element::Published(to(NODE, 30080)),
            Element::Loopback(Family::V4, Protocol::Tcp, 30080),
        ] {
            state.elements.insert(element, Some(mark));
        }
        for element in
            [Element::Local(HERE.into()), Element::Endpoint(HERE.into()), Element::Endpoint(THERE.into())]
        {
            state.elements.insert(element, None);
        }
        state
    }

    fn family_range() -> ipnet::IpNet {
        "10.200.0.0/16".parse().unwrap()
    }

    fn sees(state: &KernelState, from: From, to: Target) -> Vec<(String, bool)> {
        let fate = View::of(state).trace(Packet { from, to });
        choices(&fate).into_iter().map(|(real, m)| (real.to_string(), m)).collect()
    }

    #[test]
    fn who_sees_whom() {
        let state = state();
        let (here, there) = ("10.244.1.11:8080".to_owned(), "10.244.2.21:8080".to_owned());
        let both = |a: bool, b: bool| vec![(here.clone(), a), (there.clone(), b)];
        let other_pod = From::Pod([10, 244, 1, 12].into());
        assert_eq!(sees(&state, other_pod, to(VIP, 80)), both(false, false));
        assert_eq!(sees(&state, From::Pod(HERE.into()), to(VIP, 80)), both(true, false));
        assert_eq!(sees(&state, From::Node, to(VIP, 80)), both(false, true));
        assert_eq!(sees(&state, From::Outside, to(VIP, 80)), both(false, true));
        assert_eq!(sees(&state, From::Outside, to(NODE, 30080)), both(false, true));
        assert_eq!(sees(&state, other_pod, to(NODE, 30080)), both(false, true));
        assert_eq!(sees(&state, From::Loopback, to([127, 0, 0, 1], 30080)), both(false, true));
    }

    #[test]
    fn a_bridge_that_netfilter_does_not_see() {
        let mut state = state();
        let bridge = BridgeSubnet { bridge: "cni0".into(), subnet: "10.244.1.0/24".parse().unwrap() };
        state.program.as_mut().unwrap().masquerade_bridges.push(bridge);
        let seen = sees(&state, From::Pod([10, 244, 1, 12].into()), to(VIP, 80));
        assert_eq!(seen.into_iter().map(|(_, m)| m).collect::<Vec<_>>(), [true, false]);
    }

    #[test]
    fn what_is_missing_decides() {
        let fate = |change: &dyn Fn(&mut KernelState), to: Target| {
            let mut state = state();
            change(&mut state);
            let packet = Packet { from: From::Outside, to };
            View::of(&state).trace(packet)
        };
        let mark = Mark(0x100);
        let nothing = |_: &mut KernelState| {};
        assert_eq!(fate(&nothing, to(VIP, 81)), Fate::Refused(Refusal::NoEntry));
        assert_eq!(fate(&nothing, to(NODE, 22)), Fate::NotOurs);
        assert_eq!(fate(&nothing, to([192, 0, 2, 1], 80)), Fate::NotOurs);
        assert_eq!(fate(&|s| s.routes.v4 = None, to(VIP, 80)), Fate::NoRoute);
        assert_eq!(fate(&|s| s.program = None, to(VIP, 80)), Fate::HostSocket);
        assert_eq!(fate(&|s| s.virtual_servers.clear(), to(VIP, 80)), Fate::Refused(Refusal::NoServer(mark)));
        let idle = |s: &mut KernelState| {
            s.virtual_servers.values_mut().for_each(|server| server.reals = Arc::default());
        };
        assert_eq!(fate(&idle, to(VIP, 80)), Fate::Refused(Refusal::NoDestination(mark)));
        let no_ingress =
            |s: &mut KernelState| s.elements.retain(|e, _| *e != Element::Vip(to(INGRESS, 30080)));
        assert_eq!(fate(&no_ingress, to(NODE, 30080)), Fate::Refused(Refusal::NoEntry));
    }

    #[test]
    fn said_in_words() {
        let state = state();
        let view = View::of(&state);
        let words: BTreeSet<String> =
            state.elements.keys().flat_map(packets).map(|packet| view.trace(packet).to_string()).collect();
        assert_eq!(
            words.into_iter().collect::<Vec<_>>(),
            [
                "goes to one of 2 endpoints, of which 1 see the client's address and 1 the node's",
                "goes to one of 2 endpoints, which sees the client's address",
            ]
        );
    }
}
