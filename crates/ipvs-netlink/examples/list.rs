//! Prints the table as `ipvsadm -Ln` does, in short. Needs root.

use ipvs_netlink::{Client, Error};

fn main() -> Result<(), Error> {
    let mut client = Client::open()?;
    let info = client.info()?;
    println!("IPVS {}, {} buckets", info.version, info.connection_table_size);
    for service in client.services()? {
        println!("{} {} flags {}", service.id, service.config.scheduler, service.flags);
        for destination in client.destinations(&service.id)? {
            let config = destination.config;
            println!(
                "  -> {} {:?} weight {} active {} inactive {} connections {}",
                destination.id,
                config.forwarding,
                config.weight,
                destination.active,
                destination.inactive,
                destination.stats.connections,
            );
        }
    }
    Ok(())
}
