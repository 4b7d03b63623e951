//! Every format as it is published, in a few lines; what is wrong is named with its line.

use super::*;

/// Files that are gone when the test is over.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Files {
        Files(tempfile::tempdir().unwrap())
    }

    fn add(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }
}

fn all(trace: &Trace) -> Vec<Arrival> {
    trace.arrivals().unwrap().map(Result::unwrap).collect()
}

fn brief(trace: &Trace) -> Vec<(u64, u64, u32, u32)> {
    all(trace).iter().map(|a| (a.id, a.at_us, a.input_tokens, a.output_tokens)).collect()
}

const PAIRS: &str = "TIMESTAMP,ContextTokens,GeneratedTokens\n\
    2023-11-16 18:17:03.9799600,4808,10\n\
    2023-11-16 18:17:04.0319600,3180,8\r\n\
    2023-11-16 18:17:05.9799600,110,27\n";
const BINS: &str = "Time,TIMESTAMP\n2024-05-10 00:00:00,146\n2024-05-10 00:00:10,0\n2024-05-10 00:00:20,268\n";

#[test]
fn azure_2023_has_a_request_a_line() {
    let files = Files::new();
    let trace = Trace::open(&files.add("a2023.csv", PAIRS), &TraceOptions::default()).unwrap();
    assert_eq!(brief(&trace), [(0, 0, 4808, 10), (1, 52_000, 3180, 8), (2, 2_000_000, 110, 27)]);
    assert_eq!(brief(&trace), brief(&trace), "it can be read again");
    assert_eq!(trace.start().to_string(), "2023-11-16T18:17:03.979960Z");
    assert_eq!(trace.mix(2).unwrap(), [(4808, 10), (3180, 8)]);
    let window = TraceOptions { from_s: Some(0.05), to_s: Some(1.0), ..TraceOptions::default() };
    let part = Trace::open(&files.add("a2023w.csv", PAIRS), &window).unwrap();
    assert_eq!(brief(&part), [(0, 2_000, 3180, 8)]);
    assert_eq!(part.start().to_string(), "2023-11-16T18:17:04.029960Z");
    assert_eq!(brief(&trace.between(0.05, 1.0, 1.0)), brief(&part));
}

#[test]
fn a_hybrid_draws_lengths_at_recorded_rates_and_says_so() {
    let files = Files::new();
    let (pairs, bins) = (files.add("h2023.csv", PAIRS), files.add("h2024.csv", BINS));
    let trace = Trace::hybrid(&pairs, &bins, &TraceOptions::default()).unwrap();
    let arrivals = all(&trace);
    assert_eq!(arrivals.len(), 146 + 268);
    assert!(arrivals.is_sorted_by_key(|arrival| arrival.at_us));
    assert!(arrivals.iter().zip(0..).all(|(arrival, id)| arrival.id == id));
    let in_bin = |bin: u64| arrivals.iter().filter(|arrival| arrival.at_us / 10_000_000 == bin).count();
    assert_eq!([in_bin(0), in_bin(1), in_bin(2)], [146, 0, 268]);
    let pair = |input, output| arrivals.iter().filter(|a| (a.input_tokens, a.output_tokens) == (input, output)).count();
    let counts = [pair(4808, 10), pair(3180, 8), pair(110, 27)];
    assert_eq!(counts.iter().sum::<usize>(), 414);
    assert!(counts.iter().all(|count| (90..190).contains(count)), "{counts:?}");
    assert!(trace.notes()[0].starts_with("a hybrid: 3 pairs"), "{:?}", trace.notes());
    assert_eq!(trace.start().to_string(), "2024-05-10T00:00:00Z");

    let seeded = |seed| all(&Trace::hybrid(&pairs, &bins, &TraceOptions { seed, ..TraceOptions::default() }).unwrap());
    assert_eq!(seeded(1), arrivals);
    assert_ne!(seeded(2), arrivals);
    let last = TraceOptions { from_s: Some(20.0), ..TraceOptions::default() };
    let part = all(&Trace::hybrid(&pairs, &bins, &last).unwrap());
    assert!(part.iter().zip(&arrivals[146..]).all(|(a, b)| a.at_us + 20_000_000 == b.at_us), "a part is a part");
}

#[test]
fn more_or_fewer_requests_are_spread_between_the_recorded_ones() {
    let files = Files::new();
    let (pairs, bins) = (files.add("s2023.csv", PAIRS), files.add("s2024.csv", BINS));
    let scaled = |scale| TraceOptions { scale, ..TraceOptions::default() };
    let triple = Trace::open(&pairs, &scaled(3.0)).unwrap();
    let times: Vec<u64> = all(&triple).iter().map(|arrival| arrival.at_us).collect();
    assert_eq!(times[..4], [0, 17_333, 34_666, 52_000]);
    assert_eq!(times.len(), 9);
    assert!(times.is_sorted());
    let count = |scale| all(&Trace::hybrid(&pairs, &bins, &scaled(scale)).unwrap()).len();
    assert_eq!(count(2.0), 828);
    assert!((206..=208).contains(&count(0.5)), "{}", count(0.5));
    assert!(triple.notes()[0].contains("3 times"));
}

#[test]
fn mooncake_keeps_what_prompts_share() {
    let files = Files::new();
    let text = "{\"timestamp\": 0, \"input_length\": 1100, \"output_length\": 52, \"hash_ids\": [46, 47, 48]}\n\
        {\"timestamp\": 3052, \"input_length\": 700, \"output_length\": 5, \"hash_ids\": [46, 99]}\n";
    let trace = Trace::open(&files.add("mooncake.jsonl", text), &TraceOptions::default()).unwrap();
    let arrivals = all(&trace);
    assert_eq!(brief(&trace), [(0, 0, 1100, 52), (1, 3_052_000, 700, 5)]);
    assert_eq!(trace.prefixes().block_tokens, 512);
    assert_eq!(trace.prefixes().of(&arrivals[0]), [46, 47, 48]);
    assert_eq!(trace.prefixes().of(&arrivals[1]), [46, 99]);
}

#[test]
fn own_lines_and_tables_say_seconds_or_dates() {
    let files = Files::new();
    let json = "{\"at\": 0.25, \"input_tokens\": 512, \"output_tokens\": 128}\n\n\
        {\"arrival\": 1, \"prompt_tokens\": 5, \"completion_tokens\": 6, \"user\": \"x\"}\n";
    let own = Trace::open(&files.add("own.jsonl", json), &TraceOptions::default()).unwrap();
    assert_eq!(brief(&own), [(0, 250_000, 512, 128), (1, 1_000_000, 5, 6)]);
    let table = "output_tokens,at,input_tokens\n128,2026-11-24T01:00:00Z,512\n6,2026-11-24T01:00:00.5Z,5\n";
    let own = Trace::open(&files.add("own.csv", table), &TraceOptions::default()).unwrap();
    assert_eq!(brief(&own), [(0, 0, 512, 128), (1, 500_000, 5, 6)]);
    assert_eq!(own.start().to_string(), "2026-11-24T01:00:00Z");
    let unix = "{\"arrival_time\": 1787267980.5, \"input_toks\": 7, \"output_toks\": 9}\n";
    let own = Trace::open(&files.add("unix.jsonl", unix), &TraceOptions::default()).unwrap();
    assert_eq!(brief(&own), [(0, 0, 7, 9)]);
}

#[test]
fn what_is_wrong_is_named_with_its_line_and_what_would_be_right() {
    let files = Files::new();
    let json = |line: &str| format!("{{\"at\": 5, \"input_tokens\": 1, \"output_tokens\": 1}}\n{line}\n");
    let mooncake = "{\"timestamp\": 0, \"input_length\": 1, \"output_length\": 1}\n";
    for (name, text, expected) in [
        ("no.csv", "a,b,c\n1,2,3\n".to_owned(), "no.csv:1: `a,b,c` begins no trace"),
        ("empty.csv", "\n\n".to_owned(), "empty.csv: there are no requests in it"),
        ("heading.csv", "at,input_tokens,output_tokens\n".to_owned(), "heading.csv: there are no requests in it"),
        ("cut.csv", format!("{PAIRS}2023-11-16 18:17:06,7\n"), "cut.csv:5: has no column 3"),
        ("word.csv", format!("{PAIRS}2023-11-16 18:17:06,x,7\n"), "word.csv:5: `x` is no number of tokens"),
        ("zero.csv", format!("{PAIRS}2023-11-16 18:17:06,7,0\n"), "zero.csv:5: `output tokens` is 0"),
        ("back.csv", format!("{PAIRS}2023-11-16 18:17:04,7,7\n"), "back.csv:5: arrives before the line before; sort"),
        ("date.csv", format!("{PAIRS}yesterday,7,7\n"), "date.csv:5: `yesterday` is not a time"),
        ("broken.jsonl", json("{"), "broken.jsonl:2: EOF"),
        ("field.jsonl", json("{\"at\": 6, \"input_tokens\": 1}"), "field.jsonl:2: missing field `output_tokens`"),
        (
            "minus.jsonl",
            json("{\"at\": -6, \"input_tokens\": 1, \"output_tokens\": 1}"),
            "minus.jsonl:2: `-6` is no time",
        ),
        ("moon.jsonl", format!("{mooncake}{{}}\n"), "moon.jsonl:2: missing field `timestamp`"),
        ("count.csv", format!("{BINS}2024-05-10 00:00:30,many\n"), "count.csv:5: `many` is no count of requests"),
        ("order.csv", format!("{BINS}2024-05-10 00:00:10,5\n"), "order.csv:5: is not later than the line before"),
        ("odd.csv", format!("{BINS}2024-05-10 00:00:35,5\n"), "odd.csv:5: is not a whole number of 10 s bins"),
    ] {
        let path = files.add(name, &text);
        let options = TraceOptions { tokens: Some((10, 10)), ..TraceOptions::default() };
        let read = Trace::open(&path, &options).and_then(|trace| trace.arrivals()?.try_for_each(|a| a.map(drop)));
        let said = read.map(|()| "nothing".to_owned()).unwrap_or_else(|error| error.to_string());
        let said = said.replace(&format!("{}/", path.parent().unwrap().display()), "");
        assert!(said.starts_with(expected), "{name}: {said}");
    }
    let bins = files.add("bare.csv", BINS);
    let said = Trace::open(&bins, &TraceOptions::default()).unwrap_err().to_string();
    assert!(said.contains("counts requests without their tokens"), "{said}");
    let none = TraceOptions { from_s: Some(1e6), tokens: Some((1, 1)), ..TraceOptions::default() };
    let said = Trace::open(&bins, &none).unwrap_err().to_string();
    assert!(said.contains("no requests in it between the times"), "{said}");
    assert!(
        Trace::open(Path::new("/nowhere/x.csv"), &none).unwrap_err().to_string().starts_with("cannot read /nowhere")
    );
}

#[test]
fn made_up_rates_are_what_comes() {
    let rates = [5.0, 0.0, 20.0];
    let trace = Trace::rates("steps", Timestamp::default(), 100.0, &rates, &[(10, 20), (30, 40)], 1);
    let arrivals = all(&trace);
    let in_bin = |bin: u64| arrivals.iter().filter(|arrival| arrival.at_us / 100_000_000 == bin).count();
    assert!((430..570).contains(&in_bin(0)) && in_bin(1) == 0 && (1860..2140).contains(&in_bin(2)));
}

/// The published week, where it is present.
#[test]
fn the_week_of_2024_adds_up_to_its_published_sums() {
    let folder = std::env::var_os("FARTHING_DATA")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data"), PathBuf::from);
    for (name, requests, bins) in [("code", 16_803_695_u64, 60_481), ("conv", 27_303_999, 60_481)] {
        let path = folder.join(format!("traces/azure_llm_2024_{name}_10s.csv"));
        if !path.exists() {
            println!("skipped: {} is not there", path.display());
            return;
        }
        let counts = bins::read(&path).unwrap();
        assert_eq!((counts.counts.len(), counts.bin_us), (bins, 10_000_000));
        assert_eq!(counts.counts.iter().map(|&count| u64::from(count)).sum::<u64>(), requests);
    }
}
