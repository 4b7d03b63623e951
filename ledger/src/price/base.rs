//! The base catalogue: public list prices from the `genai-prices` crate as rate cards.
//!
//! A card is read out of the crate ([`probe`](super::probe)) when it is first needed and kept. After that, finding it is two
//! hash look-ups. A card holds for a stretch of one UTC day in which no half hour differs: the catalogue changes prices at
//! midnight and, for a few models, at whole half hours of the day. Neighbouring stretches with equal prices are one.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, PoisonError, RwLock};

use super::card::{RateCard, RateTier, Rates};
use super::probe::{Identity, Prober};
use crate::attempt::ServiceClass;
use crate::charge::UnpricedReason;
use crate::money::TokenPrice;
use crate::time::{Period, Timestamp};
use crate::usage::TokenKind;

/// Name and version of the catalogue. A test holds the version against `Cargo.lock`.
pub const BASE_VERSION: &str = "genai-prices@0.2.1";

/// Model names that are kept. Names come from clients, so there must be a bound; past it all are forgotten and read again.
const MODELS_MAX: usize = 20_000;
const SLOT_MICROS: i64 = 1_800_000_000;
const SLOTS_PER_DAY: i64 = 48;

/// A card, or why there is none.
pub(super) type Found = Result<Arc<RateCard>, UnpricedReason>;

/// The catalogue with what was read from it so far.
#[derive(Debug, Default)]
pub(super) struct Catalogue {
    models: RwLock<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    by_provider: HashMap<Box<str>, HashMap<Box<str>, OfModel>>,
    models: usize,
}

/// What is known of a model by class of service.
type OfModel = [Vec<Span>; ServiceClass::ALL.len()];

#[derive(Debug, Clone)]
struct Span {
    period: Period,
    mark: Option<(u64, u64)>,
    found: Found,
}

/// The one catalogue of this process; it is compiled in and never changes.
pub(super) static CATALOGUE: LazyLock<Catalogue> = LazyLock::new(Catalogue::default);

impl Catalogue {
    /// The card that holds at this moment. A class without prices of its own gets the standard ones, and says so.
    pub(super) fn card(&self, provider: &str, model: &str, class: ServiceClass, at: Timestamp) -> Found {
        if let Some(found) = self.kept(provider, model, class, at) {
            return found;
        }
        let span = self.read(provider, model, class, at);
        let found = span.found.clone();
        self.keep(provider, model, class, span);
        found
    }

    /// The card for people: with the whole time it holds, to the day, instead of the stretch that was looked at.
    pub(super) fn dated_card(&self, provider: &str, model: &str, class: ServiceClass, at: Timestamp) -> Found {
        let card = self.card(provider, model, class, at)?;
        let standard = Prober { provider, model, context: None, at };
        let kinds = standard.priced_kinds();
        let (prober, _) = of_class(standard, class, &kinds);
        let period = whole_time(prober, &kinds);
        Ok(Arc::new(RateCard { period, ..(*card).clone() }))
    }

    fn kept(&self, provider: &str, model: &str, class: ServiceClass, at: Timestamp) -> Option<Found> {
        let kept = self.models.read().unwrap_or_else(PoisonError::into_inner);
        let spans = &kept.by_provider.get(provider)?.get(model)?[class as usize];
        spans.iter().rev().find(|span| span.period.contains(at)).map(|span| span.found.clone())
    }

    fn read(&self, provider: &str, model: &str, class: ServiceClass, at: Timestamp) -> Span {
        let standard = Prober { provider, model, context: None, at };
        let Some(identity) = standard.identity() else {
            // Names do not depend on the date: what is unknown today always was.
            return Span { period: Period::ALL, mark: None, found: Err(UnpricedReason::UnknownModel) };
        };
        let kinds = standard.priced_kinds();
        let (prober, nearest_class) = of_class(standard, class, &kinds);
        let mark = prober.mark(&kinds);
        let period = stretch(prober, &kinds, mark);
        let known = self.known(provider, model, class, mark);
        let found = known.unwrap_or_else(|| card(prober, &identity, class, nearest_class, &kinds, period));
        Span { period, mark, found }
    }

    /// A card of another day with the same prices saves reading them again.
    fn known(&self, provider: &str, model: &str, class: ServiceClass, mark: Option<(u64, u64)>) -> Option<Found> {
        let kept = self.models.read().unwrap_or_else(PoisonError::into_inner);
        let spans = &kept.by_provider.get(provider)?.get(model)?[class as usize];
        let same = spans.iter().find(|span| mark.is_some() && span.mark == mark)?;
        Some(same.found.clone())
    }

    fn keep(&self, provider: &str, model: &str, class: ServiceClass, span: Span) {
        let mut kept = self.models.write().unwrap_or_else(PoisonError::into_inner);
        if kept.models >= MODELS_MAX {
            *kept = Kept::default();
        }
        let models = kept.by_provider.entry(provider.into()).or_default();
        let is_new = !models.contains_key(model);
        let spans = &mut models.entry(model.into()).or_default()[class as usize];
        match spans.iter_mut().find(|other| joins(other, &span)) {
            Some(other) => {
                other.period.start = other.period.start.min(span.period.start);
                other.period.end = other.period.end.max(span.period.end);
            }
            None => spans.push(span),
        }
        kept.models += usize::from(is_new);
    }
}

/// Whether two spans touch and say the same.
fn joins(a: &Span, b: &Span) -> bool {
    let touch = a.period.start <= b.period.end && b.period.start <= a.period.end;
    touch && a.mark.is_some() && a.mark == b.mark && a.found == b.found
}

/// The prober of a class, and whether that class has no prices of its own at that moment.
fn of_class<'a>(standard: Prober<'a>, class: ServiceClass, kinds: &[TokenKind]) -> (Prober<'a>, bool) {
    let contexts: &[(&str, &str)] = match class {
        ServiceClass::Standard => return (standard, false),
        ServiceClass::Flex => &[("service_tier", "flex")],
        ServiceClass::Priority => &[("service_tier", "priority"), ("service_tier", "fast")],
        ServiceClass::Batch => &[("processing", "batch")],
    };
    let plain = standard.mark(kinds);
    contexts
        .iter()
        .map(|&context| Prober { context: Some(context), ..standard })
        .find(|prober| prober.mark(kinds) != plain)
        .map_or((standard, true), |prober| (prober, false))
}

/// The part of the UTC day around the prober's moment in which the prices are the same.
fn stretch(prober: Prober<'_>, kinds: &[TokenKind], mark: Option<(u64, u64)>) -> Period {
    let at = prober.at.micros();
    let day = at - at.rem_euclid(SLOT_MICROS * SLOTS_PER_DAY);
    let slot = (at - day) / SLOT_MICROS;
    let start_of = |slot: i64| Timestamp::from_micros(day.saturating_add(slot * SLOT_MICROS));
    let same = |slot: &i64| Prober { at: start_of(*slot), ..prober }.mark(kinds) == mark;
    let first = (0..slot).rev().take_while(same).last().unwrap_or(slot);
    let last = (slot + 1..SLOTS_PER_DAY).take_while(same).last().unwrap_or(slot);
    Period { start: start_of(first), end: start_of(last + 1) }
}

/// The days before and after with the same prices. Prices by time of day keep their hours, on this day only.
fn whole_time(prober: Prober<'_>, kinds: &[TokenKind]) -> Period {
    const DAY: i64 = SLOT_MICROS * SLOTS_PER_DAY;
    const DAYS_LOOKED_AT: i64 = 1_500;
    let mark = prober.mark(kinds);
    let today = stretch(prober, kinds, mark);
    if today.micros() != DAY.unsigned_abs() {
        return today;
    }
    let differs = |start: Timestamp| {
        let hours = [0, 2, 8, 20].map(|hour| start.plus_micros(hour * 2 * SLOT_MICROS));
        hours.into_iter().any(|at| Prober { at, ..prober }.mark(kinds) != mark)
    };
    let first_other = |step: i64| (1..DAYS_LOOKED_AT).find(|days| differs(today.start.plus_micros(step * days * DAY)));
    Period {
        start: first_other(-1).map_or(Period::ALL.start, |days| today.start.plus_micros((1 - days) * DAY)),
        end: first_other(1).map_or(Period::ALL.end, |days| today.start.plus_micros(days * DAY)),
    }
}

fn card(
    prober: Prober<'_>,
    identity: &Identity,
    class: ServiceClass,
    nearest_class: bool,
    kinds: &[TokenKind],
    period: Period,
) -> Found {
    let tiers = if kinds.is_empty() {
        vec![unlisted(prober, identity)?]
    } else {
        prober.tiers(kinds).map_err(|_| UnpricedReason::UnknownRate)?
    };
    let inexact = prober.inexact_kinds(kinds, &tiers).map_err(|_| UnpricedReason::UnknownRate)?;
    Ok(Arc::new(RateCard {
        provider: identity.provider.as_str().into(),
        model: identity.model.as_str().into(),
        class,
        source: BASE_VERSION.into(),
        period,
        nearest_class,
        also_billed: identity.request_fee,
        inexact,
        tiers,
    }))
}

/// A listed model without any price for tokens. Free models say so in their name; of the others we only know that the
/// list is silent, which is not the same as free.
fn unlisted(prober: Prober<'_>, identity: &Identity) -> Result<RateTier, UnpricedReason> {
    if identity.model.ends_with(":free") {
        let free = [(TokenKind::Input, TokenPrice::FREE), (TokenKind::Output, TokenPrice::FREE)];
        return Ok(RateTier { above_input_tokens: 0, rates: Rates::from_iter(free) });
    }
    Err(if prober.bills_other_units() { UnpricedReason::UnsupportedUnit } else { UnpricedReason::UnknownRate })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().expect("a time")
    }

    fn input(provider: &str, model: &str, class: ServiceClass, when: &str) -> Result<u64, UnpricedReason> {
        let card = CATALOGUE.card(provider, model, class, at(when))?;
        Ok(card.tiers[0].rates.get(TokenKind::Input).expect("an input price").pico())
    }

    #[test]
    fn the_version_is_the_one_that_is_built_in() {
        let lock = include_str!("../../../Cargo.lock");
        let entry = lock.split("[[package]]").find(|entry| entry.contains("name = \"genai-prices\"")).expect("locked");
        let version = BASE_VERSION.strip_prefix("genai-prices@").expect("a version");
        assert!(entry.contains(&format!("version = \"{version}\"")), "{entry}");
    }

    #[test]
    fn prices_change_on_their_day_and_in_their_hours() {
        assert_eq!(
            input("openai", "gpt-5.6-luna", ServiceClass::Standard, "2026-07-29T23:59:59.999999Z"),
            Ok(1_000_000)
        );
        assert_eq!(input("openai", "gpt-5.6-luna", ServiceClass::Standard, "2026-07-30"), Ok(200_000));
        assert_eq!(input("openai", "gpt-5.6-luna", ServiceClass::Standard, "2026-07-29"), Ok(1_000_000));
        let card = CATALOGUE.card("openai", "gpt-5.6-luna", ServiceClass::Standard, at("2026-08-01")).expect("a card");
        assert_eq!(card.tiers[1].above_input_tokens, 272_000);
    }

    #[test]
    fn people_see_from_when_to_when_a_price_holds() {
        let card =
            CATALOGUE.dated_card("openai", "gpt-5.6-luna", ServiceClass::Standard, at("2026-11-20")).expect("a card");
        assert_eq!(card.period, Period { start: at("2026-07-30"), end: Period::ALL.end });
        let card =
            CATALOGUE.dated_card("openai", "gpt-5.6-luna", ServiceClass::Standard, at("2026-07-01")).expect("a card");
        assert_eq!(card.period, Period { start: Period::ALL.start, end: at("2026-07-30") });
    }

    #[test]
    fn a_class_without_prices_is_the_nearest_class() {
        let before = CATALOGUE.card("openai", "gpt-4o", ServiceClass::Priority, at("2026-10-11")).expect("a card");
        let after = CATALOGUE.card("openai", "gpt-4o", ServiceClass::Priority, at("2026-10-12")).expect("a card");
        assert!(before.nearest_class && !after.nearest_class);
        assert_eq!(after.tiers[0].rates.get(TokenKind::Input).map(TokenPrice::pico), Some(4_250_000));
    }

    #[test]
    fn unknown_unlisted_and_free_are_three_different_things() {
        let find = |provider, model| CATALOGUE.card(provider, model, ServiceClass::Standard, at("2026-11-20"));
        assert_eq!(find("openai", "gpt-99"), Err(UnpricedReason::UnknownModel));
        assert_eq!(find("anthropic", "gpt-4o"), Err(UnpricedReason::UnknownModel));
        assert_eq!(find("openai", "whisper-1"), Err(UnpricedReason::UnsupportedUnit));
        assert_eq!(find("google", "gemma-3"), Err(UnpricedReason::UnknownRate));
        let free = find("openrouter", "deepseek/deepseek-r1:free").expect("a free model");
        assert_eq!(free.tiers[0].rates.get(TokenKind::Output), Some(TokenPrice::FREE));
    }

    #[test]
    fn a_flood_of_names_does_not_grow_without_bound() {
        let catalogue = Catalogue::default();
        for number in 0..MODELS_MAX + 10 {
            let span = Span { period: Period::ALL, mark: None, found: Err(UnpricedReason::UnknownModel) };
            catalogue.keep("openai", &number.to_string(), ServiceClass::Standard, span);
        }
        assert!(catalogue.models.read().expect("a lock").models <= MODELS_MAX);
    }
}
