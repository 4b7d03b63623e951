#!/usr/bin/env python3
"""What a batch really takes on an accelerator, and what each request adds to it: the raw lines for `gpu_truth`.

A continuous-batching loop over a transformer with random weights (Llama-like: RMS norm, rotary positions, grouped-query attention,
gated feed-forward), with a real paged KV cache and chunked prefill. Two kinds of lines are measured:

  step   one step of the loop: its time and, for each request in it, how many new tokens it brought and how many it had cached
  game   one batch of up to eight requests replayed in *all* its sub-batches: the time of each, so that Shapley's value of every request
         follows by enumeration and not by any model

Times are device events around the forward pass (the processor's clock on a CPU). What a step does on the host, choosing the batch and
laying out its indices, happens before the first event, as engines do it while the previous step still runs.

    ground_truth.py --out raw.jsonl                         # 8 billion parameters, bf16, for a card of 80 GB
    ground_truth.py --out raw.jsonl --device cpu --small    # the same code in a minute on any machine; says nothing of accelerators
"""
import argparse
import json
import math
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocabulary: int


# The dimensions of Llama 3.1 8B, and of something that a processor runs in milliseconds.
LARGE = Shape(32, 4096, 32, 8, 128, 14336, 128256)
SMALL = Shape(4, 512, 8, 2, 64, 1408, 4096)
PAGE = 256


@dataclass(frozen=True)
class Entry:
    """One request in one step."""

    slot: int
    new: int
    cached: int


class Plan:
    """The indices of one batch, made on the host before the step: decoding requests first, then those that prefill."""

    def __init__(self, batch, cache, device):
        self.batch = sorted(batch, key=lambda entry: entry.new > 1)
        positions, places, last, at = [], [], [], 0
        for entry in self.batch:
            span = range(entry.cached, entry.cached + entry.new)
            positions += span
            places += [entry.slot * cache.tokens + position for position in span]
            at += entry.new
            last.append(at - 1)
        self.positions = torch.tensor(positions, device=device)
        self.places = torch.tensor(places, device=device)
        self.last = torch.tensor(last, device=device)
        self.tokens = torch.zeros(at, dtype=torch.long, device=device)
        self.parts = []
        start = 0
        for group in ([e for e in self.batch if e.new == 1], [e for e in self.batch if e.new > 1]):
            if not group:
                continue
            new, seen = [e.new for e in group], [e.cached + e.new for e in group]
            pages = [[e.slot * cache.pages + page for page in range(cache.pages)] for e in group]
            int32 = dict(dtype=torch.int32, device=device)
            self.parts.append(dict(
                rows=slice(start, start + sum(new)), entries=group, max_new=max(new), max_seen=max(seen),
                starts=torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], **int32),
                seen=torch.tensor(seen, **int32), pages=torch.tensor(pages, **int32)))
            start += sum(new)


class Cache:
    """Pages of keys and values; each slot owns the same number of them."""

    def __init__(self, shape, slots, tokens, dtype, device):
        self.pages = math.ceil(tokens / PAGE)
        self.tokens = self.pages * PAGE
        size = (shape.layers, slots * self.pages, PAGE, shape.kv_heads, shape.head_dim)
        # Random content: replayed batches read what no request has written.
        self.keys = torch.randn(size, dtype=dtype, device=device)
        self.values = torch.randn(size, dtype=dtype, device=device)


def attention_by_request(queries, keys, values, plan):
    """One call for each request. Correct everywhere, and the reference for the other."""
    flat_keys, flat_values = keys.flatten(0, 1), values.flatten(0, 1)
    tokens = plan.cache_tokens
    out = torch.empty_like(queries)
    at = 0
    for entry in plan.batch:
        seen = slice(entry.slot * tokens, entry.slot * tokens + entry.cached + entry.new)
        query = queries[at:at + entry.new].transpose(0, 1)[None]
        key, value = flat_keys[seen].transpose(0, 1)[None], flat_values[seen].transpose(0, 1)[None]
        mask = None
        if entry.new > 1:
            mask = torch.ones(entry.new, entry.cached + entry.new, dtype=torch.bool, device=query.device).tril(entry.cached)
        result = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        out[at:at + entry.new] = result[0].transpose(0, 1)
        at += entry.new
    return out


def attention_paged(queries, keys, values, plan):
    """Two calls, one for all that decode and one for all that prefill, over the pages where they lie."""
    from torch.nn.attention.varlen import varlen_attn

    out = torch.empty_like(queries)
    for part in plan.parts:
        out[part["rows"]] = varlen_attn(
            queries[part["rows"]], keys, values, part["starts"], None, part["max_new"], part["max_seen"],
            window_size=(-1, 0), enable_gqa=True, seqused_k=part["seen"], block_table=part["pages"])
    return out


class Model:
    def __init__(self, shape, dtype, device):
        self.shape, self.dtype, self.device = shape, dtype, device
        width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim

        def weight(*size):
            return torch.randn(size, dtype=dtype, device=device) / math.sqrt(size[-1])

        self.embedding = weight(shape.vocabulary, shape.hidden)
        self.head = weight(shape.vocabulary, shape.hidden)
        self.norms = torch.ones(2 * shape.layers + 1, shape.hidden, dtype=dtype, device=device)
        self.layers = [dict(qkv=weight(width, shape.hidden), out=weight(shape.hidden, shape.heads * shape.head_dim),
                            up=weight(2 * shape.feed_forward, shape.hidden), down=weight(shape.hidden, shape.feed_forward))
                       for _ in range(shape.layers)]
        half = shape.head_dim // 2
        self.frequencies = 500_000.0 ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
        self.attention = attention_by_request

    def parameters(self):
        """Those that a token is multiplied with: all but the embedding, which is looked up."""
        return self.head.numel() + self.norms.numel() + sum(w.numel() for layer in self.layers for w in layer.values())

    def rotate(self, x, cos, sin):
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    @torch.inference_mode()
    def step(self, plan, cache):
        """The next token of each request; the new tokens' keys and values go into the cache."""
        shape = self.shape
        angles = plan.positions[:, None].float() * self.frequencies
        cos, sin = angles.cos()[:, None].to(self.dtype), angles.sin()[:, None].to(self.dtype)
        x = self.embedding[plan.tokens]
        for number, layer in enumerate(self.layers):
            y = F.rms_norm(x, (shape.hidden,), self.norms[2 * number])
            q, k, v = F.linear(y, layer["qkv"]).view(-1, shape.heads + 2 * shape.kv_heads, shape.head_dim).split(
                (shape.heads, shape.kv_heads, shape.kv_heads), dim=1)
            q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
            keys, values = cache.keys[number], cache.values[number]
            keys.flatten(0, 1).index_copy_(0, plan.places, k)
            values.flatten(0, 1).index_copy_(0, plan.places, v)
            y = self.attention(q, keys, values, plan)
            x = x + F.linear(y.flatten(1), layer["out"])
            gate, up = F.linear(F.rms_norm(x, (shape.hidden,), self.norms[2 * number + 1]), layer["up"]).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, layer["down"])
        last = F.rms_norm(x[plan.last], (shape.hidden,), self.norms[-1])
        return F.linear(last, self.head).argmax(dim=-1)


class Bench:
    def __init__(self, arguments):
        self.device = torch.device(arguments.device)
        self.cuda = self.device.type == "cuda"
        dtype = torch.bfloat16 if self.cuda else torch.float32
        shape = SMALL if arguments.small else LARGE
        if not self.cuda:
            torch.set_num_threads(arguments.threads)
        torch.manual_seed(arguments.seed)
        self.context = 1_024 if arguments.small else 16_384
        self.model = Model(shape, dtype, self.device)
        self.cache = Cache(shape, arguments.running, self.context, dtype, self.device)
        self.dice = random.Random(arguments.seed)

    def plan(self, batch):
        plan = Plan(batch, self.cache, self.device)
        plan.cache_tokens = self.cache.tokens
        return plan

    def timed(self, work):
        """Seconds that the device needs for `work`."""
        if not self.cuda:
            begin = time.perf_counter()
            work()
            return time.perf_counter() - begin
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    def seconds(self, batch):
        plan = self.plan(batch)
        return self.timed(lambda: self.model.step(plan, self.cache))

    def choose_attention(self):
        """The paged kernel, if it is here and agrees with the reference; else the reference."""
        if not self.cuda:
            return "by request"
        batch = [Entry(0, 1, 700), Entry(1, 1, 3), Entry(2, 130, 0), Entry(3, 64, 300)]
        try:
            plan, shape = self.plan(batch), self.model.shape
            queries = torch.randn(len(plan.positions), shape.heads, shape.head_dim, dtype=self.model.dtype, device=self.device)
            keys, values = self.cache.keys[0], self.cache.values[0]
            difference = (attention_paged(queries, keys, values, plan) - attention_by_request(queries, keys, values, plan)).abs().max().item()
        except Exception as error:  # Another release of torch or another device: the reference works everywhere.
            print(f"the paged kernel does not run here ({error}); each request is attended to by itself", file=sys.stderr)
            return "by request"
        if difference > 0.03:
            print(f"the paged kernel is off by {difference}; each request is attended to by itself", file=sys.stderr)
            return "by request"
        self.model.attention = attention_paged
        return "paged"

    def peaks(self):
        """What the device reaches on one large product and one large copy: stands in for a data sheet where there is none."""
        size = 8_192 if self.cuda else 1_024
        a, b = (torch.randn(size, size, dtype=self.model.dtype, device=self.device) for _ in range(2))
        product_s = min(self.timed(lambda: a @ b) for _ in range(8))
        source = torch.empty((2 << 30 if self.cuda else 256 << 20) // 4, dtype=torch.float32, device=self.device)
        target = torch.empty_like(source)
        copy_s = min(self.timed(lambda: target.copy_(source)) for _ in range(8))
        return {"flop_per_s": 2 * size**3 / product_s, "bytes_per_s": 2 * source.numel() * 4 / copy_s}


def lengths(dice, context):
    """Input and output tokens of a request: log-normal, long prompts now and then."""
    input_tokens = min(int(dice.lognormvariate(math.log(context / 24), 1.0)) + 1, context * 3 // 4)
    output_tokens = min(int(dice.lognormvariate(math.log(context / 160), 0.9)) + 2, context // 4)
    return input_tokens, output_tokens


def loop(bench, steps, running, arrivals, budget):
    """Continuous batching: (request, new, cached) of each step and its time. Requests arrive by the step, so that the batches are
    the same on every device."""
    free, waiting, active, number = list(range(running)), [], [], 0
    for step in range(steps):
        while bench.dice.random() < arrivals / (1 + arrivals):
            waiting.append((number, *lengths(bench.dice, bench.context)))
            number += 1
        while waiting and free:
            request, input_tokens, output_tokens = waiting.pop(0)
            active.append({"request": request, "slot": free.pop(), "input": input_tokens, "left": output_tokens, "cached": 0})
        batch, room = [], budget
        for one in sorted(active, key=lambda one: one["cached"] < one["input"]):
            new = min(one["input"] - one["cached"], room) if one["cached"] < one["input"] else 1
            if new > 0 and room > 0:
                batch.append((one, Entry(one["slot"], new, one["cached"])))
                room -= new
        if not batch:
            continue
        seconds = bench.seconds([entry for _, entry in batch])
        yield step, seconds, [[one["request"], entry.new, entry.cached] for one, entry in batch]
        for one, entry in batch:
            one["cached"] += entry.new
            if one["cached"] >= one["input"]:
                one["left"] -= 1
        for one in [one for one in active if one["left"] <= 0]:
            active.remove(one)
            free.append(one["slot"])


def batches(bench, live, count):
    """Batches to replay: of the loop, and of three mixes that stress the division of a step."""
    dice, context = bench.dice, bench.context

    def between(low, high):
        return dice.randint(int(low), max(int(low), int(high)))

    chosen = [[(new, cached) for _, new, cached in batch] for batch in live if 3 <= len(batch) <= 8]
    dice.shuffle(chosen)
    for batch in chosen[:count]:
        yield "live", batch
    for _ in range(count):
        yield "mild", [(1 if dice.random() < 0.7 else between(8, context / 128), between(32, context / 4)) for _ in range(8)]
    for _ in range(count):
        yield "lumpy", [(1, between(32, context / 2)) if dice.random() < 0.6 else (between(max(8, context / 256), context / 8), 0) for _ in range(8)]
    for _ in range(count):
        yield "ridge", [(1, between(context / 32, context * 0.9)) if dice.random() < 0.7 else (between(16, context / 32), between(0, context / 8))
                        for _ in range(6)]


def game(bench, batch, repeats):
    """The median time of every sub-batch, by its bit mask, and the spread of its repeats. Every round is in another order, so that a
    clock that drifts or a card that warms up does not favour any of them."""
    entries = [Entry(slot, new, cached) for slot, (new, cached) in enumerate(batch)]
    sets = range(1, 1 << len(entries))
    times = {mask: [] for mask in sets}
    for _ in range(repeats):
        for mask in bench.dice.sample(sets, len(sets)):
            times[mask].append(bench.seconds([entry for bit, entry in enumerate(entries) if mask >> bit & 1]))
    medians = [statistics.median(times[mask]) for mask in sets]
    spreads = [(max(times[mask]) - min(times[mask])) / statistics.median(times[mask]) for mask in sets]
    return medians, statistics.median(spreads)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="the raw lines, JSON")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a model that a processor can run")
    parser.add_argument("--steps", type=int, default=1_500)
    parser.add_argument("--games", type=int, default=4, help="batches of each of the four kinds to replay")
    parser.add_argument("--repeats", type=int, default=5, help="times that each sub-batch is run")
    parser.add_argument("--running", type=int, default=16, help="requests that run at once, at most")
    parser.add_argument("--arrivals", type=float, default=0.06, help="requests that arrive in a step")
    parser.add_argument("--budget", type=int, default=2_048, help="new tokens that a step takes, at most")
    parser.add_argument("--threads", type=int, default=1, help="threads on a CPU")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    bench = Bench(arguments)
    name = torch.cuda.get_device_name(bench.device) if bench.cuda else "cpu"
    with open(arguments.out, "w") as out:
        def write(**line):
            out.write(json.dumps(line) + "\n")
            out.flush()

        attention = bench.choose_attention()
        write(kind="setup", device=name, torch=torch.__version__, dtype=str(bench.model.dtype).removeprefix("torch."),
              attention=attention, measured=bench.peaks(),
              model=asdict(bench.model.shape) | {"parameters": bench.model.parameters(), "bytes_per_element": bench.model.dtype.itemsize},
              step_tokens=arguments.budget, seed=arguments.seed, repeats=arguments.repeats)
        for _ in range(20):
            bench.seconds([Entry(0, 1, 64), Entry(1, 128, 0)])
        live = []
        for step, seconds, batch in loop(bench, arguments.steps, arguments.running, arguments.arrivals, arguments.budget):
            write(kind="step", step=step, seconds=seconds, batch=batch)
            live.append(batch)
        print(f"{len(live)} steps", file=sys.stderr)
        for number, (mix, batch) in enumerate(batches(bench, live, arguments.games), 1):
            medians, spread = game(bench, batch, arguments.repeats)
            write(kind="game", mix=mix, batch=batch, seconds=medians, spread=spread)
            print(f"game {number}: {mix}, {len(batch)} requests, spread {spread:.1%}", file=sys.stderr)


if __name__ == "__main__":
    main()
