//! The acceptance cases of the gateway in which the price alone decides, and laws that hold for every model and usage.

use proptest::prelude::*;

use super::*;
use crate::usage::TokenKind;

const NOW: &str = "2026-11-20T12:00:00Z";

fn at(text: &str) -> Timestamp {
    text.parse().expect("a time")
}

fn ask(book: &PriceBook, provider: &str, model: &str, class: ServiceClass, usage: TokenUsage) -> Charge {
    let (operation, quality, at) = (Operation::Chat, UsageQuality::Reported, at(NOW));
    book.charge(&PriceQuery {
        provider,
        model: Some(model),
        operation,
        service_class: class,
        usage: &usage,
        quality,
        at,
    })
}

/// The amount of a charge that is priced without any weakness.
fn priced(charge: &Charge) -> Money {
    let Charge::Priced { costs, .. } = charge else { panic!("not priced: {charge:?}") };
    costs.effective_cost
}

fn standard(provider: &str, model: &str, usage: TokenUsage) -> Money {
    priced(&ask(&PriceBook::base(), provider, model, ServiceClass::Standard, usage))
}

fn usd(text: &str) -> Money {
    text.parse().expect("an amount")
}

/// Checks the right amount to the cent of a cent, and that the misreading of the usage gives the amount that was reported
/// as wrong, so that the usage is proven to be the one that the report is about.
fn check(right: Money, wrong: Money, expected: &str, reported: &str) {
    let places = u32::try_from(expected.split('.').nth(1).map_or(0, str::len)).expect("few places");
    assert_eq!((right.rounded(places), wrong.rounded(places)), (expected.to_owned(), reported.to_owned()));
}

/// Usage of litellm issue 9812.
#[test]
fn case_05_an_anthropic_cache_write_is_billed_once() {
    let right = TokenUsage { input: 3, cache_write_5m: 12_304, output: 550, ..TokenUsage::default() };
    let wrong = TokenUsage { input: 3 + 12_304, ..right };
    let price = |usage| standard("anthropic", "claude-3-7-sonnet-20250219", usage);
    check(price(right), price(wrong), "0.0544", "0.0913");
}

/// Usage of litellm issue 14849. Its two amounts come from two price lists: the reporter recomputed with a flat 1.25 / 0.625
/// / 10 USD per million, the gateway had used 2.50 / 0.3125 / 15. Both lists are given here as overrides.
#[test]
fn case_06_gemini_cache_hits_are_not_charged_as_fresh_input() {
    let list = |input: &str, cache_read: &str, output: &str| {
        let entry = format!(
            r#"{{"price":[{{"provider":"google","model":"gemini-2.5-pro","input":"{input}","cache_read":"{cache_read}","output":"{output}"}}]}}"#
        );
        PriceBook::base().with_overrides(serde_json::from_str(&entry).expect("an override"))
    };
    let right = TokenUsage { input: 5_005, cache_read: 257_955, output: 1_744, ..TokenUsage::default() };
    let wrong = TokenUsage { input: 262_960, ..right };
    let price = |book: &PriceBook, usage| priced(&ask(book, "google", "gemini-2.5-pro", ServiceClass::Standard, usage));
    let (reporter, gateway) = (list("1.25", "0.625", "10"), list("2.5", "0.3125", "15"));
    check(price(&reporter, right), price(&gateway, wrong), "0.1849", "0.7642");
    // Today's list: over 200,000 tokens of input, cache reads at 0.25.
    assert_eq!(standard("google", "gemini-2.5-pro", right), usd("0.10316125"));
}

/// Usage of bifrost issue 3451.
#[test]
fn case_07_streamed_cache_creation_is_billed_once() {
    let right = TokenUsage { input: 6, cache_write_5m: 159_217, output: 2_745, ..TokenUsage::default() };
    let wrong = TokenUsage { input: 6 + 159_217, ..right };
    let price = |usage| standard("anthropic", "claude-opus-4-7", usage);
    check(price(right), price(wrong), "1.0638", "1.8598");
}

/// Usage of bifrost issue 904, whose rates are those of gpt-5.
#[test]
fn case_08_openai_cached_tokens_have_their_own_price() {
    let right = TokenUsage { input: 51_232, cache_read: 1_188_096, output: 12_909, ..TokenUsage::default() };
    let wrong = TokenUsage { input: 51_232 + 1_188_096, cache_read: 0, ..right };
    let price = |usage| standard("openai", "gpt-5", usage);
    check(price(right), price(wrong), "0.34", "1.68");
}

/// Usage of langfuse issue 14249, given there in rounded thousands.
#[test]
fn case_09_a_cache_write_is_not_left_out() {
    let right = TokenUsage { input: 15_460, cache_write_5m: 19_810, output: 10_370, ..TokenUsage::default() };
    let wrong = TokenUsage { cache_write_5m: 0, ..right };
    let price = |usage| standard("anthropic", "claude-sonnet-4-6", usage);
    check(price(right), price(wrong), "0.28", "0.20");
}

/// The table of litellm issue 37046: dated names, priority tier. The wrong amounts are the standard tier's.
#[test]
fn case_10_service_tier_and_dated_names_have_their_own_price() {
    let table = [
        ("gpt-4o-mini-2024-07-18", 9, 2, "0.00000425", "0.00000255"),
        ("gpt-4o-2024-08-06", 9, 1, "0.00005525", "0.0000325"),
        ("gpt-4.1-2025-04-14", 9, 1, "0.0000455", "0.000026"),
        ("gpt-4.1-mini-2025-04-14", 9, 1, "0.0000091", "0.0000052"),
    ];
    let book = PriceBook::base();
    for (model, input, output, priority, default) in table {
        let usage = TokenUsage { input, output, ..TokenUsage::default() };
        assert_eq!(priced(&ask(&book, "openai", model, ServiceClass::Priority, usage)), usd(priority), "{model}");
        assert_eq!(priced(&ask(&book, "openai", model, ServiceClass::Standard, usage)), usd(default), "{model}");
    }
}

/// litellm issue 30135 names no usage; this one is made up on a model with a 200k tier. Over it, every token costs more.
#[test]
fn case_11_the_price_over_200k_applies_to_the_whole_request() {
    let over = TokenUsage { input: 200_001, output: 1_000, ..TokenUsage::default() };
    let at_the_limit = TokenUsage { input: 200_000, ..over };
    let cached = TokenUsage { input: 1, cache_read: 200_000, ..over };
    let price = |usage| standard("google", "gemini-2.5-pro", usage);
    assert_eq!(price(over), usd("0.5150025"));
    assert_eq!(price(at_the_limit), usd("0.26"));
    assert_eq!(price(cached), usd("0.0650025"), "cached tokens count towards the tier");
}

/// Rates of litellm PR 39861 (batch over 272k at 2.50 and 11.25, not at half of the base's 2.50 and 15).
#[test]
fn case_11_batch_over_272k_is_at_the_batch_tier() {
    let usage = TokenUsage { input: 300_000, output: 1_000, ..TokenUsage::default() };
    let charge = ask(&PriceBook::base(), "openai", "gpt-5.4", ServiceClass::Batch, usage);
    assert_eq!(priced(&charge), usd("0.76125"));
    assert_ne!(priced(&charge), usd("0.3825"));
    assert_eq!(charge.rates().expect("rates").sku(), "openai/gpt-5.4:batch>272000");
}

/// litellm PR 39294 gives the first attempt's 560,186 cache reads and 299 output tokens and both totals. The first attempt's
/// cache write and the second attempt are made up so that both totals come out.
#[test]
fn case_12_each_attempt_is_priced_at_its_own_model() {
    let first =
        TokenUsage { input: 2, cache_write_5m: 2_085, cache_read: 560_186, output: 299, ..TokenUsage::default() };
    let second = TokenUsage { cache_read: 480_000, output: 696, ..TokenUsage::default() };
    let opus = |usage| standard("anthropic", "claude-opus-4-8", usage);
    let right = standard("anthropic", "claude-fable-5", first) + opus(second);
    check(right, opus(first) + opus(second), "0.8586", "0.5580");
}

/// litellm issue 35829: the upstream said `"cost": 3144000` in a unit of its own. There is no way to hand such a number to
/// the book; tokens decide. The token counts are made up.
#[test]
fn case_13_what_the_upstream_says_it_cost_is_not_asked() {
    let usage = TokenUsage { input: 1_200, output: 124, ..TokenUsage::default() };
    assert_eq!(standard("x-ai", "grok-4.5", usage), usd("0.003144"));
}

/// litellm PR 36561.
#[test]
fn case_14_an_unknown_model_is_unpriced_and_never_zero() {
    let usage = TokenUsage { input: 10, output: 10, ..TokenUsage::default() };
    let unknown = [
        ("deepinfra", "deepseek-ai/DeepSeek-V4-Flash-0731"),
        ("openai", "gpt-99"),
        ("anthropic", "gpt-4o"),
        ("openai", "claude-opus-4-7"),
        ("", "gpt-4o"),
    ];
    for (provider, model) in unknown {
        let charge = ask(&PriceBook::base(), provider, model, ServiceClass::Standard, usage);
        assert_eq!(charge, Charge::Unpriced { reason: UnpricedReason::UnknownModel }, "{provider}/{model}");
        assert_eq!(charge.costs(), None);
    }
}

#[test]
fn every_state_of_knowledge_has_its_charge() {
    let usage = TokenUsage { input: 1_000, output: 100, ..TokenUsage::default() };
    let (book, zero) = (PriceBook::base(), TokenUsage::default());
    let query = |provider, model, operation, quality, usage| {
        let service_class = ServiceClass::Standard;
        book.charge(&PriceQuery { provider, model, operation, service_class, usage, quality, at: at(NOW) })
    };
    use Operation::{Chat, CountTokens, Models};
    use UsageQuality::{Estimated, Missing, Reported};
    let cases = [
        (query("self_hosted", Some("model-a"), Chat, Reported, &usage), "unpriced", Some("self_hosted"), None),
        (query("openai", Some("gpt-4o"), Chat, Missing, &zero), "unpriced", Some("no_usage"), None),
        (query("openai", None, Chat, Reported, &usage), "unpriced", Some("unknown_model"), None),
        (query("openai", Some("whisper-1"), Chat, Reported, &usage), "unpriced", Some("unsupported_unit"), None),
        (query("openai", Some("gpt-4o"), Chat, Estimated, &usage), "estimated", Some("usage_counted"), Some("0.0035")),
        (query("openai", Some("gpt-4o"), Chat, Reported, &zero), "priced", None, Some("0")),
        (query("anthropic", Some("claude-opus-4-7"), CountTokens, Missing, &zero), "priced", None, Some("0")),
        (query("openai", None, Models, Missing, &zero), "priced", None, Some("0")),
        (query("openrouter", Some("deepseek/deepseek-r1:free"), Chat, Reported, &usage), "priced", None, Some("0")),
        (
            query("perplexity", Some("sonar"), Chat, Reported, &usage),
            "estimated",
            Some("nearest_price"),
            Some("0.0011"),
        ),
    ];
    for (charge, name, reason, amount) in cases {
        let cost = charge.costs().map(|costs| costs.list_cost);
        assert_eq!((charge.name(), charge.reason(), cost), (name, reason, amount.map(usd)), "{charge:?}");
    }
}

#[test]
fn a_class_that_the_provider_does_not_price_is_an_estimate() {
    let usage = TokenUsage { input: 1_000, ..TokenUsage::default() };
    let charge = ask(&PriceBook::base(), "anthropic", "claude-opus-4-7", ServiceClass::Flex, usage);
    assert!(matches!(charge, Charge::Estimated { reason: EstimateReason::NearestPrice, .. }));
    assert_eq!(charge.costs().expect("a number").list_cost, usd("0.005"));
}

/// OpenRouter lists cache writes of Gemini at repeating decimals; the other kinds must not suffer from that.
#[test]
fn a_price_finer_than_a_picodollar_is_rounded_and_said_to_be() {
    let book = PriceBook::base();
    let plain = TokenUsage { input: 1_000, output: 10, ..TokenUsage::default() };
    let ask = |usage| ask(&book, "openrouter", "google/gemini-2.5-flash", ServiceClass::Standard, usage);
    assert_eq!(ask(plain).name(), "priced");
    let written = ask(TokenUsage { cache_write_5m: 1_000, ..plain });
    assert_eq!((written.name(), written.reason()), ("estimated", Some("nearest_price")));
}

#[test]
fn overrides_replace_named_kinds_in_their_time_and_discounts_come_off_the_list() {
    let overrides = r#"{
        "price": [
            {"provider": "OpenAI", "model": "gpt-4o", "input": "2.00", "output": "8.00", "from": "2026-01-01"},
            {"provider": "openai", "model": "gpt-5.4", "input": "1.00"},
            {"provider": "openai", "model": "gpt-5.4", "input": "3.00", "above_input_tokens": 100000},
            {"provider": "acme", "model": "house-llm", "input": "0.10", "output": "0.20"}
        ],
        "discount": [
            {"percent": "5"},
            {"provider": "openai", "percent": "10"},
            {"provider": "openai", "model": "gpt-5.4", "percent": "-20"}
        ]
    }"#;
    let overrides: Overrides = serde_json::from_str(overrides).expect("overrides");
    overrides.check().expect("all can apply");
    let book = PriceBook::base().with_overrides(overrides);
    let usage = TokenUsage { input: 1_000_000, cache_read: 1_000_000, output: 1_000_000, ..TokenUsage::default() };
    let costs = |provider, model, usage: TokenUsage, when: &str| {
        let (operation, quality, service_class) = (Operation::Chat, UsageQuality::Reported, ServiceClass::Standard);
        let charge = book.charge(&PriceQuery {
            provider,
            model: Some(model),
            operation,
            service_class,
            usage: &usage,
            quality,
            at: at(when),
        });
        let costs = charge.costs().expect("a number");
        (costs.list_cost.to_string(), costs.contracted_cost.to_string())
    };
    let is = |list: &str, contracted: &str| (list.to_owned(), contracted.to_owned());
    // A dated name is the same model; a kind that is not named keeps its published price (1.25 for cache reads).
    assert_eq!(costs("openai", "gpt-4o-2024-11-20", usage, "2026-02-01"), is("11.25", "10.125"));
    assert_eq!(costs("openai", "gpt-4o", usage, "2025-12-31"), is("13.75", "12.375"));
    let small = TokenUsage { input: 100_000, ..TokenUsage::default() };
    assert_eq!(costs("openai", "gpt-5.4", small, NOW), is("0.10", "0.12"));
    let large = TokenUsage { input: 300_000, output: 1_000, ..TokenUsage::default() };
    assert_eq!(costs("openai", "gpt-5.4", large, NOW), is("0.9225", "1.107"));
    assert_eq!(costs("acme", "house-llm", small, NOW), is("0.01", "0.0095"));
    assert_eq!(book.show("openai", "gpt-5.4", at(NOW))[0].tiers.len(), 3);
    assert!(book.version().starts_with("genai-prices@0.2.1+overrides@") && !book.version().contains(' '));
}

#[test]
fn an_imported_list_is_asked_before_the_base_and_can_be_compared_with_it() {
    let file = r#"{"gpt-4o": {"litellm_provider": "openai", "input_cost_per_token": 1e-06, "output_cost_per_token": 1e-05,
        "cache_read_input_token_cost": 1.25e-06}}"#;
    let (imported, rejects) = import_litellm(file).expect("an import");
    assert_eq!(rejects, []);
    let (base, book) = (PriceBook::base(), PriceBook::base().with_imported(imported));
    let usage = TokenUsage { input: 1_000, ..TokenUsage::default() };
    for model in ["gpt-4o", "gpt-4o-2024-08-06"] {
        assert_eq!(priced(&ask(&book, "openai", model, ServiceClass::Standard, usage)), usd("0.001"));
    }
    assert_eq!(priced(&ask(&book, "openai", "gpt-4.1", ServiceClass::Standard, usage)), usd("0.002"));

    let models = [("openai".to_owned(), "gpt-4o".to_owned()), ("openai".to_owned(), "gpt-4.1".to_owned())];
    let standard: Vec<_> = compare(&base, &book, &models, at(NOW))
        .into_iter()
        .filter(|change| change.class == ServiceClass::Standard)
        .collect();
    assert!(standard.iter().all(|change| &*change.model == "gpt-4o"));
    assert!(standard.iter().any(|change| change.kind == TokenKind::Input));
    assert!(standard.iter().all(|change| change.kind != TokenKind::Output && change.kind != TokenKind::CacheRead));

    let past = |model: &str| PastUsage {
        provider: "openai".into(),
        model: Some(model.into()),
        operation: Operation::Chat,
        service_class: ServiceClass::Standard,
        usage,
        quality: UsageQuality::Reported,
        at: at(NOW),
    };
    let rerating = rerate(&[past("gpt-4o"), past("gpt-4o"), past("gpt-99")], &base, &book);
    let total = Rerated { attempts: 3, old: usd("0.005"), new: usd("0.002"), old_unpriced: 1, new_unpriced: 1 };
    assert_eq!((rerating.total, rerating.models.len()), (total, 2));
}

fn any_usage() -> impl Strategy<Value = TokenUsage> {
    prop::collection::vec(prop_oneof![3 => Just(0u64), 5 => 0..5_000u64, 1 => 0..900_000u64], TokenKind::ALL.len())
        .prop_map(|counts| {
            let mut usage = TokenUsage::default();
            for (kind, count) in TokenKind::ALL.into_iter().zip(counts) {
                *usage.get_mut(kind) = count;
            }
            usage
        })
}

fn any_class() -> impl Strategy<Value = ServiceClass> {
    prop::sample::select(&ServiceClass::ALL[..])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Every amount can be recomputed from its own row, and is the sum of rates that the card really has.
    #[test]
    fn every_row_can_be_recomputed(usage in any_usage(), class in any_class(), pick in any::<prop::sample::Index>()) {
        let book = PriceBook::base();
        let models = book.models();
        let (provider, model) = &models[pick.index(models.len())];
        let charge = ask(&book, provider, model, class, usage);
        if let (Some(costs), Some(rates)) = (charge.costs(), charge.rates()) {
            let reread: ResolvedRates = rates.as_str().parse().expect("text");
            prop_assert_eq!(reread.charge(&usage), Some(costs));
            let card = book.find(provider, model, class, at(NOW)).expect("the card behind the charge");
            let tier = card.tier(&usage).expect("a tier");
            let sum: i128 = usage.iter().map(|(kind, tokens)| {
                i128::from(tier.rates.nearest(kind).expect("a rate").price.pico()) * i128::from(tokens)
            }).sum();
            prop_assert_eq!(costs.list_cost.pico(), sum);
            for kind in TokenKind::ALL {
                prop_assert_eq!(rates.rate(kind).is_some(), usage.get(kind) > 0, "only the kinds that were used");
            }
        }
    }

    /// The integer cards say what the crate itself says in floats: any model, usage, class and date.
    #[test]
    fn cards_agree_with_the_crate(
        usage in any_usage(),
        class in any_class(),
        day in 0..900i64,
        second in 0..86_400i64,
        pick in any::<prop::sample::Index>(),
    ) {
        let book = PriceBook::base();
        let models = book.models();
        let (provider, model) = &models[pick.index(models.len())];
        let at = at("2025-01-01").plus_micros((day * 86_400 + second) * 1_000_000);
        let context = match class {
            ServiceClass::Standard => None,
            ServiceClass::Flex => Some(("service_tier", "flex")),
            ServiceClass::Priority => Some(("service_tier", "priority")),
            ServiceClass::Batch => Some(("processing", "batch")),
        };
        let crate_price = |usage: &TokenUsage| {
            let usage = probe::provider_usage(usage);
            let mut request = genai_prices::PriceRequest::new(model, &usage)
                .with_provider_id(provider)
                .with_timestamp(std::time::UNIX_EPOCH + std::time::Duration::from_micros(at.micros().unsigned_abs()));
            if let Some((key, value)) = context {
                request = request.with_price_context(key, value);
            }
            genai_prices::calculate(&request).map(|price| price.total_price)
        };
        let operation = Operation::Chat;
        let query = PriceQuery { provider, model: Some(model), operation, service_class: class, usage: &usage, quality: UsageQuality::Reported, at };
        let charge = book.charge(&query);
        match (crate_price(&usage), charge.costs()) {
            (Ok(theirs), Some(costs)) => {
                let fee_per_request = crate_price(&TokenUsage::default()).expect("a price of nothing");
                let ours: f64 = costs.list_cost.to_string().parse().expect("a number");
                let distance = (ours + fee_per_request - theirs).abs();
                // Half a picodollar for each token of a kind that is listed finer than that.
                let card = book.find(provider, model, class, at).expect("the card behind the charge");
                let rounded = if card.inexact.is_empty() { 0.0 } else { 1e-12 * (usage.input_tokens() + usage.output_tokens()) as f64 };
                prop_assert!(distance <= 1e-9 * theirs.max(1.0) + rounded, "{}/{} at {}: {} and {}", provider, model, at, ours, theirs);
            }
            (Ok(theirs), None) => {
                // The crate counts what has no price as nothing; we do not.
                let known = usage.iter().all(|(kind, _)| book.find(provider, model, class, at).is_ok_and(|card| {
                    card.tier(&usage).is_some_and(|tier| tier.rates.nearest(kind).is_some())
                }));
                prop_assert!(usage.iter().count() == 0 || !known, "{}/{}: the crate says {}", provider, model, theirs);
            }
            (Err(error), Some(_)) => prop_assert!(false, "{}/{}: we price what the crate refuses: {}", provider, model, error),
            (Err(_), None) => {}
        }
    }
}
