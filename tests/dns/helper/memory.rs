//! What the names alone take.

use std::{collections::HashMap, path::Path, sync::Arc};

use anyhow::{Context as _, Result};
use meshlb::{
    compile::endpoints::Place,
    dns::{
        names::Names,
        records::{Context, ServiceNames},
        zone::Zone,
    },
    model::{endpoints::Slice, ids::PerFamily},
    source,
};

/// So many copies are made: what one takes is what each further one adds, whatever the allocator still had.
const COPIES: u32 = 4;

/// Prints MiB.
pub fn run(dir: &Path) -> Result<()> {
    let loaded = source::load(dir, None).map_err(|problem| anyhow::anyhow!("{problem}"))?;
    let zone = Zone::new("mesh.internal", PerFamily::default()).map_err(anyhow::Error::msg)?;
    let mut slices: HashMap<&str, Vec<Arc<Slice>>> = HashMap::new();
    for slice in loaded.slices.values() {
        slices.entry(&slice.service_name).or_default().push(slice.clone());
    }
    let build = || {
        let mut names = Names::new(zone.clone());
        for service in loaded.services.values() {
            let slices = slices.get(&*service.service_name).map_or(&[][..], |of| of);
            let mut vips = PerFamily::default();
            vips.v4 = service.vips.first().copied();
            let context = Context { place: Place { node: "n1", zone: None }, vips };
            names.set(&service.key, Some(ServiceNames::new(service, slices, context, None)));
        }
        names
    };
    let mut copies = vec![build()];
    let before = resident()?;
    copies.extend((0..COPIES).map(|_| build()));
    println!("{:.1}", (resident()? - before) / f64::from(COPIES));
    drop(copies);
    Ok(())
}

/// Resident memory of this process, in MiB (proc(5), `VmRSS`).
fn resident() -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib / 1024.0)
}
