//! The services that are served.

use std::{fmt::Write as _, fs, net::Ipv4Addr, path::Path};

use anyhow::Result;

/// The zone of their names.
pub const ZONE: &str = "mesh.internal";

fn part(value: u32) -> u8 {
    u8::try_from(value % 256).unwrap_or_default()
}

/// The virtual IP of service `n`, of 10.200.0.0/14.
pub fn vip(n: u32) -> Ipv4Addr {
    let n = n + 256;
    Ipv4Addr::new(10, 200 + part(n >> 16), part(n >> 8), part(n))
}

/// Its name.
pub fn name(n: u32) -> String {
    format!("s{n:05}.default.{ZONE}")
}

/// Writes a file in one step, as editors and the kubelet do.
pub fn write(dir: &Path, file: &str, text: &str) -> Result<()> {
    let hidden = dir.join(format!(".{file}.new"));
    fs::write(&hidden, text)?;
    fs::rename(hidden, dir.join(file))?;
    Ok(())
}

/// Services with virtual IPs.
pub fn write_all(dir: &Path, count: u32) -> Result<()> {
    fs::create_dir_all(dir)?;
    for n in 0..count {
        let mut text = format!(
            "apiVersion: meshlb.dev/v1alpha1\nkind: MeshService\nmetadata: {{name: s{n:05}}}\nspec:\n  vips: [{}]\n  \
             ports: [{{name: http, port: 80, targetPort: 8080}}]\n---\n",
            vip(n)
        );
        text += &slice(&format!("s{n:05}"), (0..5).map(|e| address(n, e)));
        write(dir, &format!("s{n:05}.yaml"), &text)?;
    }
    Ok(())
}

/// Address `generation` of service `n`, of 10.0.0.0/10: at most 1,024 services with 4,096 addresses each, or more services
/// with fewer.
pub fn address(n: u32, generation: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x0a00_0000 | (n << 12 & 0x3f_f000) | (generation & 0xfff))
}

/// The service and the generation of an address.
pub fn read(address: Ipv4Addr) -> (u32, u32) {
    let bits = u32::from(address);
    (bits >> 12 & 0x3ff, bits & 0xfff)
}

/// A service in round-robin mode.
pub fn round_robin(n: u32) -> String {
    format!(
        "apiVersion: meshlb.dev/v1alpha1\nkind: MeshService\nmetadata: {{name: s{n:05}}}\nspec:\n  mode: DNSRR\n  \
         ports: [{{name: http, port: 80, targetPort: 8080}}]\n"
    )
}

/// Its endpoints.
pub fn slice(name: &str, addresses: impl Iterator<Item = Ipv4Addr>) -> String {
    let mut out = format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: {name}-1, labels: {{kubernetes.io/service-name: {name}}}}}\n\
         addressType: IPv4\nports: [{{name: http, port: 8080, protocol: TCP}}]\nendpoints:\n"
    );
    for address in addresses {
        let _ = writeln!(out, "- {{addresses: [{address}], nodeName: n1, conditions: {{ready: true}}}}");
    }
    out
}
