"""Drives a real vLLM through Farthing with the official SDKs and holds the ledger against the engine's own counters.

Prints a table and `N passed, N failed`; ends with status 1 when anything failed."""

import argparse
import http.client
import json
import pathlib
import re
import shutil
import sys
import tempfile
import urllib.parse

import anthropic
import openai

import surfaces
from checks import Checks, table
from processes import MODEL, Engine, Farthing
from surfaces import CASES, QUESTIONS, Clients, ask, at_once, give_up


UPSTREAM = f"""
[[upstream]]
name = "engine"
kind = "vllm"
base_url = "{{url}}"
pool = "shared"
deployment = "{MODEL}"

[[pool]]
name = "shared"
owner = "platform"
gpu = "A100"
gpus = 1
usd_per_gpu_hour = "2.50"
"""


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--repeats", type=int, default=8, help="requests of each kind and phase (default 8)")
    arguments.add_argument("--keep", action="store_true", help="keep the ledgers and logs")
    arguments = arguments.parse_args()
    checks = Checks()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="farthing-real-"))
    engine, gateways = Engine(folder), []
    good = False
    try:
        print(f"waiting for vLLM at {engine.url} (the first time it is installed: 6 GB)", file=sys.stderr)
        engine.wait_until_ready()
        for policy in ("cancel", "drain"):
            gateway = Farthing(folder, policy, UPSTREAM.format(url=engine.url), policy)
            gateways.append(gateway)
            if policy == "cancel":
                intact(checks, engine, gateway)
                errors(checks, engine, gateway)
                exact(checks, engine, gateway, arguments.repeats)
            aborts(checks, engine, gateway, policy, arguments.repeats)
            books(checks, gateway, policy)
        good = checks.report()
    finally:
        for gateway in gateways:
            gateway.stop()
        engine.stop()
        if good and not arguments.keep:
            shutil.rmtree(folder)
        else:
            print(f"ledgers and logs: {folder}", file=sys.stderr)
    return 0 if good else 1


def totals(rows):
    return {
        "prompt_tokens_total": sum(int(row["input_tokens"]) for row in rows),
        "generation_tokens_total": sum(int(row["output_tokens"]) for row in rows),
        "prompt_tokens_cached_total": sum(int(row["cache_read_tokens"]) for row in rows),
    }


def minus(after, before):
    return {name: after[name] - before[name] for name in after}


def failures(results):
    """Everything that is no answer, and every answer with a problem, in words."""
    words = [f"{type(result).__name__}: {result}" for result in results if isinstance(result, Exception)]
    return words + [f"{seen.case}: {seen.problem}" for seen in results if isinstance(seen, surfaces.Seen) and seen.problem]


def compare_each(checks, phase, seen, rows):
    """Every completed request is there once, with exactly the usage that its client was told."""
    by_id = {}
    for row in rows:
        by_id.setdefault(row["request_id"], []).append(row)
    told = [one for one in seen if one.ended and one.output_tokens is not None]
    once = [one for one in seen if one.ended and len(by_id.get(one.request_id, [])) == 1]
    wrong = []
    for one in told:
        found = by_id.get(one.request_id, [{}])[0]
        if (found.get("input_tokens"), found.get("output_tokens")) != (one.input_tokens, one.output_tokens):
            wrong.append(f"{one.case} {one.request_id}: SDK {one.input_tokens}/{one.output_tokens}, ledger {found.get('input_tokens')}/{found.get('output_tokens')}")
    ended = sum(one.ended for one in seen)
    checks.equal(f"{phase}: completed requests that are in the ledger exactly once", len(once), ended)
    checks.that(f"{phase}: usage in the ledger is the usage the SDK was told ({len(told)} requests)", told and not wrong, "; ".join(wrong[:3]))
    marked = [row for one in once for row in by_id[one.request_id] if (row["outcome"], row["usage_quality"]) != ("completed", "reported")]
    checks.that(f"{phase}: completed requests are marked completed, usage reported", not marked, marked[:2] or "")


def exact(checks, engine, gateway, repeats):
    """No aborts: the ledger's tokens are the engine's tokens."""
    before_rows = gateway.attempts(0)
    before = engine.counters()
    clients = Clients(gateway.url, gateway.key)
    jobs = [
        lambda case=case, number=number: ask(clients, case, QUESTIONS[number % len(QUESTIONS)], 8 + 3 * (number % 9))
        for number in range(repeats) for case in CASES
    ]
    results = at_once(jobs)
    spent = minus(engine.counters(), before)
    seen = [result for result in results if isinstance(result, surfaces.Seen)]
    known = {row["request_id"] for row in before_rows}
    rows = [row for row in gateway.attempts(len(before_rows) + len(jobs)) if row["request_id"] not in known]
    checks.equal("no aborts: requests answered, 16 at once", (len(seen), failures(results)), (len(jobs), []))
    checks.equal("no aborts: rows in the ledger", len(rows), len(jobs))
    metered = totals(rows)
    for name, what in (("prompt_tokens_total", "input"), ("generation_tokens_total", "output"), ("prompt_tokens_cached_total", "cached input")):
        checks.equal(f"no aborts: metered {what} tokens == vllm:{name}", metered[name], spent[name])
    compare_each(checks, "no aborts", seen, rows)
    lines = [("surface", "requests", "metered input", "of it cached", "metered output", "told by SDK: input", "output")]
    by_id = {row["request_id"]: row for row in rows}
    for case in CASES:
        mine = [one for one in seen if one.case == case[0]]
        found = totals([by_id[one.request_id] for one in mine if one.request_id in by_id])
        told = [one for one in mine if one.output_tokens is not None]
        said = (sum(one.input_tokens for one in told), sum(one.output_tokens for one in told)) if told else ("hidden", "hidden")
        lines.append((case[0], len(mine), found["prompt_tokens_total"], found["prompt_tokens_cached_total"], found["generation_tokens_total"], *said))
    lines.append(("the engine's counters", "", spent["prompt_tokens_total"], spent["prompt_tokens_cached_total"], spent["generation_tokens_total"], "", ""))
    table("No aborts, 16 at once", lines)


def aborts(checks, engine, gateway, policy, repeats):
    """A third of the clients go away in the middle of their answers, or before them."""
    phase = f"aborts, {policy}"
    before_rows = gateway.attempts(0)
    before = engine.counters()
    clients, impatient = Clients(gateway.url, gateway.key), Clients(gateway.url, gateway.key, timeout_s=0.4)
    jobs, kinds = [], []
    for number in range(repeats):
        for position, case in enumerate(CASES):
            question, leaves = QUESTIONS[number % 2], (number + position) % 3 == 0
            kinds.append("leaves" if leaves else "stays")
            if not leaves:
                jobs.append(lambda case=case, question=question: ask(clients, case, question, 24))
            elif case[2]:
                jobs.append(lambda case=case, question=question, after=4 + number % 5: ask(clients, case, question, 400, abort_after=after))
            else:
                jobs.append(lambda case=case, question=question: give_up(impatient, case, question, 400))
    results = at_once(jobs)
    spent = minus(engine.counters(), before)
    known = {row["request_id"] for row in before_rows}
    rows = [row for row in gateway.attempts(len(before_rows) + len(jobs)) if row["request_id"] not in known]
    stayed = [result for result, kind in zip(results, kinds) if kind == "stays"]
    left = [result for result, kind in zip(results, kinds) if kind == "leaves"]
    checks.equal(f"{phase}: those who stayed were answered", failures(stayed), [])
    checks.equal(f"{phase}: those who left did leave", [result for result in left if isinstance(result, Exception) or result is False], [])
    checks.equal(f"{phase}: rows in the ledger, one a request", len(rows), len(jobs))
    compare_each(checks, phase, [one for one in stayed if isinstance(one, surfaces.Seen)], rows)
    ended_ids = {one.request_id for one in stayed if isinstance(one, surfaces.Seen)}
    aborted = [row for row in rows if row["request_id"] not in ended_ids]
    # An answer that happened to end by itself within a few tokens may have been complete before its client's leaving was noticed.
    unmarked = [row for row in aborted if row["outcome"] != "client_aborted" and not (row["outcome"] == "completed" and int(row["output_tokens"]) < 400)]
    checks.that(f"{phase}: {len(aborted)} aborted requests are booked and marked client_aborted", aborted and not unmarked, unmarked[:2] or "")
    by_id = {row["request_id"]: row for row in aborted}
    streams = [one for one in left if isinstance(one, surfaces.Seen)]
    unbooked = [one.request_id for one in streams if one.request_id not in by_id]
    checks.equal(f"{phase}: aborted streams are booked under the id their clients were given", unbooked, [])
    empty = [one.request_id for one in streams if one.text and int(by_id.get(one.request_id, {"output_tokens": 0})["output_tokens"]) == 0]
    checks.equal(f"{phase}: aborted streams that had delivered text are booked with output", empty, [])
    inputless = [row for row in aborted if int(row["input_tokens"]) == 0]
    checks.equal(f"{phase}: aborted requests are booked with their input", inputless, [])
    metered = totals(rows)
    if policy == "drain":
        for name, what in (("prompt_tokens_total", "input"), ("generation_tokens_total", "output")):
            checks.equal(f"{phase}: metered {what} tokens == vllm:{name}, aborted ones included", metered[name], spent[name])
        guessed = [row for row in aborted if row["usage_quality"] != "reported"]
        checks.that(f"{phase}: aborted usage is the engine's own", not guessed, guessed[:2] or "")
    else:
        left_rows = [row for row in aborted if row["outcome"] == "client_aborted"]
        sure = [row for row in left_rows if row["usage_quality"] != "estimated"]
        checks.that(f"{phase}: aborted streams' usage is marked estimated", not any(row["streamed"] for row in sure), [row for row in sure if row["streamed"]][:2] or "")
        # An answer that is not streamed delivers nothing that could be counted, so it is read to its end (docs/decisions/0005).
        whole = [row for row in left_rows if not row["streamed"] and row["usage_quality"] != "reported"]
        checks.that(f"{phase}: aborted answers that are not streamed are booked as the engine reports them", not whole, whole[:2] or "")
    of_aborted = totals(aborted)
    run = minus(spent, totals([row for row in rows if row["request_id"] in ended_ids]))
    table(f"Aborts, on_client_abort = {policy}: tokens of the {len(aborted)} aborted requests", [
        ("", "input", "output"),
        ("ledger", of_aborted["prompt_tokens_total"], of_aborted["generation_tokens_total"]),
        ("engine (its counters less the completed requests)", run["prompt_tokens_total"], run["generation_tokens_total"]),
    ])


def errors(checks, engine, gateway):
    """Errors keep the shape that each SDK knows, and cost nothing."""
    before_rows, before = gateway.attempts(0), engine.counters()
    for key, model, name in (("fk-wrong", MODEL, "AuthenticationError"), (gateway.key, "no-such-model", "NotFoundError")):
        clients = Clients(gateway.url, key)
        for sdk, call in (
            (openai, lambda: clients.openai.chat.completions.create(model=model, messages=[{"role": "user", "content": "x"}], max_tokens=1)),
            (anthropic, lambda: clients.anthropic.messages.create(model=model, messages=[{"role": "user", "content": "x"}], max_tokens=1)),
        ):
            try:
                found = f"answered: {call()}"
            except Exception as error:  # noqa: BLE001 - the class of the error is what is checked
                found = type(error).__name__
            checks.equal(f"errors: {sdk.__name__} SDK, {'wrong key' if key == 'fk-wrong' else 'unknown model'}", found, name)
    checks.equal("errors: no token ran", minus(engine.counters(), before), dict.fromkeys(before, 0))
    known = {row["request_id"] for row in before_rows}
    rows = [row for row in gateway.attempts(len(before_rows) + 2) if row["request_id"] not in known]
    # A refused key never became an attempt; an unknown model was one, and the upstream said no.
    checks.equal("errors: booked as upstream errors without tokens", [(row["outcome"], row["input_tokens"], row["output_tokens"]) for row in rows], [("upstream_error", 0, 0)] * 2)


RAW = [
    ("chat", "/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 12}),
    ("completions", "/v1/completions", {"prompt": "hello", "max_tokens": 12}),
    ("responses", "/v1/responses", {"input": "hello", "max_output_tokens": 12}),
    ("messages", "/v1/messages", {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 12}),
]


def intact(checks, engine, gateway):
    """Bytes through the gateway are the bytes of the engine, apart from ids and times."""
    for name, path, body in RAW:
        body = body | {"model": MODEL, "temperature": 0}
        variants = [("", {}), (" stream", {"stream": True})]
        if name in ("chat", "completions"):
            variants += [
                (" stream with usage", {"stream": True, "stream_options": {"include_usage": True}}),
                (" stream with usage in every chunk", {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}),
            ]
        for variant, more in variants:
            direct = same(post(engine.url, path, body | more, {}))
            through = same(post(gateway.url, path, body | more, {"authorization": f"Bearer {gateway.key}"}))
            checks.that(f"intact: {name}{variant}", direct == through and direct[0] == 200, "" if direct == through else f"\n  direct  {direct}\n  through {through}")


def post(url, path, body, headers):
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=60)
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"} | headers)
    answer = connection.getresponse()
    found = answer.status, answer.getheader("content-type"), answer.read().decode()
    connection.close()
    return found


def same(answer):
    """Status, type and body without ids and times; text that was cut into other pieces by the engine's timing is put together again."""
    status, kind, body = answer
    body = re.sub(r"\b(chatcmpl-|cmpl-|resp_|msg_)[0-9a-f]+", r"\1ID", body)
    body = re.sub(r'"(created|created_at)":\d+', r'"\1":0', body)
    # vLLM puts it into the last chunk, which is the usage chunk when there is one: hidden with it from those who did not ask for usage.
    body = re.sub(r',"system_fingerprint":"[^"]*"', "", body)
    if not (kind or "").startswith("text/event-stream"):
        return status, kind, body
    text, events = "", []
    for block in body.split("\n\n"):
        # Usage in every chunk counts up with the pieces; the last one stays, in the chunk without choices.
        block = re.sub(r'"usage":\{[^{}]*"completion_tokens_details":null\}', '"usage":RUNNING', block)
        block = re.sub(r'"sequence_number":\d+', '"sequence_number":0', block)
        for key in ("content", "text", "delta"):
            piece = re.search(rf'"(?:delta":\{{"(?:type":"text_delta",")?)?{key}":("(?:[^"\\]|\\.)*")', block)
            if piece and "done" not in block and "completed" not in block:
                text += json.loads(piece[1])
                block = block.replace(f'"{key}":{piece[1]}', f'"{key}":TEXT', 1)
        if not events or events[-1] != block:
            events.append(block)
    return status, kind, text, events


def books(checks, gateway, policy):
    verified = gateway.run("verify")
    checks.that(f"{policy}: farthing verify says balanced", '"balanced": true' in json.dumps(verified), "" if '"balanced": true' in json.dumps(verified) else verified)
    checks.equal(f"{policy}: gaps", gateway.rows("SELECT * FROM gaps"), [])
    rows = gateway.attempts(0)
    doubled = len(rows) - len({row["request_id"] for row in rows})
    checks.equal(f"{policy}: doubled rows", doubled, 0)
    strangers = [row for row in rows if row["pool"] != "shared" or row["charge"] != "unpriced"]
    checks.equal(f"{policy}: every attempt is on the pool and left to its allocation", strangers[:2], [])
    report = gateway.run("report", "--by", "team,model")
    checks.that(f"{policy}: farthing report shows the team", "real-test-team" in json.dumps(report))
    log = (gateway.folder / "serve.log").read_text(errors="replace")
    checks.that(f"{policy}: the key is not in the server's log", gateway.key not in log)


if __name__ == "__main__":
    sys.exit(main())
