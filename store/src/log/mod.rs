//! The write-ahead log: segments of checksummed frames on local disk. What was acknowledged is in here first.

pub mod frame;
pub mod reader;
pub(crate) mod segment;
pub(crate) mod sync;
pub mod writer;

pub use frame::{Damage, Frames, Position, read_frames};
