//! Makes Rust of `proto/`. The compiler is a library, so that nothing has to be installed.

use std::error::Error;
use std::io::{Write, stdout};

fn main() -> Result<(), Box<dyn Error>> {
    writeln!(stdout(), "cargo::rerun-if-changed=proto\ncargo::rerun-if-changed=build.rs")?;
    let contract = protox::compile(["proto/externalscaler.proto"], ["proto"])?;
    // Without a transport: tonic's own would bring a second HTTP stack, and the listener here is the one that spans have too.
    tonic_prost_build::configure().build_transport(false).compile_fds(contract)?;
    Ok(())
}
