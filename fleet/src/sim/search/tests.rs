use super::super::compare::{
    self,
    tests::{days, plan},
};
use super::*;

fn quiet() -> impl Fn(usize, usize) + Sync {
    |_, _| {}
}

#[test]
fn it_finds_the_cheapest_that_keeps_to_the_goal() {
    let (plan, demand) = (plan(), days(2));
    let play = compare::fluid(&plan, &demand);
    for name in ["hpa", "token-rate", "forecast"] {
        let policy: Policy = name.parse().unwrap();
        let found = search(&policy, &[&play], &Goal::default(), 2, &quiet()).unwrap();
        assert!(found.met, "{}", found.policy);
        assert!(found.outcomes[0].overload.share <= 0.0008);
        let before = play(&policy).unwrap();
        if before.overload.share <= 0.0008 {
            assert!(dollars(&found.outcomes[0]) <= dollars(&before), "{} is no better than the default", found.policy);
        }
        if name != "token-rate" {
            continue;
        }
        let again = search(&policy, &[&play], &Goal::default(), 1, &quiet()).unwrap();
        assert_eq!(found.policy, again.policy, "deterministic, whatever the threads");
    }
}

#[test]
fn what_cannot_be_kept_to_is_said() {
    let (plan, demand) = (plan(), days(1));
    let goal = Goal { attained: Some(0.99), ..Goal::default() };
    let play = compare::fluid(&plan, &demand);
    let found = search(&"forecast".parse().unwrap(), &[&play], &goal, 2, &quiet()).unwrap();
    assert!(!found.met, "the fluid mode has no engines that could attain anything");
}

#[test]
fn the_first_part_is_all_that_is_learnt_from() {
    let part = first(&days(2), 86_400.0);
    assert_eq!(part.load.len(), 8640);
    assert_eq!(part.load, days(1).load);
    assert_eq!((part.requests.len(), part.prefill.len()), (8640, 8640));
}
