//! The two text formats of Prometheus.
//!
//! The client library writes OpenMetrics. `promtool check metrics`, older scrapers and people with curl
//! expect the older format, version 0.0.4, whose metadata lines name the series themselves.

/// `Content-Type` of OpenMetrics.
pub(super) const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// `Content-Type` of the older format.
pub(super) const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// OpenMetrics to text format 0.0.4.
///
/// - a counter's metadata gets the `_total` that its samples have,
/// - an info becomes a gauge with its `_info`,
/// - units and the end mark, which the older format doesn't know, go.
pub(super) fn to_text(openmetrics: &str) -> String {
    let mut out = String::with_capacity(openmetrics.len());
    // A HELP line comes before the TYPE line that decides on its name.
    let mut help = None;
    for line in openmetrics.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ');
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|r| r.split_once(' ')) {
            let (suffix, kind) = match kind {
                "counter" => ("_total", kind),
                "info" => ("_info", "gauge"),
                "unknown" => ("", "untyped"),
                _ => ("", kind),
            };
            if let Some((_, text)) = help.take().filter(|(of, _)| *of == name) {
                out.push_str(&format!("# HELP {name}{suffix} {text}\n"));
            }
            out.push_str(&format!("# TYPE {name}{suffix} {kind}\n"));
        } else if !line.starts_with('#') {
            out.push_str(line);
            out.push('\n');
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_names_the_series() {
        let openmetrics = "\
# HELP a_bytes Bytes.
# TYPE a_bytes counter
# UNIT a_bytes bytes
a_bytes_total{x=\"# TYPE y counter\"} 3
# HELP b Build.
# TYPE b info
b_info{v=\"1\"} 1
# HELP c Now.
# TYPE c gauge
c 4
# EOF
";
        let text = "\
# HELP a_bytes_total Bytes.
# TYPE a_bytes_total counter
a_bytes_total{x=\"# TYPE y counter\"} 3
# HELP b_info Build.
# TYPE b_info gauge
b_info{v=\"1\"} 1
# HELP c Now.
# TYPE c gauge
c 4
";
        assert_eq!(to_text(openmetrics), text);
    }
}
