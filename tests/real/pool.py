"""Two real vLLM servers on one machine as a pool whose time is shared: who caused what, held against what really happens
when one of the tenants stays away.

Prints tables and `N passed, N failed`; ends with status 1 when anything failed."""

import argparse
import concurrent.futures
import dataclasses
import json
import pathlib
import random
import shutil
import sys
import tempfile
import time
import urllib.request

from checks import Checks, table
from processes import Engine, Farthing

RATE = "3.60"
# How far a share may lie outside of what leaving out and being alone say: no two runs on a machine that others use are alike.
SLACK = 0.10
SIZES = {"small": (4, 256), "large": (12, 512)}


@dataclasses.dataclass
class Tenant:
    """What one tenant asks."""

    name: str
    model: str
    requests: int
    input_words: int
    output_tokens: int


# Four bills of clearly different size and kind: a big model, long answers, long prompts, hardly anything.
TENANTS = [
    Tenant("carol", "large", 8, 60, 160),
    Tenant("bob", "small", 10, 20, 220),
    Tenant("alice", "small", 40, 700, 4),
    Tenant("dave", "small", 3, 20, 8),
]


def config(engines, folder):
    sections = [f"""
[[gpu]]
name = "host"
bf16_tflops = 2
gb_per_s = 40
memory_gb = 8

[[pool]]
name = "shared"
owner = "platform"
gpu = "host"
gpus = 1
usd_per_gpu_hour = "{RATE}"

[telemetry]
scrape_every_ms = 500

[settlement]
lag_ms = 2000
"""]
    for name, engine in engines.items():
        model = folder / f"{name}.json"
        shutil.copy(engine.model_folder() / "config.json", model)
        sections.append(f"""
[[upstream]]
name = "{name}"
kind = "vllm"
base_url = "{engine.url}"
pool = "shared"
deployment = "{name}"
engine = {{ model_config = "{model}" }}

[[route]]
model = "{name}"
targets = [{{ upstream = "{name}" }}]
""")
    return "".join(sections)


def prompt(words, seed):
    """Words that no other request has, so that no prefix cache helps."""
    dice = random.Random(seed)
    return " ".join("".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=3)) for _ in range(words))


def complete(url, key, model, text, tokens):
    """One completion; what it used, as the engine says."""
    body = {"model": model, "prompt": text, "max_tokens": tokens, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    call = urllib.request.Request(url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {}))
    with urllib.request.urlopen(call, timeout=300) as answer:
        events = [json.loads(line[6:]) for line in answer.read().decode().split("\n") if line.startswith("data: {")]
    usage = next(event["usage"] for event in reversed(events) if event.get("usage"))
    return usage["prompt_tokens"], usage["completion_tokens"]


@dataclasses.dataclass
class Phase:
    """One stretch of traffic: when it was, what the engines' cores worked for it, and the tokens of those who went past."""

    start: float
    end: float
    spent: float
    past: tuple


def run(engines, gateway, tenants, seconds=None, bypass=(), idle=0.0):
    """Lets `tenants` ask through the gateway and `bypass` past it: each one after the other, so that a tenant's work is the same whoever
    else is there, or spread over `seconds`. `idle` is what the engines' processes use per second anyhow."""
    before = sum(engine.cpu_seconds() for engine in engines.values())
    start, wall = time.monotonic(), time.time()

    def ask(tenant, through, numbers):
        url, key = (gateway.url, gateway.keys[tenant.name]) if through else (engines[tenant.model].url, None)
        answers = []
        for number in numbers:
            if seconds:
                time.sleep(max(0.0, start + number * seconds / tenant.requests - time.monotonic()))
            text = prompt(tenant.input_words, f"{time.time()}-{tenant.name}-{number}")
            answers.append((key, complete(url, key, tenant.model, text, tenant.output_tokens)))
        return answers

    turns = [
        (tenant, through, numbers) for group, through in ((tenants, True), (bypass, False)) for tenant in group
        for numbers in ([[number] for number in range(tenant.requests)] if seconds else [range(tenant.requests)])
    ]
    with concurrent.futures.ThreadPoolExecutor(len(turns)) as pool:
        answers = [answer for answers in pool.map(lambda turn: ask(*turn), turns) for answer in answers]
    lasted = time.monotonic() - start
    spent = sum(engine.cpu_seconds() for engine in engines.values()) - before - idle * lasted
    print(f"{', '.join(tenant.name for tenant in (*tenants, *bypass))}: {lasted:.1f} s, {spent:.2f} core-s above {idle:.3f} a second when idle", file=sys.stderr)
    past = [used for key, used in answers if key is None]
    # Long enough for the engines to be read while they are quiet.
    time.sleep(2)
    return Phase(wall, time.time(), spent, (sum(used[0] for used in past), sum(used[1] for used in past)))


def idle_rate(engines, seconds=5):
    """Core seconds per second that the engines use while nobody asks."""
    before = sum(engine.cpu_seconds() for engine in engines.values())
    time.sleep(seconds)
    return (sum(engine.cpu_seconds() for engine in engines.values()) - before) / seconds


def calibrate(checks, engines, gateway):
    """Traffic of many kinds until the constants of both engines are fitted to it, which takes effect with the next minute."""
    mixed = [dataclasses.replace(tenant, requests=40, output_tokens=tenant.output_tokens // 2 + 2) for tenant in TENANTS]
    until = time.monotonic() + 600
    while time.monotonic() < until:
        run(engines, gateway, mixed, 60)
        fitted = gateway.rows("SELECT engine, max(period_start) AS since, max(setup) AS setup FROM engines WHERE setup NOT LIKE '%\"error\":null%' GROUP BY engine")
        if len(fitted) == len(engines):
            time.sleep(60 - time.time() % 60 + 1)
            break
    checks.equal("the constants of both engines are fitted to what they did", sorted(row["engine"] for row in fitted), sorted(engines))
    rows = [("engine", "compute", "bandwidth", "overhead ms", "overlap", "median error", "p95")]
    for row in fitted:
        setup = json.loads(row["setup"])
        constants, error = setup["constants"], setup["error"]
        reached = constants["efficiencies"]
        rows.append((row["engine"], f"{reached['compute']:.3f}", f"{reached['bandwidth']:.3f}", f"{1e3 * reached['overhead_s']:.2f}", f"{constants['overlap']:.2f}", f"{error['median']:.1%}", f"{error['p95']:.1%}"))
    table("Constants", rows)


def charged_in(gateway, phases):
    """GPU-seconds that each tenant is charged for its requests in these phases."""
    moment = lambda at: f"to_timestamp_micros({int(at * 1e6)})"
    within = " OR ".join(f"a.received_at BETWEEN {moment(phase.start)} AND {moment(phase.end)}" for phase in phases)
    rows = gateway.rows(
        "SELECT p.consumer AS consumer, sum(p.gpu_us) AS gpu_us FROM postings p JOIN attempts a ON p.request_id = a.request_id AND p.attempt = a.attempt"
        f" WHERE p.pool = 'shared' AND p.line = 'request' AND ({within}) GROUP BY p.consumer"
    )
    return {row["consumer"]: int(row["gpu_us"]) / 1e6 for row in rows}


def least(phases):
    """Core seconds of the same work done several times. Whatever else runs on the machine only adds to it, so the least is nearest."""
    return min(phase.spent for phase in phases)


def unobserved(gateway):
    """GPU-seconds that the books say bypassed the gateway, so far."""
    row = gateway.rows("SELECT sum(gpu_us) AS gpu_us, sum(effective_cost) AS usd FROM postings WHERE pool = 'shared' AND line = 'unobserved'")[0]
    return int(row["gpu_us"] or 0) / 1e6, float(row["usd"] or 0)


def unobserved_tokens(gateway):
    """The growth of the engines' counters while the ledger watched, less what it metered: input and output tokens."""
    grown = gateway.rows(
        "SELECT engine, max(prompt_tokens) - min(prompt_tokens) AS input, max(generation_tokens) - min(generation_tokens) AS output FROM readings GROUP BY engine"
    )
    metered = gateway.rows("SELECT sum(input_tokens) AS input, sum(output_tokens) AS output FROM attempts WHERE pool = 'shared'")[0]
    return tuple(sum(int(row[kind]) for row in grown) - int(metered[kind]) for kind in ("input", "output"))


def watched(gateway, engines):
    """Waits until every engine was read once, so that counters have a start."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        if len(gateway.rows("SELECT DISTINCT engine FROM readings")) == len(engines):
            return
        time.sleep(0.5)
    raise SystemExit("the engines were not read within half a minute")


def compared(checks, gateway, everybody, without, alone):
    shares = charged_in(gateway, everybody)
    checks.equal("every tenant is charged", sorted(shares), sorted(tenant.name for tenant in TENANTS))
    charged, whole = sum(shares.values()), least(everybody)
    marginal = {name: whole - least(phases) for name, phases in without.items()}
    alone = {name: least(phases) for name, phases in alone.items()}
    rows = [("tenant", "charged GPU-s", "share", "marginal core-s", "of all", "stand-alone core-s", "of all")]
    for name, seconds in sorted(shares.items(), key=lambda item: -item[1]):
        rows.append((name, f"{seconds:.2f}", f"{seconds / charged:.1%}", f"{marginal[name]:.2f}", f"{marginal[name] / whole:.1%}", f"{alone[name]:.2f}", f"{alone[name] / whole:.1%}"))
    table(f"Who caused what: charged against runs without the tenant, and of the tenant alone ({whole:.1f} core-s in all)", rows)
    by = lambda amounts: sorted(amounts, key=amounts.get, reverse=True)
    checks.equal("leaving one out ranks the tenants as the attribution does", by(shares), by(marginal))
    checks.equal("asking alone ranks the tenants as the attribution does", by(shares), by(alone))
    outside = [
        name for name in shares
        if not marginal[name] / whole - SLACK <= shares[name] / charged <= alone[name] / whole + SLACK
    ]
    checks.equal(f"marginal <= share <= stand-alone, within {SLACK:.0%} of all", outside, [])


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=2, help="how often each phase is repeated (default 2)")
    arguments.add_argument("--keep", action="store_true", help="keep the ledger and logs")
    arguments = arguments.parse_args()
    checks = Checks()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="farthing-pool-"))
    # Both compute on one core, which therefore is the shared device: its time is sliced between them.
    engines, gateway, good = {name: Engine(folder, name, size, core=0) for name, size in SIZES.items()}, None, False
    try:
        print("waiting for two vLLM servers", file=sys.stderr)
        for engine in engines.values():
            engine.wait_until_ready()
        gateway = Farthing(folder, "books", config(engines, folder), consumers=[tenant.name for tenant in TENANTS])
        watched(gateway, engines)
        calibrate(checks, engines, gateway)
        phase = lambda tenants, **more: run(engines, gateway, tenants, idle=idle, **more)
        idle = idle_rate(engines)
        everybody, without, alone = [], {tenant.name: [] for tenant in TENANTS}, {tenant.name: [] for tenant in TENANTS}
        for _ in range(arguments.rounds):
            everybody.append(phase(TENANTS))
            for tenant in TENANTS:
                without[tenant.name].append(phase([other for other in TENANTS if other is not tenant]))
                alone[tenant.name].append(phase([tenant]))
        checks.equal("nobody went past: engine counters less metered tokens", unobserved_tokens(gateway), (0, 0))
        quiet = time.time()
        past = phase(TENANTS, bypass=[Tenant("nobody", "small", 8, 40, 100)])
        checks.that("farthing stops cleanly", gateway.stop())
        gateway.run("settle")
        verified = gateway.run("verify")
        checks.that("the pool's postings add up to its cost to the picodollar", verified.get("balanced") is True, "" if verified.get("balanced") else verified)
        compared(checks, gateway, everybody, without, alone)
        # Traffic that goes past the gateway shows up as unobserved, and nowhere else.
        checks.equal("engine counters less metered tokens are the bypassing tokens", unobserved_tokens(gateway), past.past)
        early = gateway.rows(f"SELECT count(*) AS n FROM postings WHERE line = 'unobserved' AND period_end <= to_timestamp_micros({int(quiet * 1e6)})")[0]
        checks.equal("before anybody went past: postings of unobserved traffic", int(early["n"]), 0)
        seconds, usd = unobserved(gateway)
        checks.that("the bypassing traffic is charged to its own line", seconds > 0, f"{seconds:.2f} GPU-s, {usd:.6f} USD")
        left = gateway.rows("SELECT sum(effective_cost) AS usd FROM postings WHERE line = 'unallocated'")[0]["usd"]
        checks.that("nothing is left unallocated", not float(left or 0), left or "")
        lines = gateway.rows("SELECT line, sum(effective_cost) AS usd, sum(gpu_us) / 1e6 AS gpu_s FROM postings WHERE pool = 'shared' GROUP BY line ORDER BY line")
        table("The pool's lines over the whole run", [("line", "USD", "GPU-s")] + [(row["line"], row["usd"], f"{float(row['gpu_s']):.2f}") for row in lines])
        good = checks.report()
    finally:
        if gateway:
            gateway.stop()
        for engine in engines.values():
            engine.stop()
        if good and not arguments.keep:
            shutil.rmtree(folder)
        else:
            print(f"ledger and logs: {folder}", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
