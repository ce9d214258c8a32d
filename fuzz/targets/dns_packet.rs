//! A packet of a client, for the DNS server.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| meshlb::dns::fuzzing::packet(bytes));
