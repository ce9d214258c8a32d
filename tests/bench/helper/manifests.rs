//! The services that are served.

use std::{fmt::Write as _, net::Ipv4Addr};

/// Address of an endpoint; the sixth of a service stands in for its fifth now and then.
fn address(service: u32, endpoint: u32) -> Ipv4Addr {
    let n = service * 6 + endpoint;
    let part = |value: u32| u8::try_from(value).unwrap_or(u8::MAX);
    Ipv4Addr::new(10, part(100 + n / 62_500), part(n / 250 % 250), part(n % 250 + 1))
}

/// A service and its slice: five endpoints, the first on this node. Every tenth service is published. Nothing is drained, so
/// that a change is over when it is in the kernel.
pub fn text(service: u32, last: u32) -> String {
    let publish = if service.is_multiple_of(10) && service < 20_000 {
        format!(", publish: {{port: {}}}", 30_000 + service / 10)
    } else {
        String::new()
    };
    let mut out = format!(
        "apiVersion: meshlb.dev/v1alpha1\nkind: MeshService\nmetadata: {{name: s{service:05}}}\nspec:\n  \
         drain: {{timeoutSeconds: 0}}\n  ports:\n  - {{name: http, port: 80, targetPort: 8080{publish}}}\n---\n\
         apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: s{service:05}-1, labels: {{kubernetes.io/service-name: s{service:05}}}}}\n\
         addressType: IPv4\nports: [{{name: http, port: 8080, protocol: TCP}}]\nendpoints:\n"
    );
    for endpoint in 0..5 {
        let n = if endpoint == 4 { last } else { endpoint };
        let _ = writeln!(
            out,
            "- {{addresses: [{}], nodeName: n{}, conditions: {{ready: true}}}}",
            address(service, n),
            endpoint + 1
        );
    }
    out
}
