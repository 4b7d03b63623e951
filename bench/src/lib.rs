//! What the bench programs share: a mock provider, a plain reverse proxy to compare with, a raw HTTP client that knows when an answer has
//! ended, and the handling of the processes under test. Nothing here is part of the product, and everything stays on 127.0.0.1.

pub mod audit;
pub mod clock;
pub mod disk;
pub mod driver;
pub mod histogram;
pub mod load;
pub mod mock;
pub mod month;
pub mod peers;
pub mod plain;
pub mod process;
pub mod text;
pub mod wire;
