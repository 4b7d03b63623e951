//! Who is a job, whose, for how long and with which share.

use ledger::Period;

use super::*;

const SECOND: i64 = 1_000_000;

fn at(second: i64) -> Timestamp {
    Timestamp::from_micros(second * SECOND)
}

fn pattern(text: &str) -> Option<Pattern> {
    Some(text.parse().unwrap())
}

fn team(team: &str) -> Context {
    Context { team: Some(team.into()), ..Context::default() }
}

fn rules() -> Rules {
    let pod = |text| HolderPattern { pod: pattern(text), ..HolderPattern::default() };
    let process = |text| HolderPattern { process: pattern(text), ..HolderPattern::default() };
    Rules {
        engines: vec![pod("vllm-*"), process("vllm")],
        jobs: vec![
            JobRule { holder: pod("tune-*"), job: Some("tuning".into()), context: team("research") },
            JobRule {
                holder: HolderPattern { namespace: pattern("lab"), pod: pattern("*"), process: None },
                job: None,
                context: team("lab"),
            },
            JobRule { holder: process("python*"), job: None, context: team("notebooks") },
        ],
        places: vec![Place { pool: "shared".into(), replica: "shared-0".into(), gpus: 4, ..Place::default() }],
        interval_us: 5_000_000,
        ends_after: 3,
    }
}

fn gpu(uuid: &str, pod: &str, active: Option<Millionths>) -> GpuReading {
    GpuReading {
        uuid: uuid.into(),
        pool: Some("shared".into()),
        namespace: Some("prod".into()),
        pod: (!pod.is_empty()).then(|| pod.into()),
        engine_active: active,
        memory_active: active.map(|part| part / 2),
        ..GpuReading::default()
    }
}

fn tuning(start: i64, end: i64, share: Millionths) -> JobFact {
    JobFact {
        job: "tuning".into(),
        pool: "shared".into(),
        replica: "shared-0".into(),
        context: team("research"),
        share,
        period: Period { start: at(start), end: at(end) },
        source: JobSource::PodLabels,
        observed_at: at(end),
    }
}

#[test]
fn patterns_fit_whole_texts() {
    let cases = [
        ("train-*", "train-0", true),
        ("train-*", "retrain-0", false),
        ("*", "", true),
        ("a*b*c", "a-b-b-c", true),
        ("a*b*c", "acb", false),
        ("ab*ba", "aba", false),
        ("*x*", "axb", true),
        ("exact", "exactly", false),
        ("é*", "été", true),
    ];
    for (text, name, fits) in cases {
        assert_eq!(text.parse::<Pattern>().unwrap().fits(name), fits, "{text} on {name}");
    }
    assert!("".parse::<Pattern>().is_err());
}

#[test]
fn the_holder_decides_who_is_a_job_and_activity_caps_its_share() {
    let lab = GpuReading { namespace: Some("lab".into()), ..gpu("GPU-c", "notebook", None) };
    let gpus = [
        gpu("GPU-a", "vllm-0", Some(900_000)),
        gpu("GPU-b", "tune-0", Some(400_000)),
        gpu("GPU-d", "tune-1", Some(600_000)),
        gpu("GPU-d", "", Some(600_000)),
        lab,
        gpu("GPU-e", "who-knows", Some(100_000)),
    ];
    let seen = observe_pods(&rules(), &[], &gpus, at(100));
    let shares: Vec<(&str, Option<&str>, Millionths)> =
        seen.facts.iter().map(|fact| (&*fact.job, fact.context.team.as_deref(), fact.share)).collect();
    assert_eq!(
        shares,
        [
            ("lab/notebook", Some("lab"), 250_000),
            ("prod/who-knows", None, 25_000),
            ("tuning", Some("research"), 250_000),
        ],
        "a whole GPU of four where activity is unknown; without a rule a job of nobody; two pods of one job add up"
    );
    assert_eq!(seen.facts[2], tuning(95, 100, 250_000));
    assert_eq!((seen.open, seen.unknown), (seen.facts, vec![]));
}

#[test]
fn without_named_engines_a_stranger_is_reported_and_not_charged() {
    let cautious = Rules { engines: Vec::new(), ..rules() };
    let gpus = [gpu("GPU-a", "vllm-0", Some(1)), gpu("GPU-a", "vllm-0", Some(1)), gpu("GPU-b", "tune-0", Some(1))];
    let seen = observe_pods(&cautious, &[], &gpus, at(100));
    assert_eq!(seen.facts.len(), 1);
    assert_eq!(seen.unknown, [Label::from("prod/vllm-0")]);
}

#[test]
fn a_job_grows_while_it_is_seen_and_ends_when_it_is_not() {
    // The second of each look, the GPU's activity if the job is seen, and the facts that are to be appended.
    let looks: [(i64, Option<Millionths>, Vec<JobFact>); 7] = [
        (100, Some(800_000), vec![tuning(95, 100, 200_000)]),
        (105, Some(400_000), vec![tuning(95, 105, 150_000)]),
        (105, Some(400_000), vec![]),
        (110, None, vec![]),
        (120, Some(400_000), vec![tuning(95, 120, 120_000)]),
        (136, None, vec![]),
        (140, Some(800_000), vec![tuning(135, 140, 200_000)]),
    ];
    let mut open = Vec::new();
    for (second, active, expected) in looks {
        let gpus: Vec<GpuReading> = active.map(|active| gpu("GPU-a", "tune-0", Some(active))).into_iter().collect();
        let seen = observe_pods(&rules(), &open, &gpus, at(second));
        assert_eq!(seen.facts, expected, "at {second}");
        open = seen.open;
    }
    assert_eq!(open, [tuning(135, 140, 200_000)]);
}

#[test]
fn jobs_on_one_gpu_share_its_activity() {
    let gpus = [gpu("GPU-a", "tune-0", Some(900_000)), gpu("GPU-a", "batch", Some(900_000))];
    let seen = observe_pods(&rules(), &[], &gpus, at(100));
    assert_eq!(seen.facts.iter().map(|fact| fact.share).collect::<Vec<_>>(), [112_500, 112_500]);
}

#[test]
fn a_slice_is_a_part_of_its_gpu() {
    let sliced = |slice: &str| GpuReading { slice: Some(slice.into()), ..gpu("GPU-a", "tune-0", Some(WHOLE)) };
    for (slice, share) in [("3g.40gb#1", 107_143), ("7g.80gb#0", 250_000), ("odd", 250_000)] {
        assert_eq!(observe_pods(&rules(), &[], &[sliced(slice)], at(100)).facts[0].share, share, "{slice}");
    }
}

#[test]
fn gpus_are_found_by_uuid_then_machine_then_pool() {
    let place = |replica: &str, hosts: &[&str], uuids: &[&str]| Place {
        pool: "shared".into(),
        replica: replica.into(),
        gpus: 1,
        hosts: hosts.iter().map(|&host| host.into()).collect(),
        uuids: uuids.iter().map(|&uuid| uuid.into()).collect(),
    };
    let places = vec![place("rest", &[], &[]), place("by-host", &["n1"], &[]), place("by-uuid", &[], &["GPU-u"])];
    let rules = Rules { places, ..rules() };
    let reading = |uuid: &str, host: &str, pool: Option<&str>| GpuReading {
        uuid: uuid.into(),
        host: Some(host.into()),
        pool: pool.map(Label::from),
        ..GpuReading::default()
    };
    let cases = [
        (reading("GPU-u", "n1", Some("shared")), Some("by-uuid")),
        (reading("GPU-v", "n1", None), Some("by-host")),
        (reading("GPU-v", "n2", Some("shared")), Some("rest")),
        (reading("GPU-v", "n2", None), None),
        (reading("GPU-u", "n1", Some("other")), None),
    ];
    for (gpu, replica) in cases {
        assert_eq!(place_of(&rules, &gpu).map(|place| &*place.replica), replica, "{gpu:?}");
    }
}

#[test]
fn processes_are_found_likewise() {
    let gpus = [GpuReading { pod: None, namespace: None, ..gpu("GPU-a", "", None) }];
    let process = |pid, name: Option<&str>| GpuProcess {
        uuid: "GPU-a".into(),
        pid,
        name: name.map(Label::from),
        ..GpuProcess::default()
    };
    let processes = [
        process(1, Some("/opt/vllm/bin/vllm")),
        process(2, Some("/usr/bin/python3.12")),
        process(3, Some("/usr/bin/python3.12")),
        GpuProcess { uuid: "GPU-elsewhere".into(), ..process(4, Some("python")) },
    ];
    let seen = observe_processes(&rules(), &[], &gpus, &processes, at(100));
    let expected = JobFact {
        job: "/usr/bin/python3.12".into(),
        context: team("notebooks"),
        source: JobSource::GpuProcesses,
        ..tuning(95, 100, 250_000)
    };
    assert_eq!(seen.facts, [expected]);
    // A job of pods is not carried on by a look at processes.
    let seen = observe_processes(&rules(), &[tuning(95, 100, 1)], &gpus, &[], at(101));
    assert_eq!(seen.open, []);
}

#[test]
fn engines_named_by_their_pods_say_nothing_of_processes() {
    let by_pod = Rules { engines: rules().engines[..1].to_vec(), jobs: Vec::new(), ..rules() };
    let process = GpuProcess { uuid: "A".into(), name: Some("VLLM::EngineCore".into()), ..GpuProcess::default() };
    let seen = observe_processes(&by_pod, &[], &[gpu("A", "", None)], std::slice::from_ref(&process), at(10));
    assert_eq!((seen.facts.len(), seen.unknown), (0, vec![Label::from("VLLM::EngineCore")]));
    let seen = observe_pods(&by_pod, &[], &[gpu("A", "stranger-0", None)], at(10));
    assert_eq!((seen.facts.len(), seen.unknown.len()), (1, 0));
    let by_process = Rules { engines: rules().engines[1..].to_vec(), ..by_pod };
    assert_eq!(observe_processes(&by_process, &[], &[gpu("A", "", None)], &[process], at(10)).facts.len(), 1);
    assert_eq!(observe_pods(&by_process, &[], &[gpu("A", "stranger-0", None)], at(10)).facts.len(), 0);
}
