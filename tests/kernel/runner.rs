//! Which cases there are, which to run, and what is shown of them.

use std::any::Any;
use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use crate::check;
use crate::client::{Probe, Tally};
use crate::machine::patience;
use crate::manifests::Manifests;
pub use crate::matrix::{Family, Matrix, Params, Proto, Renderer};
use crate::ns::{self, Netns};
use crate::program::{self, Meshlb, Program};
use crate::reference::Reference;
use crate::topology::{Builder, Node, Topology, all};

/// An error that makes a case count as skipped.
#[derive(Debug)]
pub struct Skip(pub String);

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

type Function = fn(&mut Cx) -> Result<()>;

#[derive(Clone)]
struct Case {
    name: String,
    params: Params,
    limit: Duration,
    run: Function,
    /// Where several machines share the cases: those of one group run on one of them.
    group: String,
    /// Of a heavy one, whether a whole run takes it that does not take all.
    thin: Option<bool>,
}

/// The limit of cases that are not slow ones.
const QUICK: Duration = Duration::from_secs(60);

/// The cases.
#[derive(Default)]
pub struct Suite {
    cases: Vec<Case>,
}

impl Suite {
    /// Adds a case for every point of the matrix, each with a minute of time. Put cases that use the same topology after one
    /// another.
    pub fn add(&mut self, name: &str, matrix: &Matrix, run: Function) {
        self.add_slow(name, matrix, QUICK, run);
    }

    /// Adds cases that may take longer.
    pub fn add_slow(&mut self, name: &str, matrix: &Matrix, limit: Duration, run: Function) {
        for (suffix, params) in matrix.expand(name) {
            let full = format!("{name}{suffix}");
            // Quick ones may share what their nodes are programmed with.
            let group = if limit > QUICK { full.clone() } else { name.to_owned() };
            self.cases.push(Case { name: full, params, limit, run, group, thin: None });
        }
    }

    /// Adds cases so long that a whole run takes one renderer for each of them, as long as MESHLB_KERNEL_FULL is not 1: another
    /// one in the next turn.
    pub fn add_heavy(&mut self, name: &str, matrix: &Matrix, limit: Duration, run: Function) {
        let first = self.cases.len();
        self.add_slow(name, matrix, limit, run);
        let added = self.cases.len() - first;
        let sum: usize = name.bytes().map(usize::from).sum();
        for (i, case) in self.cases.iter_mut().skip(first).enumerate() {
            case.thin = Some(i == (sum + turn()) % added);
        }
    }

    /// Puts the case that was added last into a group of another name.
    pub fn grouped(&mut self, group: &str) {
        if let Some(case) = self.cases.last_mut() {
            group.clone_into(&mut case.group);
        }
    }
}

/// The topology that is there, kept for the next case.
#[derive(Default)]
struct Kept {
    topology: Option<Arc<Topology>>,
    /// What its nodes are programmed with, if cases share that.
    shared: Option<Shared>,
}

struct Shared {
    /// The renderer and the manifests.
    key: String,
    program: Arc<dyn Program>,
}

type Pool = Arc<Mutex<Kept>>;

impl Kept {
    /// Takes out what cases have shared and demands that nothing is left of it.
    fn retire(&mut self) -> Result<()> {
        let (Some(shared), Some(topology)) = (self.shared.take(), &self.topology) else { return Ok(()) };
        let cleaned = all(topology.nodes.iter().map(|n| || shared.program.cleanup(n)));
        let clean = cleaned.and_then(|_| check::nothing_left(topology));
        // The next case's program is another one, with nothing to remember.
        for node in &topology.nodes {
            let _ = fs::remove_dir_all(&node.dir);
        }
        if clean.is_err() {
            self.topology = None;
        }
        clean.context("taking out what the cases before this one have shared")
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a case is given.
pub struct Cx {
    /// The point of its matrix.
    pub params: Params,
    /// A folder of its own.
    pub dir: PathBuf,
    program: Arc<dyn Program>,
    meshlb: Option<Meshlb>,
    pool: Pool,
    work: PathBuf,
    touched: Arc<Mutex<BTreeSet<u8>>>,
    tainted: Arc<AtomicBool>,
    notes: Arc<Mutex<String>>,
    nocapture: bool,
}

impl Cx {
    /// The address family.
    pub fn family(&self) -> Family {
        self.params.family
    }

    /// The protocol; skips the case if this kernel does not have it.
    pub fn proto(&self) -> Result<Proto> {
        let proto = self.params.proto;
        if proto.available() { Ok(proto) } else { Err(Skip(format!("this kernel has no {proto}")).into()) }
    }

    /// The renderer.
    pub fn renderer(&self) -> Renderer {
        self.params.renderer
    }

    /// The topology of the case before, if it was built alike, else a new one. Nothing of ours is in its nodes.
    pub fn topology(&self, spec: &Builder) -> Result<Arc<Topology>> {
        let mut kept = lock(&self.pool);
        kept.retire()?;
        self.build(&mut kept, spec)
    }

    /// A new topology in any case.
    pub fn fresh_topology(&self, spec: &Builder) -> Result<Arc<Topology>> {
        *lock(&self.pool) = Kept::default();
        self.topology(spec)
    }

    fn build(&self, kept: &mut Kept, spec: &Builder) -> Result<Arc<Topology>> {
        if let Some(topology) = kept.topology.as_ref().filter(|t| t.spec == *spec) {
            return Ok(Arc::clone(topology));
        }
        *kept = Kept::default();
        let start = Instant::now();
        let topology = Arc::new(spec.build(&self.work.join("nodes"))?);
        self.note(format!("topology built in {:.1} s", start.elapsed().as_secs_f32()));
        kept.topology = Some(Arc::clone(&topology));
        Ok(topology)
    }

    /// A topology with every node programmed, as the case before left it if that asked for the very same: for cases that
    /// only send packets. It is cleaned up, and looked at for what is left, when a case wants something else.
    pub fn shared(
        &self,
        spec: &Builder,
        describe: impl FnOnce(&Topology, &mut Manifests) -> Result<()>,
    ) -> Result<Arc<Topology>> {
        let mut kept = lock(&self.pool);
        if kept.topology.as_ref().is_some_and(|t| t.spec != *spec) {
            kept.retire()?;
        }
        let topology = self.build(&mut kept, spec)?;
        let mut manifests = self.manifests()?;
        describe(&topology, &mut manifests)?;
        let key = format!("{} {:?} {:?}", self.params.renderer, manifests.services, manifests.slices);
        if kept.shared.as_ref().is_some_and(|s| s.key == key) {
            return Ok(topology);
        }
        kept.retire()?;
        manifests.write()?;
        kept.shared = Some(Shared { key, program: Arc::clone(&self.program) });
        self.timed("programmed", || {
            all(topology.nodes.iter().map(|n| {
                || self.program.apply(n, &manifests).with_context(|| format!("programming {}", n.name))
            }))
        })?;
        Ok(topology)
    }

    fn timed<T>(&self, what: &str, f: impl FnOnce() -> Result<T>) -> Result<T> {
        let start = Instant::now();
        let result = f();
        self.note(format!("{what} in {:.1} s", start.elapsed().as_secs_f32()));
        result
    }

    /// The topology is not to be used by another case, nor looked at for what is left in it: for cases that change it.
    pub fn taint(&self) {
        self.tainted.store(true, Ordering::Relaxed);
    }

    /// An empty folder of manifests.
    pub fn manifests(&self) -> Result<Manifests> {
        Manifests::new(&self.dir.join("manifests"))
    }

    /// Writes the manifests and programs every node with them.
    pub fn apply(&self, topology: &Topology, manifests: &mut Manifests) -> Result<()> {
        self.apply_by(&*self.program, topology, manifests)
    }

    /// The same by another program.
    pub fn apply_by(&self, by: &dyn Program, topology: &Topology, manifests: &mut Manifests) -> Result<()> {
        manifests.write()?;
        let manifests = &*manifests;
        self.timed("programmed", || {
            all(topology.nodes.iter().map(|node| || self.apply_on_by(by, node, manifests)))
        })?;
        Ok(())
    }

    /// Programs one node with manifests that have been written.
    pub fn apply_on(&self, node: &Node, manifests: &Manifests) -> Result<()> {
        self.apply_on_by(&*self.program, node, manifests)
    }

    fn apply_on_by(&self, by: &dyn Program, node: &Node, manifests: &Manifests) -> Result<()> {
        self.will_clean(node);
        by.apply(node, manifests).with_context(|| format!("programming {}", node.name))
    }

    /// Has the runner clean this node up after the case. `apply` does it; a case that starts an agent does it itself.
    pub fn will_clean(&self, node: &Node) {
        lock(&self.touched).insert(node.index);
    }

    /// Takes everything of ours out of every node, now.
    pub fn cleanup(&self, topology: &Topology) -> Result<()> {
        let touched = std::mem::take(&mut *lock(&self.touched));
        all(topology.nodes.iter().filter(|n| touched.contains(&n.index)).map(|node| {
            || self.program.cleanup(node).with_context(|| format!("cleaning up {}", node.name))
        }))?;
        Ok(())
    }

    /// The real thing; skips the case when nodes are programmed by something else.
    pub fn meshlb(&self) -> Result<&Meshlb> {
        self.meshlb.as_ref().ok_or_else(|| Skip("needs meshlb, not the reference program".to_owned()).into())
    }

    /// The same with another renderer than the case's.
    pub fn meshlb_by(&self, renderer: Renderer) -> Result<Meshlb> {
        self.meshlb()?;
        Meshlb::new(&self.work, renderer)
    }

    /// Something to be shown if the case fails (or at once, with `--nocapture`).
    pub fn note(&self, text: impl fmt::Display) {
        if self.nocapture {
            println!("        {text}");
        }
        let mut notes = lock(&self.notes);
        notes.push_str(&text.to_string());
        notes.push('\n');
    }
}

/// The last probe of the case and the namespace it was sent from, for the packet trace.
static LAST_PROBE: Mutex<Option<(Arc<Netns>, Tally)>> = Mutex::new(None);

/// Remembers a probe.
pub fn saw(ns: &Arc<Netns>, tally: &Tally) {
    *lock(&LAST_PROBE) = Some((Arc::clone(ns), tally.clone()));
}

#[derive(Debug, Default)]
struct Args {
    filters: Vec<String>,
    skip: Vec<String>,
    exact: bool,
    list: bool,
    nocapture: bool,
}

impl Args {
    fn parse() -> Args {
        let mut args = Args::default();
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            match word.as_str() {
                "--list" => args.list = true,
                "--exact" => args.exact = true,
                "--nocapture" | "--show-output" => args.nocapture = true,
                "--skip" => args.skip.extend(words.next()),
                "--format" | "--test-threads" | "--color" | "--logfile" | "-Z" => drop(words.next()),
                flag if flag.starts_with('-') => {}
                "" => {}
                filter => args.filters.push(filter.to_owned()),
            }
        }
        args
    }

    fn takes(&self, name: &str) -> bool {
        let hit = |f: &String| if self.exact { name == f } else { name.contains(f.as_str()) };
        (self.filters.is_empty() || self.filters.iter().any(hit)) && !self.skip.iter().any(hit)
    }
}

enum Outcome {
    Passed,
    Skipped(String),
    Failed(String),
}

struct Session {
    work: PathBuf,
    out: PathBuf,
    pool: Pool,
    with_meshlb: bool,
    nocapture: bool,
}

/// The whole program.
pub fn main(suite: Suite) -> ExitCode {
    let args = Args::parse();
    let mut cases: Vec<Case> = suite.cases.into_iter().filter(|c| args.takes(&c.name)).collect();
    let full = std::env::var_os("MESHLB_KERNEL_FULL").is_some_and(|v| v == "1");
    if args.filters.is_empty() && !full {
        cases = one_flavour(cases);
    }
    if args.list {
        for case in &cases {
            println!("{}: test", case.name);
        }
        return ExitCode::SUCCESS;
    }
    if std::env::var_os("MESHLB_KERNEL").is_none_or(|v| v != "1") {
        println!(
            "kernel tests: {} cases not run: they need root and a kernel with IPVS, or a VM. tests/kernel/run.sh sees to it",
            cases.len()
        );
        return ExitCode::SUCCESS;
    }
    match run(&cases, args.nocapture) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            println!("kernel tests: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// Which cases a thin run takes of those that there are with several renderers: each day others (run.sh gives the day, so that
/// the VMs of one run agree, and says it).
fn turn() -> usize {
    std::env::var("MESHLB_KERNEL_TURN").ok().and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// Of cases that there are with both flavours of iptables one: which it is differs between families and protocols, so that each
/// flavour meets each of them somewhere, and from turn to turn. Of heavy cases one renderer, likewise. MESHLB_KERNEL_FULL=1 and
/// filters run all.
fn one_flavour(cases: Vec<Case>) -> Vec<Case> {
    let names: BTreeSet<String> = cases.iter().map(|c| c.name.clone()).collect();
    let wanted = |case: &Case| {
        if let Some(thin) = case.thin {
            return thin;
        }
        let renderer = case.params.renderer;
        let other = match renderer {
            Renderer::IptablesNft => Renderer::IptablesLegacy,
            Renderer::IptablesLegacy => Renderer::IptablesNft,
            Renderer::Nftables => return true,
        };
        let rest = case.name.replace(renderer.flag(), "");
        let twin = case.name.replace(renderer.flag(), other.flag());
        !names.contains(&twin) || twin == case.name || Matrix::flavour_in_turn(&rest, turn()) == renderer
    };
    cases.into_iter().filter(wanted).collect()
}

/// From so many cases on it is a run of all: in an hour of an emulated machine some packet or second is lost that is nobody's
/// fault. A case that fails is shown, tried again, and named at the end whatever comes of it.
const WHOLE_RUN: usize = 100;

/// How often a case that has failed must then pass: what is wrong for a moment only passes by itself most of the time.
const TRIES: usize = 3;

fn run(cases: &[Case], nocapture: bool) -> Result<bool> {
    if cases.is_empty() {
        bail!("no case has that name (--list shows them)");
    }
    if !nix::unistd::geteuid().is_root() {
        bail!("MESHLB_KERNEL=1 needs root");
    }
    load_modules()?;
    ns::remove(ns::IDLE_PREFIX);
    let work = std::env::temp_dir().join(format!("meshlb-kernel-{}", std::process::id()));
    let out = std::env::var_os("MESHLB_KERNEL_OUT")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("target/kernel-test"), PathBuf::from);
    fs::create_dir_all(&work)?;
    let with_meshlb = match std::env::var("MESHLB_KERNEL_PROGRAM").as_deref() {
        Ok("reference") => false,
        Ok("meshlb") => true,
        _ => program::has_apply(),
    };
    println!(
        "kernel tests: {} cases, kernel {}, nodes programmed by {}",
        cases.len(),
        fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
        if with_meshlb {
            program::binary().display().to_string()
        } else {
            "the reference program".to_owned()
        },
    );
    let session = Session { work, out, pool: Pool::default(), with_meshlb, nocapture };
    let (mut passed, mut skipped, mut failed, mut times) = (0, 0, Vec::new(), Vec::new());
    // With what was wrong at the first try.
    let mut second_try: Vec<(&str, String)> = Vec::new();
    let mut claims = Claims::new();
    let start = Instant::now();
    for case in cases {
        if !claims.take(&case.group)? {
            continue;
        }
        if nocapture {
            println!("      … {}", case.name);
        }
        let mut began = Instant::now();
        let mut outcome = session.run_case(case);
        if let (Outcome::Failed(why), true) = (&outcome, cases.len() >= WHOLE_RUN) {
            println!("again  {:5.1} s  {}\n{why}\n", began.elapsed().as_secs_f32(), case.name);
            second_try.push((case.name.as_str(), gist(why)));
            for _ in 0..TRIES {
                began = Instant::now();
                outcome = session.run_case(case);
                if !matches!(outcome, Outcome::Passed) {
                    break;
                }
            }
        }
        let took = began.elapsed().as_secs_f32();
        times.push((took, case.name.as_str()));
        match outcome {
            Outcome::Passed => {
                passed += 1;
                println!("ok     {took:5.1} s  {}", case.name);
            }
            Outcome::Skipped(why) => {
                skipped += 1;
                println!("skip             {}: {why}", case.name);
            }
            Outcome::Failed(why) => {
                failed.push((case.name.as_str(), gist(&why)));
                println!("FAILED {took:5.1} s  {}\n{why}\n", case.name);
            }
        }
        let _ = std::io::stdout().flush();
    }
    if let Err(e) = lock(&session.pool).retire() {
        println!("FAILED          the end: {e:#}");
        failed.push(("the end", String::new()));
    }
    *lock(&session.pool) = Kept::default();
    ns::remove_leftovers();
    ns::remove(ns::IDLE_PREFIX);
    let _ = fs::remove_dir_all(&session.work);
    times.sort_by(|a, b| b.0.total_cmp(&a.0));
    println!("\nslowest:");
    for (took, name) in times.iter().take(5) {
        println!("  {took:5.1} s  {name}");
    }
    if !second_try.is_empty() {
        println!("tried twice, since they failed at first (details above):");
        second_try.iter().for_each(|(name, why)| println!("  {name}\n{why}"));
    }
    if !failed.is_empty() {
        println!("failed (details above and in {}):", session.out.display());
        failed.iter().for_each(|(name, why)| println!("  {name}\n{why}"));
    }
    println!(
        "kernel tests: {passed} passed, {} failed, {skipped} skipped in {:.0} s, {} tried twice",
        failed.len(),
        start.elapsed().as_secs_f32(),
        second_try.len()
    );
    Ok(failed.is_empty())
}

/// Which groups of cases this machine runs: all, or, with a folder that several machines share (MESHLB_KERNEL_CLAIMS), those
/// that it is the first to make an entry for there.
struct Claims {
    folder: Option<PathBuf>,
    ours: BTreeSet<String>,
}

impl Claims {
    fn new() -> Self {
        let folder = std::env::var_os("MESHLB_KERNEL_CLAIMS").filter(|f| !f.is_empty()).map(PathBuf::from);
        Claims { folder, ours: BTreeSet::new() }
    }

    fn take(&mut self, group: &str) -> Result<bool> {
        let Some(folder) = &self.folder else { return Ok(true) };
        if self.ours.contains(group) {
            return Ok(true);
        }
        match fs::create_dir(folder.join(group)) {
            Ok(()) => Ok(self.ours.insert(group.to_owned())),
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(false),
            Err(e) => Err(e).with_context(|| format!("{}, which several machines share", folder.display())),
        }
    }
}

/// Loads what the kernel has of what the tests use.
pub fn load_modules() -> Result<()> {
    let modules = [
        "ip_vs",
        "ip_vs_rr",
        "ip_vs_wrr",
        "ip_vs_lc",
        "ip_vs_wlc",
        "ip_vs_sh",
        "ip_vs_mh",
        "nf_conntrack",
        "nf_nat",
        "nf_conntrack_netlink",
        "nf_tables",
        "nft_compat",
        // Loaded one by one when a rule asks for them, they can take half a minute on an emulated machine that has just begun.
        "nft_chain_nat",
        "nft_ct",
        "nft_fib_inet",
        "nft_masq",
        "nft_nat",
        "nft_reject_inet",
        "nft_socket",
        "xt_ipvs",
        "xt_set",
        "ip_set_hash_ipport",
        "ip_set_hash_ip",
        "ip_set_hash_netnet",
        "xt_MASQUERADE",
        "xt_mark",
        "xt_addrtype",
        "veth",
        "bridge",
        "br_netfilter",
        "dummy",
        "vxlan",
        "ipip",
        "wireguard",
        "sctp",
    ];
    let mut command = vec!["modprobe", "-a", "-q"];
    command.extend(modules);
    // What is built in or missing is found out by what fails.
    let _ = ns::run_here(&command, &[], "", ns::COMMAND_LIMIT);
    if !Path::new("/proc/net/ip_vs").exists() {
        bail!(
            "this kernel has no IPVS (no /proc/net/ip_vs after modprobe ip_vs); tests/kernel/run.sh boots one that has"
        );
    }
    Ok(())
}

impl Session {
    fn context(&self, case: &Case) -> Result<Cx> {
        let dir = self.work.join("case");
        let _ = fs::remove_dir_all(&dir);
        // What cases share has its state there, and cleanup needs it.
        if lock(&self.pool).shared.is_none() {
            let _ = fs::remove_dir_all(self.work.join("nodes"));
        }
        fs::create_dir_all(&dir)?;
        let renderer = case.params.renderer;
        let meshlb = if self.with_meshlb { Some(Meshlb::new(&self.work, renderer)?) } else { None };
        let program: Arc<dyn Program> = match &meshlb {
            Some(meshlb) => Arc::new(meshlb.clone()),
            None => Arc::new(Reference::new(&self.work, renderer)?),
        };
        Ok(Cx {
            params: case.params,
            dir,
            program,
            meshlb,
            pool: Arc::clone(&self.pool),
            work: self.work.clone(),
            touched: Arc::default(),
            tainted: Arc::default(),
            notes: Arc::default(),
            nocapture: self.nocapture,
        })
    }

    fn run_case(&self, case: &Case) -> Outcome {
        *lock(&LAST_PROBE) = None;
        let mut cx = match self.context(case) {
            Ok(cx) => cx,
            Err(e) => {
                return e
                    .downcast::<Skip>()
                    .map_or_else(|e| Outcome::Failed(format!("{e:#}")), |s| Outcome::Skipped(s.0));
            }
        };
        let (notes, tainted) = (Arc::clone(&cx.notes), Arc::clone(&cx.tainted));
        let (ended, wait) = mpsc::channel();
        let run = case.run;
        let spawned = thread::Builder::new().name(case.name.clone()).spawn(move || {
            let result = catch_unwind(AssertUnwindSafe(|| run(&mut cx)));
            let result =
                result.unwrap_or_else(|panic| Err(anyhow!("panicked: {}", panic_text(panic.as_ref()))));
            let _ = ended.send((result, cx));
        });
        if let Err(e) = spawned {
            return Outcome::Failed(format!("no thread: {e}"));
        }
        let limit = patience(case.limit);
        let (result, cx) = match wait.recv_timeout(limit) {
            Ok((result, cx)) => (result, Some(cx)),
            Err(_) => (Err(anyhow!("no end after {limit:?}")), None),
        };
        let result = result.and_then(|()| match &cx {
            Some(cx) => self.demand_clean(cx),
            None => Ok(()),
        });
        let outcome = match result {
            Ok(()) => Outcome::Passed,
            Err(e) => match e.downcast::<Skip>() {
                Ok(skip) => Outcome::Skipped(skip.0),
                Err(e) => Outcome::Failed(self.describe(case, &e, &lock(&notes).clone())),
            },
        };
        let overrun = cx.is_none();
        drop(cx);
        if !matches!(outcome, Outcome::Passed) || tainted.load(Ordering::Relaxed) {
            *lock(&self.pool) = Kept::default();
        }
        if overrun {
            // Ends the programs that the case's thread may be waiting for; the thread itself is left alone.
            ns::remove_leftovers();
            let _ = wait.recv_timeout(Duration::from_secs(5));
        }
        outcome
    }

    fn demand_clean(&self, cx: &Cx) -> Result<()> {
        let topology = {
            let kept = lock(&self.pool);
            let Some(topology) = kept.topology.clone() else { return Ok(()) };
            if kept.shared.is_some() || cx.tainted.load(Ordering::Relaxed) {
                return Ok(());
            }
            topology
        };
        cx.timed("cleaned up", || cx.cleanup(&topology))?;
        cx.timed("looked at", || check::nothing_left(&topology))
    }

    /// Everything a person needs to see why; all of it also goes to files.
    fn describe(&self, case: &Case, error: &anyhow::Error, notes: &str) -> String {
        let name: String = case
            .name
            .chars()
            .map(|c| if c.is_alphanumeric() || "-_".contains(c) { c } else { '.' })
            .collect();
        let out = self.out.join(name);
        let _ = fs::remove_dir_all(&out);
        let _ = fs::create_dir_all(&out);
        let error = format!("{error:#}");
        let _ = fs::write(out.join("error.txt"), &error);
        let mut text = section("error", &error, 200);
        if !notes.is_empty() {
            text.push_str(&section("notes", notes, 200));
        }
        let topology = self.pool.try_lock().ok().and_then(|kept| kept.topology.clone());
        if let Some(topology) = topology {
            let last = lock(&LAST_PROBE).take();
            if let Some((ns, tally)) = last {
                let trace = trace(&topology, &ns, &tally).unwrap_or_else(|e| format!("no trace: {e:#}"));
                let _ = fs::write(out.join("trace.txt"), &trace);
                text.push_str(&section(
                    &format!("trace of {} -> {} {}", tally.client, tally.probe.proto, tally.probe.dst),
                    &trace,
                    120,
                ));
            }
            let dumps =
                all(topology.nodes.iter().map(|n| || Ok((n.name.clone(), dump(n))))).unwrap_or_default();
            for (node, dump) in dumps {
                let full: String = dump.iter().map(|(what, text)| section(what, text, usize::MAX)).collect();
                let _ = fs::write(out.join(format!("{node}.txt")), full);
                for (what, body) in dump {
                    let body: String = body
                        .lines()
                        .filter(|l| {
                            !["fe80::", "ff00::", "broadcast", "anycast"].iter().any(|x| l.contains(x))
                        })
                        .map(|l| format!("{l}\n"))
                        .collect();
                    text.push_str(&section(&format!("{node}: {what}"), &body, 40));
                }
                let log = self.work.join("nodes").join(&node).join("agent.log");
                if let Ok(log) = fs::read_to_string(log) {
                    let _ = fs::write(out.join(format!("{node}-agent.log")), &log);
                    text.push_str(&section(
                        &format!("{node}: the end of the agent's log"),
                        &tail(&log, 60),
                        60,
                    ));
                }
            }
        }
        let manifests = self.work.join("case/manifests");
        if let Ok(files) = fs::read_dir(&manifests) {
            for file in files.flatten() {
                let _ = fs::copy(file.path(), out.join(file.file_name()));
            }
        }
        let _ = fs::write(out.join("failure.txt"), &text);
        text
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_else(|| "?".to_owned())
}

/// The error's first lines out of what [`Session::describe`] wrote.
fn gist(described: &str) -> String {
    let error = described.lines().skip_while(|l| l.starts_with("  ---"));
    let lines = error.take_while(|l| !l.starts_with("  ---")).take(4);
    lines
        .map(|l| format!("  {}\n", l.chars().take(300).collect::<String>()))
        .collect::<String>()
        .trim_end()
        .to_owned()
}

fn section(title: &str, body: &str, limit: usize) -> String {
    let body = body.trim_end();
    if body.is_empty() {
        return String::new();
    }
    let all = body.lines().count();
    let mut text = format!("  --- {title}\n");
    for line in body.lines().take(limit) {
        text.push_str("    ");
        text.push_str(line);
        text.push('\n');
    }
    if all > limit {
        text.push_str(&format!("    … {} more lines, in the files\n", all - limit));
    }
    text
}

fn tail(text: &str, n: usize) -> String {
    let skip = text.lines().count().saturating_sub(n);
    text.lines().skip(skip).collect::<Vec<_>>().join("\n")
}

/// The tables of a node. Those with nothing in them are left out.
fn dump(node: &Node) -> Vec<(String, String)> {
    let commands: [&[&str]; 14] = [
        &["iptables-nft-save", "-c"],
        &["ip6tables-nft-save", "-c"],
        &["iptables-legacy-save", "-c"],
        &["ip6tables-legacy-save", "-c"],
        &["nft", "list", "ruleset"],
        &["ipset", "list"],
        &["ipvsadm", "-Ln", "--stats"],
        &["ipvsadm", "-Lnc"],
        &["ip", "-br", "addr"],
        &["ip", "rule"],
        &["ip", "route", "show", "table", "all"],
        &["ip", "-6", "route", "show", "table", "all"],
        &["conntrack", "-L"],
        &["conntrack", "-L", "-f", "ipv6"],
    ];
    let mut out = Vec::new();
    for command in commands {
        let legacy = command.first().is_some_and(|c| c.contains("-legacy-"));
        let names = if command.first().is_some_and(|c| c.starts_with("ip6")) {
            "ip6_tables_names"
        } else {
            "ip_tables_names"
        };
        if legacy && !node.ns.proc_net(names).is_ok_and(|t| !t.trim().is_empty()) {
            continue;
        }
        let text = match node.run(command) {
            Ok(output) if output.status == 0 => output.stdout,
            Ok(output) => output.to_string(),
            Err(e) => format!("{e:#}"),
        };
        out.push((command.join(" "), text));
    }
    out
}

/// Sends the probe once more, with nf_tables' packet trace switched on for its destination on every node. (Chains of
/// iptables-legacy are not nf_tables and do not show.)
fn trace(topology: &Topology, ns: &Netns, tally: &Tally) -> Result<String> {
    let dst = tally.probe.dst;
    let f = if dst.is_ipv4() { "ip" } else { "ip6" };
    let (ip, port, proto) = (dst.ip(), dst.port(), tally.probe.proto);
    let rule = format!("{f} daddr {ip} {proto} dport {port} meta nftrace set 1");
    let table = format!(
        "table {f} mlbtrace {{\n chain pre {{ type filter hook prerouting priority -400; policy accept; {rule}\n }}\n \
         chain out {{ type filter hook output priority -400; policy accept; {rule}\n }}\n}}\n"
    );
    let mut monitors = Vec::new();
    for node in &topology.nodes {
        node.ns.run_with(&["nft", "-f", "-"], &table, ns::COMMAND_LIMIT)?.ok()?;
        let log = node.dir.join("trace.log");
        fs::create_dir_all(&node.dir)?;
        let _ = fs::remove_file(&log);
        monitors.push((node, node.ns.spawn(&["nft", "monitor", "trace"], &[], &log)?, log));
    }
    thread::sleep(Duration::from_millis(700));
    let probe = Probe { n: 1, ..tally.probe.clone() };
    let again = probe.run(ns)?;
    thread::sleep(Duration::from_millis(500));
    let mut text = format!("once more: {again}\n");
    for (node, mut child, log) in monitors {
        let _ = child.kill();
        let _ = child.wait();
        let lines = fs::read_to_string(log).unwrap_or_default();
        if !lines.trim().is_empty() {
            text.push_str(&format!("on {}:\n{lines}", node.name));
        }
        let _ = node.run(&["nft", "delete", "table", f, "mlbtrace"]);
    }
    Ok(text)
}
