//! What an upstream answers.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| meshlb::dns::fuzzing::upstream(bytes));
