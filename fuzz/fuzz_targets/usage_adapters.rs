//! Any bytes as a usage object, an answer and a request, for every provider.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| gateway::meter::exercise::usage_adapters(data));
