//! The usual `process_*` series, from /proc.

use std::fs;

use nix::unistd::{SysconfVar, sysconf};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
    registry::Unit,
};

/// Reads /proc/self at each scrape. What can't be read is left out.
#[derive(Debug)]
pub(super) struct Process;

struct Numbers {
    cpu_seconds: f64,
    start_seconds: Option<f64>,
    threads: u64,
    virtual_bytes: u64,
    resident_bytes: u64,
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let Some(now) = numbers() else { return Ok(()) };
        let cpu = ConstCounter::new(now.cpu_seconds);
        let help = "User and system CPU time spent.";
        cpu.encode(encoder.encode_descriptor(
            "process_cpu",
            help,
            Some(&Unit::Seconds),
            cpu.metric_type(),
        )?)?;
        if let Some(start) = now.start_seconds {
            let start = ConstGauge::new(start);
            let help = "Start time of the process since the Unix epoch.";
            let unit = Some(&Unit::Seconds);
            let name = "process_start_time";
            start.encode(encoder.encode_descriptor(name, help, unit, start.metric_type())?)?;
        }
        for (name, help, bytes) in [
            ("process_virtual_memory", "Virtual memory size.", now.virtual_bytes),
            ("process_resident_memory", "Resident memory size.", now.resident_bytes),
        ] {
            let gauge = ConstGauge::new(bytes);
            gauge.encode(encoder.encode_descriptor(
                name,
                help,
                Some(&Unit::Bytes),
                gauge.metric_type(),
            )?)?;
        }
        let threads = ConstGauge::new(now.threads);
        let help = "Threads of the process.";
        threads.encode(encoder.encode_descriptor("process_threads", help, None, threads.metric_type())?)?;
        if let Ok(fds) = fs::read_dir("/proc/self/fd") {
            let fds = ConstGauge::new(fds.count() as u64);
            let help = "Open file descriptors.";
            fds.encode(encoder.encode_descriptor("process_open_fds", help, None, fds.metric_type())?)?;
        }
        Ok(())
    }
}

fn numbers() -> Option<Numbers> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    let boot = fs::read_to_string("/proc/stat")
        .ok()
        .and_then(|s| s.lines().find_map(|l| l.strip_prefix("btime ")?.trim().parse().ok()));
    parse(&stat, boot, constant(SysconfVar::CLK_TCK)?, constant(SysconfVar::PAGE_SIZE)?)
}

fn constant(of: SysconfVar) -> Option<u64> {
    sysconf(of).ok().flatten().and_then(|v| u64::try_from(v).ok()).filter(|v| *v > 0)
}

/// /proc/PID/stat (proc_pid_stat(5)): fields from the third on follow the name in parentheses, which can
/// hold anything. `boot` is in seconds since the epoch.
fn parse(stat: &str, boot: Option<u64>, ticks_per_second: u64, page_bytes: u64) -> Option<Numbers> {
    let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split_ascii_whitespace().collect();
    // `n` as in the manual page.
    let field = |n: usize| fields.get(n - 3)?.parse::<u64>().ok();
    let seconds = |ticks: u64| ticks as f64 / ticks_per_second as f64;
    Some(Numbers {
        cpu_seconds: seconds(field(14)? + field(15)?),
        start_seconds: boot.and_then(|b| Some(b as f64 + seconds(field(22)?))),
        threads: field(20)?,
        virtual_bytes: field(23)?,
        resident_bytes: field(24)? * page_bytes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_is_read_behind_any_name() {
        let stat = "42 (a) b) S 1 42 42 0 -1 4194560 500 0 0 0 250 50 0 0 20 0 7 0 1000 10000000 300 \
                    18446744073709551615 1 1";
        let now = parse(stat, Some(1_700_000_000), 100, 4096).unwrap();
        assert_eq!(now.cpu_seconds, 3.0);
        assert_eq!(now.start_seconds, Some(1_700_000_010.0));
        assert_eq!((now.threads, now.virtual_bytes, now.resident_bytes), (7, 10_000_000, 1_228_800));
        assert!(parse("42 (a) S 1", None, 100, 4096).is_none());
        assert!(numbers().is_some());
    }
}
