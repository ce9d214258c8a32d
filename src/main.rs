//! The `meshlb` binary.
fn main() {}
