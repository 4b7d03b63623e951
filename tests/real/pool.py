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
SIZES = {"small": (4, 256), "large": (12, 512)}


@dataclasses.dataclass
class Tenant:
    """What one tenant asks, evenly spread over a run."""

    name: str
    model: str
    requests: int
    input_words: int
    output_tokens: int


# Four bills of clearly different size and kind: a big model, long answers, long prompts, hardly anything.
TENANTS = [
    Tenant("carol", "large", 12, 60, 160),
    Tenant("bob", "small", 12, 20, 220),
    Tenant("alice", "small", 16, 700, 4),
    Tenant("dave", "small", 4, 20, 12),
]


def config(engines, folder):
    sections = [f"""
[[gpu]]
name = "host"
bf16_tflops = 0.2
gb_per_s = 10
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
        events = [json.loads(line[6:]) for line in answer.read().decode().splitlines() if line.startswith("data: {")]
    usage = next(event["usage"] for event in reversed(events) if event.get("usage"))
    return usage["prompt_tokens"], usage["completion_tokens"]


def run(engines, gateway, tenants, seconds, bypass=()):
    """Lets `tenants` ask through the gateway and `bypass` past it. Processor seconds above the engines' idle, and the tokens
    of those who went past."""
    jobs = [
        (number * seconds / tenant.requests, gateway.url if through else engines[tenant.model].url, gateway.keys.get(tenant.name) if through else None, tenant, number)
        for group, through in ((tenants, True), (bypass, False)) for tenant in group for number in range(tenant.requests)
    ]
    before = {name: engine.cpu_seconds() for name, engine in engines.items()}
    start = time.monotonic()

    def ask(job):
        at, url, key, tenant, number = job
        time.sleep(max(0.0, start + at - time.monotonic()))
        text = prompt(tenant.input_words, f"{time.time()}-{tenant.name}-{number}")
        return key, complete(url, key, tenant.model, text, tenant.output_tokens)

    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        answers = list(pool.map(ask, jobs))
    lasted = time.monotonic() - start
    spent = sum(engine.cpu_seconds() - before[name] for name, engine in engines.items())
    past = [used for key, used in answers if key is None]
    return spent, lasted, (sum(used[0] for used in past), sum(used[1] for used in past))


def idle_rate(engines, seconds=5):
    """Processor seconds per second that the servers use while nobody asks."""
    before = sum(engine.cpu_seconds() for engine in engines.values())
    time.sleep(seconds)
    return (sum(engine.cpu_seconds() for engine in engines.values()) - before) / seconds


def lines(gateway):
    """The pool's postings by line, and what its capacity cost."""
    rows = gateway.rows("SELECT line, sum(effective_cost) AS usd, sum(gpu_us) AS gpu_us FROM postings WHERE pool = 'shared' GROUP BY line")
    return {row["line"]: (float(row["usd"]), int(row["gpu_us"] or 0)) for row in rows}


def paid(gateway):
    """GPU-seconds that each tenant is charged for."""
    rows = gateway.rows("SELECT consumer, sum(effective_cost) AS usd, sum(gpu_us) AS gpu_us FROM postings WHERE pool = 'shared' AND line = 'request' GROUP BY consumer")
    return {row["consumer"]: (float(row["usd"]), int(row["gpu_us"]) / 1e6) for row in rows}


def settled(checks, name, gateway, stay=True):
    """Stops the gateway, which settles everything, and holds the books against the pool's cost."""
    gateway.stop()
    gateway.run("settle")
    verified = gateway.run("verify")
    checks.that(f"{name}: the pool's postings add up to its cost to the picodollar", verified.get("balanced") is True, "" if verified.get("balanced") else verified)
    found = lines(gateway)
    checks.that(f"{name}: nothing is left unallocated", found.get("unallocated", (0, 0))[0] == 0, found.get("unallocated", ""))
    return found


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seconds", type=float, default=25, help="length of each run (default 25)")
    arguments.add_argument("--keep", action="store_true", help="keep the ledgers and logs")
    arguments = arguments.parse_args()
    checks = Checks()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="farthing-pool-"))
    # Both compute on one core, which therefore is the shared device: its time is sliced between them.
    engines, good = {name: Engine(folder, name, size, core=0) for name, size in SIZES.items()}, False
    gateways = []
    try:
        print("waiting for two vLLM servers", file=sys.stderr)
        for engine in engines.values():
            engine.wait_until_ready()
        sections = config(engines, folder)

        def gateway(name):
            gateways.append(Farthing(folder, name, sections, consumers=[tenant.name for tenant in TENANTS]))
            return gateways[-1]

        # Engines compile and warm up at their first requests; that belongs to nobody's bill here.
        run(engines, gateway("warm-up"), TENANTS, 5)
        gateways[-1].stop()
        idle = idle_rate(engines)

        def measure(name, tenants, bypass=()):
            books = gateway(name)
            spent, lasted, past = run(engines, books, tenants, arguments.seconds, bypass)
            time.sleep(2)
            return books, spent - idle * lasted, past

        everybody, whole, _ = measure("everybody", TENANTS)
        found = settled(checks, "everybody", everybody)
        checks.that("everybody: unobserved is zero", found.get("unobserved", (0.0, 0))[0] == 0, found.get("unobserved", ""))
        shares = paid(everybody)
        checks.equal("everybody: every tenant is charged", sorted(shares), sorted(tenant.name for tenant in TENANTS))
        charged = sum(seconds for _, seconds in shares.values())

        rows, marginal, alone = [("tenant", "charged GPU-s", "share", "marginal CPU-s", "share", "stand-alone CPU-s", "share")], {}, {}
        for tenant in TENANTS:
            without, spent, _ = measure(f"without-{tenant.name}", [other for other in TENANTS if other is not tenant])
            marginal[tenant.name] = whole - spent
            settled(checks, f"without {tenant.name}", without)
            by_itself, alone[tenant.name], _ = measure(f"only-{tenant.name}", [tenant])
            settled(checks, f"only {tenant.name}", by_itself)
            seconds = shares.get(tenant.name, (0, 0))[1]
            rows.append((tenant.name, f"{seconds:.2f}", f"{seconds / charged:.1%}", f"{marginal[tenant.name]:.2f}", f"{marginal[tenant.name] / whole:.1%}", f"{alone[tenant.name]:.2f}", f"{alone[tenant.name] / whole:.1%}"))
        table(f"Who caused what: Farthing's share against runs without the tenant, and of the tenant alone ({whole:.1f} CPU-s in all)", rows)
        by = lambda amounts: sorted(amounts, key=amounts.get, reverse=True)
        checks.equal("leaving one out ranks the tenants as the attribution does", by(marginal), by({name: seconds for name, (_, seconds) in shares.items()}))

        # Traffic that goes past the gateway shows up as unobserved, and nowhere else.
        past = Tenant("nobody", "small", 8, 40, 100)
        books, _, tokens = measure("bypass", TENANTS, [past])
        found = settled(checks, "bypass", books)
        missing = unobserved_tokens(books)
        checks.equal("bypass: the engines' counters less the metered tokens are the bypassing tokens", missing, tokens)
        seconds = found.get("unobserved", (0.0, 0))[1] / 1e6
        checks.that("bypass: unobserved time is charged to its own line", seconds > 0, f"{seconds:.2f} GPU-s")
        good = checks.report()
    finally:
        for books in gateways:
            books.stop()
        for engine in engines.values():
            engine.stop()
        if good and not arguments.keep:
            shutil.rmtree(folder)
        else:
            print(f"ledgers and logs: {folder}", file=sys.stderr)
    return 0 if good else 1


def unobserved_tokens(books):
    """The growth of the engines' counters while the ledger watched, less what it metered: input and output tokens."""
    grown = books.rows(
        "SELECT engine, max(prompt_tokens) - min(prompt_tokens) AS input, max(generation_tokens) - min(generation_tokens) AS output FROM readings GROUP BY engine"
    )
    metered = books.rows("SELECT sum(input_tokens) AS input, sum(output_tokens) AS output FROM attempts WHERE pool = 'shared'")[0]
    return tuple(sum(int(row[kind]) for row in grown) - int(metered[kind]) for kind in ("input", "output"))


if __name__ == "__main__":
    sys.exit(main())
