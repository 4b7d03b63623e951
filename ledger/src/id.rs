//! Identifiers, each its own type. Request ids are UUIDv7, so their order is the order of time.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::{Builder, Uuid};

use crate::time::Timestamp;

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(Uuid);

        impl $name {
            /// A UUIDv7 of this moment. The random bits come from the caller, this crate has none.
            #[must_use]
            pub fn new(at: Timestamp, random: [u8; 10]) -> Self {
                let millis = u64::try_from(at.micros().div_euclid(1_000)).unwrap_or(0);
                Self(Builder::from_unix_timestamp_millis(millis, &random).into_uuid())
            }

            /// Wraps an existing UUID.
            #[must_use]
            pub const fn from_uuid(uuid: Uuid) -> Self {
                Self(uuid)
            }

            /// The UUID as it is.
            #[must_use]
            pub const fn uuid(self) -> Uuid {
                self.0
            }

            /// The moment in the id, to the millisecond. The epoch when the id is no UUIDv7.
            #[must_use]
            pub fn at(self) -> Timestamp {
                let (seconds, nanos) = self.0.get_timestamp().map_or((0, 0), |at| at.to_unix());
                Timestamp::from_micros(i64::try_from(seconds).unwrap_or(0) * 1_000_000 + i64::from(nanos) / 1_000)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl FromStr for $name {
            type Err = uuid::Error;
            fn from_str(text: &str) -> Result<Self, uuid::Error> {
                Uuid::parse_str(text).map(Self)
            }
        }
    };
}

uuid_id!(
    /// What a consumer asked once, however many attempts it took.
    RequestId
);
uuid_id!(
    /// One row of the postings.
    PostingId
);
uuid_id!(
    /// A virtual key. Public; the key itself is known only to its holder.
    KeyId
);

/// One try at an upstream on behalf of a request. Attempts count from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AttemptId {
    /// The request this try belongs to.
    pub request: RequestId,
    /// 0 for the first try, 1 for the first retry or fallback, and so on.
    pub number: u16,
}

impl fmt::Display for AttemptId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{}", self.request, self.number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_sort_by_time_and_give_it_back() {
        let early = RequestId::new(Timestamp::from_micros(1_700_000_000_123_000), [0xff; 10]);
        let late = RequestId::new(Timestamp::from_micros(1_700_000_000_124_000), [0; 10]);
        assert!(early < late);
        assert_eq!(early.at().micros(), 1_700_000_000_123_000);
        assert_eq!(early.to_string().parse::<RequestId>().expect("an id"), early);
    }
}
