//! The way of facts into the ledger for everything but the gateway: telemetry, the API, spans.

use ledger::Fact;
use store::{Store, StoreError};

use crate::settlement::Late;

/// Appends facts to the log. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Facts {
    store: Store,
    late: Late,
}

impl Facts {
    /// Facts for this ledger. `late` hears of each, should it speak of time that is settled.
    #[must_use]
    pub fn new(store: Store, late: Late) -> Facts {
        Facts { store, late }
    }

    /// Appends all of them, or none.
    ///
    /// # Errors
    /// When the log cannot be written.
    pub fn append(&self, facts: &[Fact]) -> Result<(), StoreError> {
        if !facts.is_empty() {
            self.store.append_all(facts)?;
            facts.iter().for_each(|fact| self.late.note(fact));
        }
        Ok(())
    }
}
