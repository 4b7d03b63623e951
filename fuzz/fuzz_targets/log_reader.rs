//! Any bytes as a write-ahead log.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = store::log::read_frames(data);
});
