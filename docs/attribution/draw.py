#!/usr/bin/env python3
"""Compares attribution methods on the same data and draws docs/attribution/misallocation.svg.

    cargo test -p ledger allocate -- --nocapture > study.txt
    cargo build -p server
    docs/attribution/draw.py --study study.txt --farthing target/debug/farthing --runs ../shared/data/vllm-runs

The studies' numbers come from the tests' output, those of the runs from `farthing allocate --json`, which it calls once
for each run and method. Prints the tables of docs/attribution.md as Markdown. Needs Python 3.9 and nothing else.
"""
import argparse
import json
import pathlib
import re
import subprocess

HERE = pathlib.Path(__file__).resolve().parent
MODELS = HERE.parent.parent / "server/tests/fixtures"
RUNS = {
    "RTX4090_Llama-3.1-8B": ("llama-3.1-8b.json", "RTX 4090", "1", "0.69"),
    "RTXPRO6000_Qwen3-32B": ("qwen3-32b.json", "RTX PRO 6000", "2", "1.79"),
}
# Name on the picture, colour: dark enough for white, light enough for black.
METHODS = {
    "roofline": ("Farthing", "#1f9d6b"),
    "equal": ("equal time", "#4c8bd6"),
    "weighted": ("tokens 1:2 (VTC)", "#b07cd8"),
    "flat": ("flat tokens", "#e0883a"),
    "opencost": ("OpenCost's split", "#d95f6a"),
}
STUDY_NAMES = {"diagonal": "roofline", "tier B": "roofline"}


def study(text):
    """Rows of the tests' output: {data set: {method: share misallocated}}."""
    shapley, engine = {}, {}
    for name, method, mean, worst in re.findall(r"against exact Shapley, (.+?), (\w+): mean ([\d.]+) worst ([\d.]+)", text):
        shapley.setdefault(name, {})[method] = (float(mean), float(worst))
    for name, method, wrong in re.findall(r"against tier A, (.+?), ([\w ]+): ([\d.]+)", text):
        engine.setdefault(name, {})[method] = float(wrong)
    if not shapley or not engine:
        raise SystemExit("the study's text holds no results; run the tests with --nocapture")
    return shapley, engine


def allocate(farthing, folder, method):
    config, gpu, gpus, rate = RUNS[folder.name]
    command = [farthing, "allocate", "--json", "--timeline", folder / "requests.jsonl", "--model-config", MODELS / config,
               "--gpu", gpu, "--gpus", gpus, "--rate", rate, "--meta", folder / "meta.json",
               "--series", folder / "timeseries.csv", "--method", method]
    return json.loads(subprocess.run([str(part) for part in command], check=True, capture_output=True).stdout)


def parts(document):
    paid = {row["engine_request_id"]: float(row["usd"]) for row in document["postings"]}
    return normal(paid)


def normal(amounts):
    whole = sum(amounts.values())
    return {key: amount / whole for key, amount in amounts.items()}


def split(rows, seconds_of_output):
    """Cost to input and output by seconds, then flat within each; returns shares and the input's part."""
    prefill = sum(row["prefill_s"] for row in rows)
    output_s = sum(seconds_of_output(row) for row in rows)
    of_input = prefill / (prefill + output_s)
    inputs, outputs = sum(row["input_tokens"] for row in rows), sum(row["output_tokens"] for row in rows)
    shares = {row["engine_request_id"]: of_input * row["input_tokens"] / inputs
              + (1 - of_input) * row["output_tokens"] / outputs for row in rows}
    return shares, of_input


def moved(shares, other):
    return sum(abs(shares[key] - other[key]) for key in shares) / 2


def run(farthing, folder):
    names = {"roofline": "roofline", "equal": "equal-time", "weighted": "weighted-tokens", "flat": "tokens"}
    documents = {name: allocate(farthing, folder, method) for name, method in names.items()}
    rows = documents["roofline"]["postings"]
    shares = {name: parts(document) for name, document in documents.items()}
    shares["opencost"], of_input = split(rows, lambda row: row["decode_s"] / max(row["output_tokens"] - 1, 1))
    shares["seconds"], in_seconds = split(rows, lambda row: row["decode_s"])
    terms = {term: sum(float(row["terms_usd"][term]) for row in rows) for term in rows[0]["terms_usd"]}
    longest = sorted(rows, key=lambda row: -row["input_tokens"])[: len(rows) // 10]
    of_longest = {name: sum(share[row["engine_request_id"]] for row in longest) for name, share in shares.items()}
    return {
        "document": documents["roofline"],
        "closed": all(document["totals"]["closed"] is True for document in documents.values()),
        "moved": {name: moved(shares["roofline"], share) for name, share in shares.items()},
        "input part": (of_input, in_seconds),
        "longest": of_longest,
        "terms": normal(terms),
    }


def percent(share):
    return f"{100 * share:.1f} %"


def tables(shapley, engine, runs):
    order = ["roofline", "equal", "weighted", "flat", "opencost"]
    print("| batch | " + " | ".join(["smoothed", "diagonal", "equal parts", "tokens 1:2", "flat tokens"]) + " |\n|---|" + "---|" * 5)
    for name, row in shapley.items():
        cells = [f"{percent(row[m][0])}, {percent(row[m][1])}" for m in ["smoothed", "diagonal", "equal", "weighted", "flat"]]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("\n| engine | tier B | tier C | equal time | tokens 1:2 | flat tokens | OpenCost's split |\n|---|" + "---|" * 6)
    for name, row in engine.items():
        print(f"| {name} | " + " | ".join(percent(row[m]) for m in ["tier B", "tier C", "equal", "weighted", "flat", "opencost"]) + " |")
    print("\n| run | " + " | ".join(METHODS[m][0] for m in order[1:]) + " | split by decode seconds | closed |\n|---|" + "---|" * 6)
    for name, found in runs.items():
        cells = [percent(found["moved"][m]) for m in order[1:] + ["seconds"]] + [str(found["closed"]).lower()]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("\n| run | " + " | ".join(METHODS[m][0] for m in order) + " | split by decode seconds |\n|---|" + "---|" * 6)
    for name, found in runs.items():
        print(f"| {name} | " + " | ".join(percent(found["longest"][m]) for m in order + ["seconds"]) + " |")
    for name, found in runs.items():
        document = found["document"]
        print(f"\n{name}: terms {({k: percent(v) for k, v in found['terms'].items()})}; input's part as OpenCost computes it "
              f"{percent(found['input part'][0])}, in seconds {percent(found['input part'][1])}")
        for key in ["constants", "quality", "totals", "gpu_seconds", "usd_per_million_output_tokens", "full_load"]:
            print(f"  {key}: {json.dumps(document[key])}")


def svg(panels):
    """Bars in lanes: one block for each data set, one lane for each method."""
    width, left, right, lane, gap, top = 860, 250, 70, 15, 26, 86
    scale = (width - left - right) / 0.7
    y, body = top, []
    for title, note, values in panels:
        body.append(f'<text class="t" x="{left - 14}" y="{y + 12}" text-anchor="end">{title}</text>')
        body.append(f'<text class="n" x="{left - 14}" y="{y + 28}" text-anchor="end">{note}</text>')
        for method, value in values:
            _, colour = METHODS[method]
            body.append(f'<rect x="{left}" y="{y + 2}" width="{max(value * scale, 1.5):.1f}" height="{lane - 4}" rx="2" fill="{colour}"/>')
            body.append(f'<text class="n" x="{left + max(value * scale, 1.5) + 6:.1f}" y="{y + 12}">{percent(value)}</text>')
            y += lane
        y += gap
    grid = [f'<line class="g" x1="{left + share * scale:.1f}" x2="{left + share * scale:.1f}" y1="{top - 10}" y2="{y - gap + 6}"/>'
            f'<text class="n" x="{left + share * scale:.1f}" y="{y - gap + 22}" text-anchor="middle">{round(100 * share)} %</text>'
            for share in [0, 0.2, 0.4, 0.6]]
    legend, x = [], left
    for name, colour in METHODS.values():
        legend.append(f'<rect x="{x}" y="48" width="12" height="12" rx="2" fill="{colour}"/><text class="n" x="{x + 17}" y="58">{name}</text>')
        x += 36 + 6.4 * len(name)
    height = y - gap + 36
    return f'''<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-labelledby="title">
<title id="title">Share of the bill that reaches another request, by method and data set</title>
<style>
text {{ font: 12px system-ui, sans-serif; fill: #24292f; }}
.h {{ font-size: 16px; font-weight: 600; }} .t {{ font-size: 13px; font-weight: 600; }} .n {{ font-size: 11.5px; }}
.g {{ stroke: #8b949e; stroke-opacity: .35; }}
@media (prefers-color-scheme: dark) {{ text {{ fill: #e6edf3; }} }}
</style>
<text class="h" x="16" y="26">Share of the bill that reaches another request than the reference says</text>
{chr(10).join(legend)}
{chr(10).join(grid)}
{chr(10).join(body)}
</svg>
'''


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=pathlib.Path, required=True)
    parser.add_argument("--farthing", default="target/debug/farthing")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("../shared/data/vllm-runs"))
    options = parser.parse_args()
    shapley, engine = study(options.study.read_text())
    runs = {name: run(options.farthing, options.runs / name) for name in RUNS}
    tables(shapley, engine, runs)

    def lanes(row):
        named = {STUDY_NAMES.get(method, method): value for method, value in row.items()}
        return [(method, named[method]) for method in METHODS if method in named]

    panels = [(f"batch, {name}", "against exact Shapley, mean",
               lanes({method: mean for method, (mean, _) in row.items()})) for name, row in shapley.items()]
    panels += [(f"engine, {name.rsplit(', batch', 1)[0]}", "against its own steps (tier A)", lanes(row)) for name, row in engine.items()]
    panels += [(name.replace("_", ", "), "difference from Farthing", [(m, v) for m, v in lanes(found["moved"]) if m != "roofline"])
               for name, found in runs.items()]
    (HERE / "misallocation.svg").write_text(svg(panels))


if __name__ == "__main__":
    main()
