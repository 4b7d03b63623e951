"""Two real vLLM processes that come and go with the load: `farthing serve` starts them when requests come, takes the second when there is
more to do than one can, gives it back when there is not, and loses no request over it.

Prints what happened, tables and `N passed, N failed`; ends with status 1 when anything failed."""

import argparse
import concurrent.futures
import json
import os
import pathlib
import random
import shutil
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

from checks import Checks, table
from processes import Farthing, fetch, free_port
from replicas import Replicas

RATE = "3.60"
# Big enough that four requests at once are all that one core does within the objective.
LAYERS, HIDDEN, BATCH = 12, 512, 4
INPUT_WORDS, OUTPUT_TOKENS = 30, 48
# What one replica on one core does with such requests, about half of what was measured where nobody else used the machine.
REQUESTS_PER_S = 4.0
CLIENTS = 10
PATIENCE_S = 420
# Short windows: the load of this test changes within a minute, and an engine takes half of one to start.
POLICY = "token-rate:headroom=0.2,window=10,stabilise=20"
GUARDS = "guards = { stabilise_s = 5, zero_after_s = 15 }"


def commands(ports, folder):
    """How each replica is started: arguments, environment, log."""
    found = []
    for number, port in enumerate(ports):
        environment = {
            "REAL_VLLM_LAYERS": str(LAYERS), "REAL_VLLM_HIDDEN": str(HIDDEN), "VLLM_CPU_OMP_THREADS_BIND": str(number % (os.cpu_count() or 1)),
            "REAL_VLLM_ARGS": f"--enable-prompt-tokens-details --max-num-seqs {BATCH}",
        }
        found.append(([os.environ["REAL_VLLM_START"], str(port), "tiny"], environment, str(folder / f"vllm-{number}.log")))
    return found


def config(ports, actuator):
    """Two replicas of one deployment, each with a processor core as its GPU, and nothing running yet."""
    model = pathlib.Path(os.environ.get("REAL_VLLM_HOME", pathlib.Path.home() / ".cache/real-vllm"), f"model-{LAYERS}-{HIDDEN}", "config.json")
    upstreams = "".join(f"""
[[upstream]]
name = "tiny-{number}"
kind = "vllm"
base_url = "http://127.0.0.1:{port}"
pool = "shared"
deployment = "tiny"
engine = {{ model_config = "{model}", replica = "tiny-{number}" }}
""" for number, port in enumerate(ports))
    targets = ", ".join(f'{{ upstream = "tiny-{number}" }}' for number in range(len(ports)))
    replicas = ", ".join(f'{{ name = "tiny-{number}", gpus = 1 }}' for number in range(len(ports)))
    return f"""
[[gpu]]
name = "host"
bf16_tflops = 2
gb_per_s = 40
memory_gb = 8

[[pool]]
name = "shared"
owner = "platform"
gpu = "host"
gpus = 2
usd_per_gpu_hour = "{RATE}"
replicas = [{replicas}]

[telemetry]
scrape_every_ms = 500

[settlement]
lag_ms = 2000
{upstreams}
[[route]]
model = "tiny"
targets = [{targets}]
balance = "least-outstanding"

[[scale]]
deployment = "tiny"
pool = "shared"
mode = "act"
policy = "{POLICY}"
floor = 0
static_replicas = 2
gpus = 1
cold_start_s = 45
decide_every_ms = 1000
drain_ms_max = 120000
objective = {{ ttft_ms = 2000, tpot_ms = 200, percentile = 0.9 }}
capacity = {{ requests_per_s = {REQUESTS_PER_S}, input_tokens = {INPUT_WORDS * 3}, output_tokens = {OUTPUT_TOKENS}, batch = {BATCH} }}
{GUARDS}
{actuator}
"""


def local(ports, folder):
    """The actuator that starts and stops the engines itself."""
    processes = []
    for port, (arguments, environment, log) in zip(ports, commands(ports, folder)):
        variables = ", ".join(f"{name} = {json.dumps(value)}" for name, value in environment.items())
        processes.append(f"""
[[scale.actuator.process]]
command = {json.dumps(arguments)}
url = "http://127.0.0.1:{port}"
health = "/v1/models"
environment = {{ {variables} }}
log = {json.dumps(log)}
""")
    return '[scale.actuator]\nkind = "local"\n' + "".join(processes)


class Load:
    """Clients that ask one request after the other, as many as are wanted at the moment, and what became of each request."""

    def __init__(self, gateway):
        self.gateway, self.wanted, self.pause_s, self.running = gateway, 0, 0.0, True
        self.answers, self.lock = [], threading.Lock()
        self.threads = [threading.Thread(target=self.client, args=(number,), daemon=True) for number in range(CLIENTS)]
        for thread in self.threads:
            thread.start()

    def want(self, clients, pause_s=0.0):
        self.wanted, self.pause_s = clients, pause_s

    def client(self, number):
        asked = 0
        while self.running:
            if number >= self.wanted:
                time.sleep(0.05)
                continue
            asked += 1
            answer = ask(self.gateway, f"{number}-{asked}", streamed=asked % 2 == 0)
            with self.lock:
                self.answers.append(answer)
            time.sleep(self.pause_s)

    def stop(self):
        """Lets everything that was asked come to its end."""
        self.wanted, self.running = 0, False
        for thread in self.threads:
            thread.join(PATIENCE_S)

    def count(self):
        with self.lock:
            return len(self.answers)


def ask(gateway, seed, streamed):
    """One request through the gateway: when it was asked, how long it took, and what went wrong if anything did."""
    dice = random.Random(f"{time.time()}-{seed}")
    words = " ".join("".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=3)) for _ in range(INPUT_WORDS))
    body = {"model": "tiny", "prompt": words, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True, "stream": streamed}
    headers = {"content-type": "application/json", "authorization": f"Bearer {gateway.key}"}
    call = urllib.request.Request(gateway.url + "/v1/completions", json.dumps(body).encode(), headers)
    start, wall = time.monotonic(), time.time()
    wrong, attempts = None, 0
    try:
        with urllib.request.urlopen(call, timeout=PATIENCE_S) as answer:
            attempts = int(answer.headers.get("x-farthing-attempts", 0))
            text = answer.read().decode()
            whole = text.rstrip().endswith("[DONE]") if streamed else json.loads(text)["usage"]["completion_tokens"] == OUTPUT_TOKENS
            wrong = None if whole else f"not whole: {text[-200:]!r}"
    except urllib.error.HTTPError as error:
        wrong = f"status {error.code}: {error.read().decode(errors='replace')[:300]}"
    except OSError as error:
        wrong = f"{type(error).__name__}: {error}"
    return {"at": wall, "took": time.monotonic() - start, "wrong": wrong, "attempts": attempts}


class Watch:
    """What the scaler says of the deployment, twice a second, for as long as the test runs."""

    def __init__(self, gateway, load):
        self.gateway, self.load, self.seen, self.running = gateway, load, [], True
        self.thread = threading.Thread(target=self.look, daemon=True)
        self.thread.start()

    def look(self):
        while self.running:
            try:
                stands = json.loads(fetch(f"{self.gateway.admin}/api/v1/scaling"))["deployments"][0]
                self.seen.append({name: stands[name] for name in ("ready", "pending", "draining", "desired")} | {"at": time.time(), "clients": self.load.wanted})
            except (OSError, LookupError, ValueError):
                pass
            time.sleep(0.5)

    def until(self, what, is_so, patience_s=PATIENCE_S):
        """Waits until a look is as it should be; whether one was."""
        begun = time.monotonic()
        while time.monotonic() < begun + patience_s:
            if self.seen and is_so(self.seen[-1]):
                print(f"after {time.monotonic() - begun:5.1f} s: {what}", file=sys.stderr)
                return True
            time.sleep(0.2)
        print(f"never within {patience_s} s: {what}; last seen {self.seen[-1:]}", file=sys.stderr)
        return False

    def stop(self):
        self.running = False
        self.thread.join(10)

    def picture(self):
        """One line for each change."""
        rows, last, begun = [("second", "clients", "ready", "pending", "draining", "desired")], None, self.seen[0]["at"]
        for look in self.seen:
            now = tuple(look[name] for name in rows[0][1:])
            if now != last:
                rows.append((f"{look['at'] - begun:.1f}", *now))
                last = now
        return rows


def rises_and_falls(checks, gateway, load, watch):
    checks.that("at the start nothing runs", watch.until("the scaler decides", lambda look: look["desired"] is not None) and watch.seen[-1]["ready"] == 0)
    load.want(1, 1.0)
    up = watch.until("the first request woke one replica", lambda look: look["ready"] == 1)
    until = time.monotonic() + 60
    while up and not load.count() and time.monotonic() < until:
        time.sleep(0.2)
    waited = load.answers[0]["took"] if load.answers else None
    checks.that("from zero: the request that woke a replica was held and answered", up and load.count() and not load.answers[0]["wrong"], f"{waited:.1f} s" if waited else "")
    load.want(CLIENTS)
    up = watch.until("the load took a second replica", lambda look: look["ready"] == 2)
    checks.that("load rises: two replicas serve", up)
    if up:
        time.sleep(30)
    load.want(1, 1.5)
    down = watch.until("the second replica was given back", lambda look: look["ready"] == 1 and look["desired"] == 1 and not look["draining"])
    checks.that("load falls: one replica serves, and requests go on", down)
    if down:
        time.sleep(10)
    load.want(0)
    checks.that("nobody asks: nothing runs", watch.until("the last replica was given back", lambda look: look["ready"] == look["pending"] == look["desired"] == 0))
    load.want(1, 1.0)
    again = load.count()
    watch.until("and it comes again", lambda look: load.count() > again)


def requests(checks, gateway, load):
    wrong = [answer["wrong"] for answer in load.answers if answer["wrong"]]
    checks.equal(f"requests that failed, of {len(load.answers)}", (len(wrong), wrong[:3]), (0, []))
    rows = gateway.rows("SELECT request_id, upstream, outcome, output_tokens FROM attempts")
    done = [row for row in rows if row["outcome"] == "completed"]
    checks.equal("requests in the ledger that completed", len({row["request_id"] for row in done}), len(load.answers))
    checks.that("completed attempts have their tokens", done and all(int(row["output_tokens"]) == OUTPUT_TOKENS for row in done))
    others = {}
    for row in rows:
        others[row["upstream"], row["outcome"]] = others.get((row["upstream"], row["outcome"]), 0) + 1
    table("Attempts", [("upstream", "outcome", "attempts")] + [(*key, count) for key, count in sorted(others.items())])
    checks.that("both replicas served", all(others.get((f"tiny-{number}", "completed")) for number in range(2)))
    waits = sorted(answer["took"] for answer in load.answers)
    steady = waits[: int(len(waits) * 0.9)]
    table("Time for an answer, s", [("requests", "median", "90 %", "longest (waited for an engine)"), (len(waits), f"{waits[len(waits) // 2]:.2f}", f"{steady[-1]:.2f}", f"{waits[-1]:.1f}")])


def books(checks, gateway):
    checks.that("farthing stops cleanly", gateway.stop())
    gateway.run("settle")
    verified = gateway.run("verify")
    checks.that("the ledger is balanced", verified.get("balanced") is True, "" if verified.get("balanced") else verified)
    lines = gateway.rows("SELECT line, sum(effective_cost) AS usd, sum(gpu_us) / 1e6 AS gpu_s FROM postings WHERE pool = 'shared' GROUP BY line ORDER BY line")
    table("The pool's lines", [("line", "USD", "GPU-s")] + [(row["line"], row["usd"], f"{float(row['gpu_s']):.2f}") for row in lines])
    usd = {row["line"]: float(row["usd"]) for row in lines}
    checks.that("a cold start has its line", usd.get("cold_start", 0) > 0, usd.get("cold_start"))
    idle = sum(usd.get(line, 0) for line in ("headroom", "idle_reserved", "warm"))
    checks.that("idle GPUs have their lines", idle > 0, idle)
    decisions = gateway.rows("SELECT decided_at, mode, ready, pending, wanted, desired, told, reasons, guards, arrivals_per_s_thousandths AS arrivals FROM decisions ORDER BY decided_at")
    checks.that("every decision is a fact, with its reasons and what was seen", decisions and all(row["mode"] == "act" and row["reasons"] for row in decisions) and any(row["arrivals"] for row in decisions), len(decisions))
    desired = [int(row["desired"]) for row in decisions]
    changes = [desired[0]] + [after for before, after in zip(desired, desired[1:]) if after != before]
    steps = [(str(row["decided_at"])[11:19], before, row["desired"], str(row["reasons"])[:150]) for before, row in zip([None, *desired], decisions) if before != int(row["desired"])]
    table("Decisions that changed something", [("at", "from", "to", "why"), *steps])
    checks.that("replicas follow the load and nothing flaps", changes in ([0, 1, 2, 1, 0, 1], [0, 1, 2, 1, 0, 1, 0]), " ".join(map(str, changes)))
    given = gateway.run("report")["gpus_given_back"]
    row = next((row for row in given if row["mode"] == "act"), None)
    checks.that("the GPUs given back against the static plan have their line", row and float(row["given_back"]) > 0, row and f"{row['given_back']} of {row['static_cost']} USD")
    checks.that("static plan = actual + given back", row and abs(float(row["static_cost"]) - float(row["actual_cost"]) - float(row["given_back"])) < 1e-9)


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--actuator", choices=("local", "webhook"), default="local", help="who starts and stops engines (default local)")
    arguments.add_argument("--keep", action="store_true", help="keep the ledger and logs")
    arguments = arguments.parse_args()
    checks, gateway, load, watch, good = Checks(), None, None, None, False
    folder = pathlib.Path(tempfile.mkdtemp(prefix="farthing-scale-"))
    ports, replicas = [free_port(), free_port()], None
    try:
        if arguments.actuator == "webhook":
            replicas = Replicas(commands(ports, folder))
            actuator = f'actuator = {{ kind = "webhook", url = "{replicas.url}" }}'
        else:
            actuator = local(ports, folder)
        gateway = Farthing(folder, "books", config(ports, actuator), gateway=f"hold_ms_max = {PATIENCE_S * 1000}")
        load = Load(gateway)
        watch = Watch(gateway, load)
        rises_and_falls(checks, gateway, load, watch)
        load.stop()
        watch.stop()
        table("Replicas", watch.picture())
        requests(checks, gateway, load)
        books(checks, gateway)
        if not replicas:
            checks.equal("engines that outlive the server", [port for port in ports if listens(port)], [])
        good = checks.report()
    finally:
        if load:
            load.running = False
        if watch:
            watch.running = False
        if gateway:
            gateway.stop()
        if replicas:
            replicas.stop()
        if good and not arguments.keep:
            shutil.rmtree(folder)
        else:
            print(f"ledger and logs: {folder}", file=sys.stderr)
    return 0 if good else 1


def listens(port):
    try:
        fetch(f"http://127.0.0.1:{port}/v1/models", 2)
        return True
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
