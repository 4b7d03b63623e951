//! What the demo's users do: a plan of tasks of three teams, drawn from a seed and nothing else.
//!
//! A task becomes several calls, one after the other: an agent works with a context that grows, a chat goes back and
//! forth, a batch job asks many short questions. Applications put the same long instructions before everything they
//! ask, which is what prefix caches live from.

use fleet::engine::text::answer_word;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// The holder of one virtual key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Consumer {
    /// Who it is.
    pub name: &'static str,
    /// The application that the key is for.
    pub application: Option<&'static str>,
    /// The team that pays. Nobody pays for what has none.
    pub team: Option<&'static str>,
    /// Where finance books it.
    pub cost_centre: Option<&'static str>,
}

/// Everybody who calls. The last one was set up in a hurry and belongs to no team.
pub static CONSUMERS: [Consumer; 7] = [
    Consumer {
        name: "support-desk",
        application: Some("helpdesk"),
        team: Some("support"),
        cost_centre: Some("CC-4100"),
    },
    Consumer {
        name: "support-triage",
        application: Some("triage"),
        team: Some("support"),
        cost_centre: Some("CC-4100"),
    },
    Consumer {
        name: "search-answers",
        application: Some("answers"),
        team: Some("search"),
        cost_centre: Some("CC-4200"),
    },
    Consumer { name: "search-index", application: Some("indexer"), team: Some("search"), cost_centre: Some("CC-4200") },
    Consumer {
        name: "research-agent",
        application: Some("paper-agent"),
        team: Some("research"),
        cost_centre: Some("CC-4300"),
    },
    Consumer {
        name: "research-notebook",
        application: Some("notebook"),
        team: Some("research"),
        cost_centre: Some("CC-4300"),
    },
    Consumer { name: "nightly-script", application: None, team: None, cost_centre: None },
];

/// The kind of a user task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskKind {
    /// Sequential calls with a context that grows.
    Agent,
    /// A conversation with pauses.
    Chat,
    /// Many short calls that know nothing of each other.
    Batch,
}

impl TaskKind {
    /// The name in task ids.
    pub const fn name(self) -> &'static str {
        match self {
            TaskKind::Agent => "agent",
            TaskKind::Chat => "chat",
            TaskKind::Batch => "batch",
        }
    }
}

/// Which protocol a call speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Surface {
    /// `POST /v1/chat/completions`
    Chat,
    /// `POST /v1/completions`
    Completions,
    /// `POST /v1/messages`
    Messages,
}

/// One call of a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// The model asked.
    pub model: &'static str,
    /// The protocol.
    pub surface: Surface,
    /// What the user, or the agent's tool, says in this turn.
    pub text: String,
    /// Most tokens of the answer.
    pub max_tokens: u32,
    /// Whether the answer is streamed.
    pub stream: bool,
    /// Whether a streamed answer is asked to end with its usage.
    pub asks_usage: bool,
    /// Hang up after so many tokens of a streamed answer.
    pub abort_after_tokens: Option<u32>,
    /// Pause before the call.
    pub pause_us: u64,
}

/// One user task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// When it starts, after the beginning of the traffic.
    pub start_us: u64,
    /// Index into [`CONSUMERS`].
    pub consumer: usize,
    /// What it is.
    pub kind: TaskKind,
    /// Its id, which all its calls carry.
    pub id: String,
    /// W3C trace id, 32 hex digits.
    pub trace_id: String,
    /// The conversation, for chats.
    pub session: Option<String>,
    /// The product feature.
    pub feature: Option<&'static str>,
    /// The customer it is done for.
    pub customer: Option<String>,
    /// Instructions that come before every call.
    pub instructions: String,
    /// Its calls, in order.
    pub calls: Vec<Call>,
}

impl Task {
    /// Whether a call sees the calls before it.
    pub fn remembers(&self) -> bool {
        self.kind != TaskKind::Batch
    }
}

/// What one consumer does.
struct Profile {
    consumer: usize,
    weight: u32,
    kind: TaskKind,
    feature: Option<&'static str>,
    /// Drawn for each call; the last one is for the last call of an agent.
    models: &'static [&'static str],
    surface: Surface,
    calls: (u32, u32),
    words: (u32, u32),
    instruction_words: u32,
    max_tokens: u32,
}

const CHAT: Profile = Profile {
    consumer: 0,
    weight: 5,
    kind: TaskKind::Chat,
    feature: Some("live-chat"),
    models: &["model-a"],
    surface: Surface::Chat,
    calls: (2, 5),
    words: (8, 40),
    instruction_words: 220,
    max_tokens: 96,
};

const AGENT: Profile = Profile {
    consumer: 2,
    weight: 4,
    kind: TaskKind::Agent,
    feature: Some("deep-answer"),
    models: &["model-b", "model-b", "model-b", "gpt-4o-mini"],
    calls: (3, 8),
    words: (30, 150),
    instruction_words: 400,
    ..CHAT
};

const BATCH: Profile = Profile {
    consumer: 1,
    weight: 2,
    kind: TaskKind::Batch,
    feature: Some("routing"),
    models: &["model-a"],
    surface: Surface::Completions,
    calls: (6, 12),
    words: (20, 60),
    instruction_words: 64,
    max_tokens: 12,
};

static PROFILES: [Profile; 7] = [
    CHAT,
    AGENT,
    Profile {
        consumer: 4,
        weight: 3,
        feature: Some("literature-review"),
        models: &["model-c", "model-c", "claude-sonnet-4-5"],
        ..AGENT
    },
    BATCH,
    Profile { consumer: 3, feature: Some("labels"), models: &["model-b"], ..BATCH },
    Profile {
        consumer: 5,
        weight: 2,
        feature: None,
        models: &["gpt-4o", "claude-sonnet-4-5", "model-c"],
        words: (20, 80),
        instruction_words: 120,
        ..CHAT
    },
    Profile {
        consumer: 6,
        weight: 1,
        feature: None,
        models: &["gpt-4o-mini", "model-a"],
        surface: Surface::Chat,
        calls: (4, 8),
        ..BATCH
    },
];

/// Share of streamed calls whose client hangs up.
const ABORT_SHARE: f64 = 0.06;
/// Of the streamed calls, those that ask for their usage themselves.
const ASKS_USAGE_SHARE: f64 = 0.7;

/// Plans tasks that start within `seconds`, on average `tasks_per_second` of them in a second, in order of their start.
/// The first tasks visit every profile once, so that a short demo shows everything.
pub fn plan(seed: u64, seconds: f64, tasks_per_second: f64) -> Vec<Task> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut tasks = Vec::new();
    let mut start_s = 0.0;
    while start_s < seconds {
        let profile = PROFILES.get(tasks.len()).unwrap_or_else(|| draw_profile(&mut rng));
        tasks.push(task(profile, tasks.len(), start_s, &mut rng));
        // Arrivals of many independent users: exponential gaps.
        start_s += -(1.0 - rng.random::<f64>()).ln() / tasks_per_second.max(1e-6);
    }
    tasks
}

/// The wave of a deployment that is scaled: requests a second at its foot and at its crest.
const WAVE_PER_S: (f64, f64) = (2.0, 16.0);

const WAVE: Profile = Profile {
    consumer: 0,
    weight: 0,
    kind: TaskKind::Batch,
    feature: Some("autocomplete"),
    models: &["model-d"],
    surface: Surface::Chat,
    calls: (1, 1),
    words: (30, 60),
    instruction_words: 40,
    max_tokens: 32,
};

/// Plans tasks of one call each for the deployment that is scaled: few at first, many in the middle of `seconds`, few at the end.
pub fn wave(seed: u64, seconds: f64) -> Vec<Task> {
    let mut rng = StdRng::seed_from_u64(seed.wrapping_add(1));
    let (foot, crest) = WAVE_PER_S;
    let mut tasks = Vec::new();
    let mut start_s = 0.0;
    while start_s < seconds {
        tasks.push(Task { id: format!("wave-{:05}", tasks.len()), ..task(&WAVE, tasks.len(), start_s, &mut rng) });
        let height = (std::f64::consts::PI * start_s / seconds).sin().powi(2);
        start_s += -(1.0 - rng.random::<f64>()).ln() / (foot + (crest - foot) * height);
    }
    tasks
}

fn draw_profile(rng: &mut StdRng) -> &'static Profile {
    let total: u32 = PROFILES.iter().map(|profile| profile.weight).sum();
    let mut left = rng.random_range(0..total);
    for profile in &PROFILES {
        if left < profile.weight {
            return profile;
        }
        left -= profile.weight;
    }
    unreachable!("the draw is below the sum of the weights")
}

fn task(profile: &Profile, number: usize, start_s: f64, rng: &mut StdRng) -> Task {
    let id = format!("{}-{number:05}", profile.kind.name());
    let count = rng.random_range(profile.calls.0..=profile.calls.1);
    let chat_model = profile.models[rng.random_range(0..profile.models.len())];
    let calls = (1..=count).map(|position| {
        let model = match profile.kind {
            // One conversation, one model; an agent lets its strongest model write the end.
            TaskKind::Chat => chat_model,
            TaskKind::Agent if position == count => profile.models[profile.models.len() - 1],
            TaskKind::Agent | TaskKind::Batch => profile.models[rng.random_range(0..profile.models.len())],
        };
        call(profile, model, position, rng)
    });
    let calls: Vec<Call> = calls.collect();
    Task {
        start_us: micros(start_s),
        consumer: profile.consumer,
        kind: profile.kind,
        session: (profile.kind == TaskKind::Chat).then(|| format!("session-{number:05}")),
        id,
        trace_id: format!("{:032x}", rng.random::<u128>().max(1)),
        feature: profile.feature,
        customer: (rng.random::<f64>() < 0.6).then(|| format!("customer-{:02}", rng.random_range(1..=12))),
        // The same for all tasks of a consumer.
        instructions: words(u64::MAX - profile.consumer as u64, profile.instruction_words),
        calls,
    }
}

fn call(profile: &Profile, model: &'static str, position: u32, rng: &mut StdRng) -> Call {
    let surface = if model.starts_with("claude") { Surface::Messages } else { profile.surface };
    let stream = profile.kind != TaskKind::Batch && rng.random::<f64>() < 0.8;
    let aborts = stream && rng.random::<f64>() < ABORT_SHARE;
    let pause_s = match profile.kind {
        _ if position == 1 => 0.0,
        TaskKind::Chat => rng.random_range(0.2..1.5),
        TaskKind::Agent => rng.random_range(0.02..0.2),
        TaskKind::Batch => rng.random_range(0.0..0.02),
    };
    Call {
        model,
        surface,
        text: words(rng.random(), rng.random_range(profile.words.0..=profile.words.1)),
        max_tokens: profile.max_tokens,
        stream,
        asks_usage: stream && rng.random::<f64>() < ASKS_USAGE_SHARE,
        abort_after_tokens: aborts.then(|| rng.random_range(2..20)),
        pause_us: micros(pause_s),
    }
}

fn words(seed: u64, count: u32) -> String {
    let words: Vec<&str> = (0..count).map(|index| answer_word(seed, index)).collect();
    words.join(" ")
}

fn micros(seconds: f64) -> u64 {
    fleet::engine::scheduler::micros(seconds)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_same_seed_plans_the_same_tasks() {
        assert_eq!(plan(7, 30.0, 2.0), plan(7, 30.0, 2.0));
        assert_ne!(plan(7, 30.0, 2.0), plan(8, 30.0, 2.0));
    }

    #[test]
    fn arrivals_have_the_rate_that_was_asked_for() {
        let tasks = plan(1, 1000.0, 3.0);
        assert!((2800..3200).contains(&tasks.len()), "{}", tasks.len());
        assert!(tasks.is_sorted_by_key(|task| task.start_us));
        assert!(tasks.iter().all(|task| task.start_us < 1_000_000_000));
    }

    #[test]
    fn a_plan_shows_everything_the_demo_is_about() {
        let tasks = plan(3, 60.0, 2.0);
        let consumers: BTreeSet<usize> = tasks.iter().map(|task| task.consumer).collect();
        assert_eq!(consumers.len(), CONSUMERS.len());
        let calls = || tasks.iter().flat_map(|task| &task.calls);
        let models: BTreeSet<&str> = calls().map(|call| call.model).collect();
        let expected = ["claude-sonnet-4-5", "gpt-4o", "gpt-4o-mini", "model-a", "model-b", "model-c"];
        assert_eq!(models.into_iter().collect::<Vec<_>>(), expected);
        assert!(calls().any(|call| call.abort_after_tokens.is_some()));
        assert!(calls().any(|call| call.stream && !call.asks_usage));
        let agents = || tasks.iter().filter(|task| task.kind == TaskKind::Agent);
        assert!(agents().all(|task| (3..=8).contains(&task.calls.len())));
        let ids: BTreeSet<&str> = tasks.iter().map(|task| task.id.as_str()).collect();
        assert_eq!(ids.len(), tasks.len());
    }
}
