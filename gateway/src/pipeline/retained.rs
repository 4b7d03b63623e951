//! Request bodies that are kept after they were sent: for another try, and to count what an upstream does not report.
//!
//! All of them together are bounded. A request whose body finds no room is sent all the same, once.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;

/// What all kept bodies take together.
#[derive(Debug, Default)]
pub(crate) struct Room {
    bytes: AtomicUsize,
}

/// A body that has its place in the room until nobody needs it.
#[derive(Debug)]
pub(crate) struct Kept {
    bytes: Bytes,
    room: Arc<Room>,
}

/// The body of a request that is being tried.
#[derive(Debug, Clone)]
pub(crate) enum RequestBody {
    /// It can be sent again and looked at later.
    Kept(Arc<Kept>),
    /// It can be sent once.
    Once(Bytes),
}

impl Room {
    /// Keeps `bytes` if all kept bodies together stay within `bytes_max`.
    pub fn keep(self: &Arc<Room>, bytes: Bytes, bytes_max: usize) -> RequestBody {
        let taken = self.bytes.try_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
            used.checked_add(bytes.len()).filter(|&used| used <= bytes_max)
        });
        if taken.is_err() {
            return RequestBody::Once(bytes);
        }
        RequestBody::Kept(Arc::new(Kept { bytes, room: Arc::clone(self) }))
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.room.bytes.fetch_sub(self.bytes.len(), Ordering::Relaxed);
    }
}

impl Kept {
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }
}

impl RequestBody {
    pub fn bytes(&self) -> &Bytes {
        match self {
            RequestBody::Kept(kept) => kept.bytes(),
            RequestBody::Once(bytes) => bytes,
        }
    }

    /// The body for one try. One that can be sent only once is gone from here afterwards.
    pub fn take(&mut self) -> Bytes {
        match self {
            RequestBody::Kept(kept) => kept.bytes.clone(),
            RequestBody::Once(bytes) => std::mem::take(bytes),
        }
    }

    pub fn is_kept(&self) -> bool {
        matches!(self, RequestBody::Kept(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_bounded_and_given_back() {
        let room = Arc::new(Room::default());
        let keep = |bytes: usize| room.keep(Bytes::from(vec![0; bytes]), 100);
        let (first, mut second) = (keep(60), keep(41));
        assert!(first.is_kept() && !second.is_kept());
        assert_eq!((second.take().len(), second.take().len()), (41, 0), "once");
        let mut third = keep(40);
        assert_eq!((third.take().len(), third.take().len(), keep(1).is_kept()), (40, 40, false));
        drop((first, third));
        assert_eq!(room.bytes.load(Ordering::Relaxed), 0);
        assert!(keep(100).is_kept());
    }
}
