//! Many at once.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use ipvs_netlink::{
    AddressFamily, Client, Command, DestinationConfig, Error, Options, ServiceConfig, ServiceId,
};

use super::*;

#[test]
#[ignore = "needs root and ip_vs; also MESHLB_KERNEL_TESTS=1"]
fn large_batches_and_dumps_are_whole() {
    let _guard = namespace();
    // The smallest buffer makes for single commands, the usual one for batches of 128.
    for (receive_buffer, count) in [(1 << 20, 5_000), (16 << 10, 1_000), (0, 200)] {
        let mut client = Client::open_with(Options { receive_buffer, ..Options::default() }).unwrap();
        let services: Vec<ServiceId> =
            (1..=count).map(|i| if i % 2 == 0 { mark(i) } else { mark6(i) }).collect();
        let commands: Vec<Command> =
            services.iter().map(|id| Command::AddService(*id, ServiceConfig::new("rr"))).collect();
        let start = Instant::now();
        let results = client.batch(&commands);
        eprintln!("{count} services with buffer {receive_buffer}: {:?}", start.elapsed());
        assert_eq!(results.len(), commands.len());
        assert!(results.iter().all(Result::is_ok));
        assert_eq!(client.writes(), u64::from(count));

        // Every third is there twice, every fourth is not to be found.
        let mixed: Vec<Command> = services
            .iter()
            .enumerate()
            .map(|(i, id)| match i % 4 {
                0 => Command::AddService(*id, ServiceConfig::new("rr")),
                1 => Command::DelDestination(*id, to("10.0.0.1", 1)),
                2 if id.family() == AddressFamily::Inet => {
                    Command::AddDestination(*id, to("10.0.0.1", 1), DestinationConfig::masquerade(1))
                }
                _ => Command::AddDestination(*id, to("fd00::1", 1), DestinationConfig::masquerade(1)),
            })
            .collect();
        for (i, (command, result)) in mixed.iter().zip(client.batch(&mixed)).enumerate() {
            let object = command.object();
            match (command, result) {
                (Command::AddService(..), Err(Error::AlreadyExists { object: o })) => assert_eq!(o, object),
                (Command::DelDestination(..), Err(Error::NotFound { object: o })) => assert_eq!(o, object),
                (Command::AddDestination(service, id, _), result) => {
                    let fits = service.family() == AddressFamily::of(id.addr);
                    match result {
                        Ok(()) if fits => {}
                        Err(Error::FamilyMismatch { service: s, .. }) if !fits => assert_eq!(s, *service),
                        other => panic!("{i}: {other:?}"),
                    }
                }
                other => panic!("{i}: {other:?}"),
            }
        }

        let start = Instant::now();
        let mut dump: Vec<ServiceId> =
            client.services().unwrap().into_iter().map(|service| service.id).collect();
        eprintln!("dump of {count}: {:?}", start.elapsed());
        let mut expected = services.clone();
        dump.sort();
        expected.sort();
        assert_eq!(dump, expected);
        assert_eq!(run("ipvsadm -Ln | grep -c ^FWM").trim(), count.to_string());
        let mut seen = 0;
        client.for_each_service(|_| seen += 1).unwrap();
        assert_eq!(seen, count);
        client.execute(&Command::Flush).unwrap();
    }
}

/// Another writer at work: what a dump of this kernel says then.
#[test]
#[ignore = "needs root and ip_vs; also MESHLB_KERNEL_TESTS=1"]
fn a_dump_under_change_comes_to_its_end() {
    let _guard = namespace();
    let mut client = Client::open().unwrap();
    let steady: Vec<ServiceId> = (1..=3000).map(mark).collect();
    let commands: Vec<Command> =
        steady.iter().map(|id| Command::AddService(*id, ServiceConfig::new("rr"))).collect();
    assert!(client.batch(&commands).iter().all(Result::is_ok));

    // It writes to the same table, as its socket was opened here.
    let mut other = Client::open().unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let writer = std::thread::spawn(move || {
        while !stopped.load(Ordering::Relaxed) {
            let add = (5000..5100).map(|i| Command::AddService(mark(i), ServiceConfig::new("rr")));
            let delete = (5000..5100).map(|i| Command::DelService(mark(i)));
            let results = other.batch(&add.chain(delete).collect::<Vec<_>>());
            assert!(results.iter().all(Result::is_ok));
        }
    });
    let (mut missing, mut twice, mut interrupted) = (0, 0, 0);
    for _ in 0..10 {
        let mut seen = HashMap::new();
        match client.for_each_service(|service| *seen.entry(service.id).or_insert(0) += 1) {
            Err(Error::DumpInterrupted { .. }) => interrupted += 1,
            other => other.unwrap(),
        }
        missing += steady.iter().filter(|id| !seen.contains_key(id)).count();
        twice += seen.values().filter(|count| **count > 1).count();
    }
    stop.store(true, Ordering::Relaxed);
    writer.join().unwrap();
    eprintln!("10 dumps of 3000 under change: {missing} missing, {twice} twice, {interrupted} interrupted");
    assert_eq!(client.services().unwrap().len(), 3000);
}

#[test]
#[ignore = "needs root and ip_vs; also MESHLB_KERNEL_TESTS=1"]
fn many_destinations_of_one_service_are_read() {
    let _guard = namespace();
    let mut client = Client::open().unwrap();
    client.execute(&Command::AddService(mark6(9), ServiceConfig::new("wrr"))).unwrap();
    let commands: Vec<Command> = (1..=3000u16)
        .map(|i| Command::AddDestination(mark6(9), to("fd00::1", i), DestinationConfig::masquerade(i.into())))
        .collect();
    assert!(client.batch(&commands).iter().all(Result::is_ok));
    let mut ports: Vec<u16> = client
        .destinations(&mark6(9))
        .unwrap()
        .into_iter()
        .inspect(|d| assert_eq!(d.config.weight, i32::from(d.id.port)))
        .map(|d| d.id.port)
        .collect();
    ports.sort_unstable();
    assert_eq!(ports, (1..=3000).collect::<Vec<u16>>());
}
