//! Times adding, reading and deleting: `bench SERVICES DESTINATIONS`. Needs root, and a network namespace whose
//! IPVS table is empty; leaves it empty.

use std::error::Error;
use std::net::Ipv4Addr;
use std::time::Instant;

use ipvs_netlink::{
    AddressFamily, Client, Command, DestinationConfig, DestinationId, ServiceConfig, ServiceId,
};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1).map(|argument| argument.parse::<u32>());
    let services = arguments.next().transpose()?.unwrap_or(2000);
    let destinations = arguments.next().transpose()?.unwrap_or(5);

    let mut client = Client::open()?;
    if !client.services()?.is_empty() {
        return Err("the IPVS table is not empty; try `ip netns exec`".into());
    }
    let ids: Vec<ServiceId> =
        (1..=services).map(|mark| ServiceId::fwmark(AddressFamily::Inet, mark)).collect();
    let mut commands = Vec::new();
    for (i, id) in (0u32..).zip(&ids) {
        commands.push(Command::AddService(*id, ServiceConfig::new("rr")));
        for j in 0..destinations {
            let addr = Ipv4Addr::from(0x0a40_0000 + i * 8 + j);
            let destination = DestinationId::new(addr.into(), 8080);
            commands.push(Command::AddDestination(*id, destination, DestinationConfig::masquerade(1)));
        }
    }

    let start = Instant::now();
    let refused = client.batch(&commands).into_iter().filter(Result::is_err).count();
    println!("batch of {} commands: {:?}, {refused} refused", commands.len(), start.elapsed());

    let start = Instant::now();
    let read = client.services()?.len();
    println!("dump of {read} services: {:?}", start.elapsed());

    let start = Instant::now();
    let mut read = 0;
    for id in &ids {
        read += client.destinations(id)?.len();
    }
    println!("dumps of {read} destinations, one for each service: {:?}", start.elapsed());

    let start = Instant::now();
    for id in ids.iter().take(1000) {
        client.execute(&Command::SetService(*id, ServiceConfig::new("rr")))?;
    }
    println!("{} commands one by one: {:?}", ids.len().min(1000), start.elapsed());

    let start = Instant::now();
    client.execute(&Command::Flush)?;
    println!("flush: {:?}", start.elapsed());
    Ok(())
}
