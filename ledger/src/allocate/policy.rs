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

/// All rules of a pool.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Policy {
    /// How busy time is divided.
    pub method: Method,
    /// Who pays for headroom.
    pub headroom: HeadroomRule,
    /// Who pays for waste.
    pub waste: WasteRule,
}

impl Policy {
    /// Name and version as postings carry them: `roofline/1 headroom=line waste=line`.
    #[must_use]
    pub fn label(&self) -> Label {
        let Policy { method, headroom, waste } = self;
        format!("{}/{} headroom={} waste={}", method.name(), method.version(), headroom.name(), waste.name()).into()
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
        assert_eq!(Method::named("by-mood"), None);
        assert_eq!(&*Policy::default().label(), "roofline/1 headroom=line waste=line");
    }
}
