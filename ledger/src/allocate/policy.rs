//! The rules of an allocation, each with a name and a version that is stamped on every posting it made.

use crate::context::Label;

/// How the busy time of a replica is divided among its requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Method {
    /// By the step-time model: weights, cache and compute, each by who needed it.
    #[default]
    Roofline,
    /// By tokens, input and output alike. What most tools do.
    Tokens,
    /// By tokens, an output token counting twice (the virtual token counter's weights).
    WeightedTokens,
    /// Every moment in equal parts to the requests that run.
    EqualTime,
}

impl Method {
    /// Every method.
    pub const ALL: [Method; 4] = [Method::Roofline, Method::Tokens, Method::WeightedTokens, Method::EqualTime];

    /// The name used in configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Method::Roofline => "roofline",
            Method::Tokens => "tokens",
            Method::WeightedTokens => "weighted-tokens",
            Method::EqualTime => "equal-time",
        }
    }

    /// Changes whenever the method would divide the same facts in another way.
    #[must_use]
    pub const fn version(self) -> u32 {
        1
    }

    /// How many input tokens an output token counts as, for the methods that count tokens.
    #[must_use]
    pub const fn output_weight(self) -> f64 {
        match self {
            Method::WeightedTokens => 2.0,
            Method::Roofline | Method::Tokens | Method::EqualTime => 1.0,
        }
    }

    /// The method of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Method> {
        Method::ALL.into_iter().find(|method| method.name() == name)
    }
}

/// Who pays for headroom.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum HeadroomRule {
    /// Those who make the peak, by the airport game.
    Airport,
    /// The interval's requests, in proportion to what they pay as busy.
    Proportional,
    /// Nobody: it stays a line of the pool's owner.
    #[default]
    Line,
}

impl HeadroomRule {
    /// Every rule.
    pub const ALL: [HeadroomRule; 3] = [HeadroomRule::Airport, HeadroomRule::Proportional, HeadroomRule::Line];

    /// The name used in configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            HeadroomRule::Airport => "airport",
            HeadroomRule::Proportional => "proportional",
            HeadroomRule::Line => "line",
        }
    }

    /// The rule of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<HeadroomRule> {
        HeadroomRule::ALL.into_iter().find(|rule| rule.name() == name)
    }
}

/// Who pays for work that was thrown away and done again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum WasteRule {
    /// Nobody: it stays a line of the pool's owner.
    #[default]
    Line,
    /// The engine's requests of the interval, in proportion to what they pay as busy.
    Spread,
}

impl WasteRule {
    /// Every rule.
    pub const ALL: [WasteRule; 2] = [WasteRule::Line, WasteRule::Spread];

    /// The name used in configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            WasteRule::Line => "line",
            WasteRule::Spread => "spread",
        }
    }

    /// The rule of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<WasteRule> {
        WasteRule::ALL.into_iter().find(|rule| rule.name() == name)
    }
}

/// How engines and jobs on the same GPUs divide the moments in which several of them work.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SharingRule {
    /// In equal parts: they take turns.
    #[default]
    TimeSliced,
    /// In proportion to what each demands alone: they run side by side (NVIDIA's multi-process service).
    Mps,
}

impl SharingRule {
    /// Every rule.
    pub const ALL: [SharingRule; 2] = [SharingRule::TimeSliced, SharingRule::Mps];

    /// The name used in configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            SharingRule::TimeSliced => "time-sliced",
            SharingRule::Mps => "mps",
        }
    }

    /// The rule of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<SharingRule> {
        SharingRule::ALL.into_iter().find(|rule| rule.name() == name)
    }
}

/// Among whom the part of a step is divided equally that is there whoever is in it: overhead and reading the weights.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum FixedRule {
    /// The requests in the batch. Whoever splits a request in two pays this part twice.
    #[default]
    Request,
    /// The consumers with requests in the batch, and each one's part among its requests.
    Tenant,
}

impl FixedRule {
    /// Every rule.
    pub const ALL: [FixedRule; 2] = [FixedRule::Request, FixedRule::Tenant];

    /// The name used in configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            FixedRule::Request => "request",
            FixedRule::Tenant => "tenant",
        }
    }

    /// The rule of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<FixedRule> {
        FixedRule::ALL.into_iter().find(|rule| rule.name() == name)
    }
}

/// All rules of a pool.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Policy {
    /// How busy time is divided.
    pub method: Method,
    /// Who pays for headroom.
    pub headroom: HeadroomRule,
    /// Who pays for waste.
    pub waste: WasteRule,
    /// How engines and jobs on the same GPUs share them.
    pub sharing: SharingRule,
    /// Among whom the fixed part of a step is divided.
    pub fixed: FixedRule,
}

impl Policy {
    /// Name and version as postings carry them: `roofline/1 headroom=line waste=line sharing=time-sliced fixed=request`.
    #[must_use]
    pub fn label(&self) -> Label {
        let Policy { method, headroom, waste, sharing, fixed } = self;
        format!(
            "{}/{} headroom={} waste={} sharing={} fixed={}",
            method.name(),
            method.version(),
            headroom.name(),
            waste.name(),
            sharing.name(),
            fixed.name()
        )
        .into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for method in Method::ALL {
            assert_eq!(Method::named(method.name()), Some(method));
        }
        for rule in HeadroomRule::ALL {
            assert_eq!(HeadroomRule::named(rule.name()), Some(rule));
        }
        for rule in WasteRule::ALL {
            assert_eq!(WasteRule::named(rule.name()), Some(rule));
        }
        for rule in SharingRule::ALL {
            assert_eq!(SharingRule::named(rule.name()), Some(rule));
        }
        for rule in FixedRule::ALL {
            assert_eq!(FixedRule::named(rule.name()), Some(rule));
        }
        assert_eq!(Method::named("by-mood"), None);
        assert_eq!(
            &*Policy::default().label(),
            "roofline/1 headroom=line waste=line sharing=time-sliced fixed=request"
        );
    }
}
