//! Prefill and decode are judged apart: an average of both hides that one is full, so that a prefill-heavy load never got a prefill
//! replica (llm-d-autoscaling 1213).

use ledger::Timestamp;

use super::Guards;
use crate::scale::observe::{Observation, Sample};
use crate::scale::{Policy, Verdict, judge};

/// One of each for the two pools of a fleet that splits prefill from decode.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Roles<T> {
    /// The pool that reads prompts.
    pub prefill: T,
    /// The pool that writes answers.
    pub decode: T,
}

/// One look at both pools together as each pool's own: the prefill's part of the load is the one's, the rest the other's. Readings
/// that cannot be divided are unknown to both.
#[must_use]
pub fn apart(sample: &Sample) -> Roles<Sample> {
    let decode_load = sample.load.zip(sample.prefill_load).map(|(load, prefill)| (load - prefill).max(0.0));
    let shared = Sample { running: None, kv_used: None, utilisation: None, ..*sample };
    Roles {
        prefill: Sample { load: sample.prefill_load, output_tokens_per_s: None, tpot_s: None, ..shared },
        decode: Sample { load: decode_load, input_tokens_per_s: None, waiting: None, ttft_s: None, ..shared },
    }
}

/// Each pool's policy behind its guards, from what that pool shows alone.
#[must_use]
pub fn judge_apart(
    observations: &Roles<Observation>,
    policies: &Roles<Policy>,
    guards: &Guards,
    now: Timestamp,
) -> Roles<Verdict> {
    Roles {
        prefill: judge(&observations.prefill, &policies.prefill, guards, now),
        decode: judge(&observations.decode, &policies.decode, guards, now),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scale::guard::scene::Scene;

    #[test]
    fn llm_d_autoscaling_1213_a_prefill_heavy_load_gets_prefill_replicas() {
        // Four replicas at a load of 2.6 look half idle; two of them read prompts and have 2.3 of it.
        let both = Sample { load: Some(2.6), prefill_load: Some(2.3), ..Sample::default() };
        let Roles { prefill, decode } = apart(&both);
        assert_eq!(prefill.load, Some(2.3));
        assert!((decode.load.unwrap() - 0.3).abs() < 1e-9);
        let (prefill, decode) = (Scene::steady(2, 2.3), Scene::steady(2, decode.load.unwrap()));
        let policy: Policy = "token-rate".parse().unwrap();
        let policies = Roles { prefill: policy.clone(), decode: policy.clone() };
        let observations = Roles { prefill: prefill.observation(), decode: decode.observation() };
        let verdicts = judge_apart(&observations, &policies, &Guards::default(), prefill.now);
        assert_eq!(verdicts.prefill.decision.replicas, 3);
        assert_eq!(verdicts.decode.decision.replicas, 1);
        // Together nothing would have happened.
        let together = Scene::steady(4, 2.6);
        assert_eq!(judge(&together.observation(), &policy, &Guards::default(), together.now).decision.replicas, 4);
    }

    #[test]
    fn what_cannot_be_divided_is_unknown_and_not_zero() {
        let both = Sample { load: Some(2.0), kv_used: Some(0.5), running: Some(10.0), ..Sample::default() };
        let Roles { prefill, decode } = apart(&both);
        assert_eq!((prefill.load, decode.load, prefill.kv_used, decode.running), (None, None, None, None));
    }
}
