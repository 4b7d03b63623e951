//! Any bytes as a streamed answer, cut anywhere.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| gateway::meter::exercise::sse_meter(data));
