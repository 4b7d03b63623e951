//! Corrections carry what stands behind an amount, and true-ups close to what was billed.

use proptest::prelude::*;

use super::*;
use crate::context::Context;
use crate::id::{PostingId, RequestId};

fn posting(number: u16, line: Line, pico: i128, gpu_us: i64, terms: Option<[i128; 4]>) -> Posting {
    let start = Timestamp::from_micros(60_000_000 * i64::from(number / 4));
    let request = RequestId::new(start, [u8::try_from(number % 251).unwrap(); 10]);
    let money = Money::from_pico;
    Posting {
        id: PostingId::new(start, [u8::try_from(number % 241).unwrap(); 10]),
        origin: Origin::Pool { pool: "shared".into(), start },
        line,
        period: Period { start, end: start.plus_micros(60_000_000) },
        attempt: (line == Line::Request).then_some(AttemptId { request, number }),
        context: Context { team: Some(format!("team-{}", number % 3).into()), ..Context::default() },
        provider: "self_hosted".into(),
        model: None,
        pool: Some("shared".into()),
        costs: Costs::flat(money(pico)),
        estimated: false,
        tier: None,
        basis: Some(Basis {
            gpu_us,
            terms: terms.map(|[overhead, weights, kv, compute]| Terms {
                overhead: money(overhead),
                weights: money(weights),
                kv: money(kv),
                compute: money(compute),
            }),
            quality: Some(900_000),
        }),
        policy: "roofline/1".into(),
        booked_at: start,
    }
}

fn effective(postings: &[Posting]) -> Money {
    postings.iter().map(|posting| posting.costs.effective_cost).sum()
}

#[test]
fn corrections_carry_the_difference_of_time_and_terms() {
    let before =
        [posting(0, Line::Request, 100, 50, Some([10, 20, 30, 40])), posting(1, Line::IdleReserved, 900, 450, None)];
    let after =
        [posting(0, Line::Request, 130, 70, Some([10, 30, 30, 60])), posting(1, Line::IdleReserved, 870, 430, None)];
    let corrected = corrections(&before, &after);
    assert_eq!(corrected.len(), 2);
    let request = corrected[0].basis.unwrap();
    assert_eq!((corrected[0].costs.effective_cost, request.gpu_us), (Money::from_pico(30), 20));
    let terms = request.terms.unwrap();
    assert_eq!(terms, Terms { weights: Money::from_pico(10), compute: Money::from_pico(20), ..Terms::default() });
    assert_eq!((corrected[1].costs.effective_cost.pico(), corrected[1].basis.unwrap().gpu_us), (-30, -20));
    assert!(corrected[1].basis.unwrap().terms.is_none());
    let all: Vec<Posting> = before.iter().cloned().chain(corrected).collect();
    assert_eq!(corrections(&all, &after), Vec::new());
    // The same money by other terms, or for another time, is a correction too.
    let moved = [posting(0, Line::Request, 100, 50, Some([20, 10, 30, 40])), before[1].clone()];
    assert_eq!(corrections(&before, &moved).len(), 1);
    // What nobody knew before was unallocated and goes away.
    let unallocated = [Posting { basis: None, ..posting(2, Line::Unallocated, 1_000, 0, None) }];
    let corrected = corrections(&unallocated, &before);
    assert_eq!(effective(&corrected), Money::ZERO);
    let request = corrected.iter().find(|posting| posting.line == Line::Request).unwrap();
    assert_eq!(request.basis.unwrap().terms, before[0].basis.unwrap().terms);
}

#[test]
fn a_bill_is_spread_in_proportion_and_once() {
    let booked = [
        posting(0, Line::Request, 300, 3, None),
        posting(1, Line::IdleReserved, 600, 6, None),
        posting(2, Line::Request, 100, 1, None),
    ];
    let (invoice, now): (Label, _) = ("2026-11".into(), Timestamp::from_micros(9));
    let ups = true_up(&booked, Money::from_pico(1_500), &invoice, now).unwrap();
    let mut amounts: Vec<i128> = ups.iter().map(|up| up.costs.effective_cost.pico()).collect();
    amounts.sort_unstable();
    assert_eq!(amounts, [50, 150, 300]);
    assert!(ups.iter().all(|up| up.line == Line::TrueUp && up.origin == Origin::InvoiceLine(invoice.clone())));
    assert!(ups.iter().all(|up| up.costs.list_cost == Money::ZERO && up.costs.billed_cost == up.costs.effective_cost));
    let all: Vec<Posting> = booked.iter().cloned().chain(ups).collect();
    assert_eq!(true_up(&all, Money::from_pico(1_500), &invoice, now).unwrap(), Vec::new());
    // A second invoice books the difference, a lower one takes back.
    let less = true_up(&all, Money::from_pico(900), &"credit".into(), now).unwrap();
    assert_eq!(effective(&all) + effective(&less), Money::from_pico(900));
    assert!(less.iter().all(|up| up.costs.effective_cost < Money::ZERO));
}

#[test]
fn gpus_at_no_rate_are_billed_by_their_time() {
    let booked = [posting(0, Line::Request, 0, 3, None), posting(1, Line::IdleReserved, 0, 7, None)];
    let ups = true_up(&booked, Money::from_pico(1_000), &"i".into(), Timestamp::default()).unwrap();
    assert_eq!(ups.iter().map(|up| up.costs.effective_cost.pico()).collect::<Vec<_>>(), [300, 700]);
    assert_eq!(true_up(&[], Money::from_pico(5), &"i".into(), Timestamp::default()), Err(MoneyError::NoWeights));
    assert_eq!(true_up(&[], Money::ZERO, &"i".into(), Timestamp::default()), Ok(Vec::new()));
}

proptest! {
    #[test]
    fn true_ups_close_exactly_in_any_order(
        amounts in prop::collection::vec((0i128..9_000_000_000_000_000_000_000, 1i64..1_000_000), 1..40),
        billed in 0i128..9_000_000_000_000_000_000_000_000, turn in any::<prop::sample::Index>(),
    ) {
        let booked: Vec<Posting> = (0u16..)
            .zip(&amounts)
            .map(|(number, (pico, us))| posting(number, if number % 4 == 3 { Line::Warm } else { Line::Request }, *pico, *us, None))
            .collect();
        let (invoice, billed): (Label, _) = ("i".into(), Money::from_pico(billed));
        let ups = true_up(&booked, billed, &invoice, Timestamp::default()).unwrap();
        prop_assert_eq!(effective(&booked) + effective(&ups), billed);
        let ids: std::collections::BTreeSet<PostingId> = ups.iter().map(|up| up.id).collect();
        prop_assert_eq!(ids.len(), ups.len());
        let mut again = booked.clone();
        again.rotate_left(turn.index(booked.len()));
        prop_assert_eq!(true_up(&again, billed, &invoice, Timestamp::default()).unwrap(), ups);
    }
}
