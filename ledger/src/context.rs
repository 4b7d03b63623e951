//! Who caused a request: the dimensions every cost can be grouped by.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::id::KeyId;

/// A short shared text: a name, never a prompt. Cheap to clone from a key into every row it causes.
pub type Label = Arc<str>;

/// Longest label that is kept; edges cut what is longer, so that no client can grow the ledger at will.
pub const LABEL_BYTES_MAX: usize = 256;

/// The attribution of a request. Fields that nobody set are `None`, which reports show as unattributed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Context {
    /// Who caused it: the holder of the key.
    pub consumer: Option<Label>,
    /// The virtual key used.
    pub key_id: Option<KeyId>,
    /// The application that called.
    pub application: Option<Label>,
    /// The team that owns the application.
    pub team: Option<Label>,
    /// Where finance books it.
    pub cost_centre: Option<Label>,
    /// The end customer on whose behalf the application acted.
    pub customer: Option<Label>,
    /// The product feature.
    pub feature: Option<Label>,
    /// The conversation.
    pub session: Option<Label>,
    /// The user task that an agent's calls roll up to.
    pub task: Option<Label>,
    /// Production, staging, …
    pub environment: Option<Label>,
    /// W3C trace id, 32 hex digits.
    pub trace_id: Option<Label>,
    /// W3C id of the calling span, 16 hex digits.
    pub span_id: Option<Label>,
    /// Free dimensions.
    pub tags: BTreeMap<Label, Label>,
}

/// A dimension that a request may set through a header, if its key allows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ContextField {
    /// `x-farthing-application`
    Application,
    /// `x-farthing-feature`
    Feature,
    /// `x-farthing-customer`
    Customer,
    /// `x-farthing-session`
    Session,
    /// `x-farthing-task`
    Task,
    /// `x-farthing-environment`
    Environment,
    /// `x-farthing-tags`
    Tags,
}

impl ContextField {
    /// Every field that a header can carry.
    pub const ALL: [ContextField; 7] = [
        ContextField::Application,
        ContextField::Feature,
        ContextField::Customer,
        ContextField::Session,
        ContextField::Task,
        ContextField::Environment,
        ContextField::Tags,
    ];

    /// The header's name after `x-farthing-`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            ContextField::Application => "application",
            ContextField::Feature => "feature",
            ContextField::Customer => "customer",
            ContextField::Session => "session",
            ContextField::Task => "task",
            ContextField::Environment => "environment",
            ContextField::Tags => "tags",
        }
    }
}

impl Context {
    /// Whether a cost can be put on somebody: a team is the least that makes a cost attributed.
    #[must_use]
    pub fn is_attributed(&self) -> bool {
        self.team.is_some()
    }
}
