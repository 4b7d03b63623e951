"""Compares our prices with LiteLLM's own cost function on seeded (model, usage) pairs.

Two passes over the same kind of pairs:
  a) our arithmetic on the imported LiteLLM price map against LiteLLM's arithmetic on it;
  b) our base catalogue against LiteLLM, for every model that both know.
Equal means equal to 1e-9 USD. Every other pair must be explained by a rule below. Where both sides have a number, a rule
states how LiteLLM comes to its own and is checked against it, so that it cannot cover for anything else; where we have none,
the reason is why we have none. One unexplained pair fails the run.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from collections import Counter, defaultdict
from datetime import datetime, timezone
from decimal import Decimal

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
os.environ.setdefault("LITELLM_LOG", "CRITICAL")

import litellm  # noqa: E402
from litellm.cost_calculator import cost_per_token  # noqa: E402
from litellm.litellm_core_utils.llm_cost_calc import utils as litellm_costs  # noqa: E402
from litellm.types.utils import (  # noqa: E402
    CacheCreationTokenDetails,
    CachedTokensDetails,
    CompletionTokensDetailsWrapper,
    PromptTokensDetailsWrapper,
    Usage,
)

AT = "2026-11-20T12:00:00Z"
TOLERANCE = Decimal("1e-9")
SEED = 20261120
PAIRS_MIN = 20_000

# Prices by time of day are asked at the same moment on both sides.
litellm_costs.current_billing_time = lambda: datetime(2026, 11, 20, 12, tzinfo=timezone.utc)

INPUT_KINDS = ["input", "cache_read", "cache_write_5m", "cache_write_1h", "input_audio", "cache_read_audio", "input_image"]
OUTPUT_KINDS = ["output", "reasoning", "output_audio", "output_image"]
BASE_PROVIDER = {"fireworks_ai": "fireworks", "azure_ai": "azure", "azure_text": "azure"}


def canonical(provider: str) -> str:
    """The provider as requests name it; the importer does the same."""
    if provider.startswith("vertex_ai-"):
        return "vertex_ai"
    if provider.startswith("fireworks_ai-"):
        return "fireworks_ai"
    return {"bedrock_converse": "bedrock", "text-completion-openai": "openai", "cohere_chat": "cohere"}.get(provider, provider)


class Model:
    """A key of LiteLLM's map that has a price per token and that LiteLLM finds again by its name."""

    def __init__(self, key: str, entry: dict):
        self.key, self.entry = key, entry
        self.provider = canonical(entry["litellm_provider"])
        self.name = key
        for prefix in (entry["litellm_provider"], self.provider):
            if key.startswith(prefix + "/"):
                self.name = key[len(prefix) + 1 :]
                break

    def found_again(self) -> bool:
        try:
            return litellm.get_model_info(model=self.name, custom_llm_provider=self.provider)["key"] == self.key
        except Exception:
            return False

    def prices_class(self, suffix: str) -> bool:
        return any(self.entry.get(f"{key}_per_token_{suffix}") is not None for key in ("input_cost", "output_cost"))

    def kinds(self) -> list[str]:
        """Media are only used where LiteLLM's map prices that medium, as text is what every model takes."""
        media = {
            "input_audio": "input_cost_per_audio_token",
            "cache_read_audio": "cache_read_input_audio_token_cost",
            "input_image": "input_cost_per_image_token",
            "output_audio": "output_cost_per_audio_token",
            "output_image": "output_cost_per_image_token",
        }
        return [kind for kind in INPUT_KINDS + OUTPUT_KINDS if kind not in media or self.entry.get(media[kind]) is not None]


def known_models() -> list[Model]:
    models = []
    for key, entry in sorted(litellm.model_cost.items()):
        if key == "sample_spec" or not entry.get("litellm_provider"):
            continue
        if entry.get("input_cost_per_token") is None and entry.get("output_cost_per_token") is None and not entry.get("tiered_pricing"):
            continue
        models.append(Model(key, entry))
    return models


def random_usage(rng: random.Random, kinds: list[str]) -> dict[str, int]:
    shapes = [
        ["input", "output"],
        ["input", "cache_read", "output"],
        ["input", "cache_write_5m", "output"],
        ["input", "cache_read", "cache_write_5m", "cache_write_1h", "output"],
        ["input", "output", "reasoning"],
        kinds,
    ]
    usage = {kind: int(10 ** rng.uniform(0, 4.5)) for kind in rng.choice(shapes) if kind in kinds}
    if rng.random() < 0.35:
        # The whole input at, just over or far over the usual context tiers.
        edge = rng.choice([32_000, 128_000, 200_000, 256_000, 272_000, 512_000]) + rng.choice([0, 1, 5_000, 100_000])
        others = sum(count for kind, count in usage.items() if kind in INPUT_KINDS and kind != "input")
        usage["input"] = max(edge - others, 1)
    return usage


def litellm_usage(usage: dict[str, int]) -> Usage:
    get = lambda kind: usage.get(kind, 0)  # noqa: E731
    prompt, completion = sum(map(get, INPUT_KINDS)), sum(map(get, OUTPUT_KINDS))
    writes = get("cache_write_5m") + get("cache_write_1h")
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetailsWrapper(
            text_tokens=get("input"),
            cached_tokens=get("cache_read") + get("cache_read_audio"),
            cached_tokens_details=CachedTokensDetails(audio_tokens=get("cache_read_audio")) if get("cache_read_audio") else None,
            audio_tokens=get("input_audio") + get("cache_read_audio"),
            image_tokens=get("input_image"),
            cache_write_tokens=writes,
            cache_creation_token_details=CacheCreationTokenDetails(
                ephemeral_5m_input_tokens=get("cache_write_5m"), ephemeral_1h_input_tokens=get("cache_write_1h")
            )
            if writes
            else None,
        ),
        completion_tokens_details=CompletionTokensDetailsWrapper(
            text_tokens=get("output"),
            reasoning_tokens=get("reasoning"),
            audio_tokens=get("output_audio"),
            image_tokens=get("output_image"),
        ),
    )


def litellm_cost(model: Model, service_class: str, usage: dict[str, int]) -> Decimal | None:
    arguments = {"call_type": "retrieve_batch"} if service_class == "batch" else {}
    if service_class in ("flex", "priority"):
        arguments["service_tier"] = service_class
    try:
        parts = cost_per_token(
            model=model.name, custom_llm_provider=model.provider, usage_object=litellm_usage(usage), **arguments
        )
    except Exception:
        return None
    return Decimal(repr(parts[0])) + Decimal(repr(parts[1]))


class Pair:
    def __init__(self, model: Model, service_class: str, usage: dict[str, int]):
        self.model, self.service_class, self.usage = model, service_class, usage
        self.litellm = litellm_cost(model, service_class, usage)

    def line(self, provider: str) -> str:
        return json.dumps(
            {"provider": provider, "model": self.model.name, "service_class": self.service_class, "usage": self.usage, "at": AT}
        )


def ask(binary: str, lines: list[str], *arguments: str) -> tuple[list[dict], list[dict]]:
    done = subprocess.run([binary, *arguments], input="\n".join(lines) + "\n", capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"price_pairs failed: {done.stderr[-2000:]}")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(lines), "one answer a line"
    return answers, [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]


def equal(ours: Decimal, theirs: Decimal) -> bool:
    return abs(ours - theirs) <= TOLERANCE


def rates_of(answer: dict) -> tuple[str, dict[str, int], str]:
    """Book, rates in picodollars by kind, and what was priced, from the text that every priced row carries."""
    book, sku, *words = (answer["rates"] or "- -").split(" ")
    return book, {kind: int(pico) for kind, pico in (word.split("=") for word in words if "=" in word)}, sku


def cost(usage: dict[str, int], rates: dict[str, Decimal]) -> Decimal:
    return sum((Decimal(count) * Decimal(rates[kind]) for kind, count in usage.items()), Decimal(0)) / Decimal(10**12)


# ---- pass a: how LiteLLM's arithmetic departs from its own map -------------------------------------------------------
# A rule takes the pair and our rates by kind and returns the rates that LiteLLM must have used, or None where it does not apply.


def rate(entry: dict, key: str) -> Decimal | None:
    value = entry.get(key)
    return None if value is None else Decimal(repr(float(value))) * 10**12


def rule_reasoning_as_output(pair: Pair, rates: dict) -> dict | None:
    if pair.model.provider != "xai" or "reasoning" not in rates or "output" not in rates:
        return None
    return {**rates, "reasoning": rates["output"]}


def rule_perplexity_ignores_cache(pair: Pair, rates: dict) -> dict | None:
    if pair.model.provider != "perplexity" or pair.service_class == "batch":
        return None
    entry, plain = pair.model.entry, {}
    for kind in rates:
        key = "input_cost_per_token" if kind in INPUT_KINDS else "output_cost_per_token"
        plain[kind] = rate(entry, key) or Decimal(0)
    if (reasoning := rate(entry, "output_cost_per_reasoning_token")) is not None:
        plain["reasoning"] = reasoning
    return plain


def rule_one_hour_write_ignored(pair: Pair, rates: dict) -> dict | None:
    if pair.model.provider not in ("dashscope", "qwencloud", "qwen_ai_platform") or "cache_write_1h" not in rates:
        return None
    five_minutes = rates.get("cache_write_5m")
    return None if five_minutes is None else {**rates, "cache_write_1h": five_minutes}


def rule_halved_without_a_batch_price(pair: Pair, rates: dict) -> dict | None:
    """No batch price in the map: LiteLLM takes half of the standard price, and nothing at all for some kinds."""
    entry = pair.model.entry
    if pair.service_class != "batch" or entry.get("input_cost_per_token_batches") is not None:
        return None
    text, out = rate(entry, "input_cost_per_token") or 0, rate(entry, "output_cost_per_token") or 0
    write = rate(entry, "cache_creation_input_token_cost") or text
    read = rate(entry, "cache_read_input_token_cost") or 0
    half = {kind: text / 2 for kind in INPUT_KINDS}
    half |= {"cache_read": read / 2, "cache_read_audio": read / 2, "cache_write_5m": write / 2, "cache_write_1h": write / 2}
    batch_out = rate(entry, "output_cost_per_token_batches")
    return half | {kind: out / 2 if batch_out is None else batch_out for kind in OUTPUT_KINDS}


def rule_batch_without_output_price(pair: Pair, rates: dict) -> dict | None:
    entry = pair.model.entry
    if pair.service_class != "batch" or entry.get("output_cost_per_token_batches") is not None:
        return None
    out = rate(entry, "output_cost_per_token") or 0
    return {**rates, **{kind: out / 2 for kind in OUTPUT_KINDS if kind in rates}}


def rule_media_outside_tiers(pair: Pair, rates: dict) -> dict | None:
    """Image input without a price of its own is charged at the standard text price, whatever tier or class applies."""
    if "input_image" not in rates or pair.model.entry.get("input_cost_per_image_token") is not None:
        return None
    return {**rates, "input_image": rate(pair.model.entry, "input_cost_per_token") or 0}


def rule_fireworks_cache_default(pair: Pair, rates: dict) -> dict | None:
    """Without a published cache price LiteLLM takes a fixed share of the input price for Fireworks."""
    if pair.model.provider != "fireworks_ai" or pair.model.entry.get("cache_read_input_token_cost") is not None:
        return None
    from litellm.constants import FIREWORKS_AI_DEFAULT_CACHE_READ_RATE_RATIO as share

    text = rate(pair.model.entry, "input_cost_per_token") or 0
    cached = {kind: text * Decimal(repr(share)) for kind in ("cache_read", "cache_read_audio") if kind in rates}
    return {**rates, **cached}


def rule_vertex_128k(pair: Pair, rates: dict) -> dict | None:
    """Old Vertex models: input and output tiers are chosen apart, and every kind is plain input or output."""
    entry = pair.model.entry
    if pair.model.provider != "vertex_ai" or pair.service_class == "batch":
        return None
    above_in, above_out = rate(entry, "input_cost_per_token_above_128k_tokens"), rate(entry, "output_cost_per_token_above_128k_tokens")
    if above_in is None and above_out is None:
        return None
    prompt = sum(pair.usage.get(kind, 0) for kind in INPUT_KINDS)
    completion = sum(pair.usage.get(kind, 0) for kind in OUTPUT_KINDS)
    text = above_in if prompt > 128_000 and above_in is not None else rate(entry, "input_cost_per_token") or 0
    out = above_out if completion > 128_000 and above_out is not None else rate(entry, "output_cost_per_token") or 0
    return {kind: text if kind in INPUT_KINDS else out for kind in rates}


def rule_class_ignored(pair: Pair, rates: dict) -> dict | None:
    """Some of LiteLLM's calculators are not told the service tier and bill the standard price."""
    if pair.service_class not in ("flex", "priority") or pair.model.provider not in CLASS_IGNORED:
        return None
    entry = pair.model.entry
    text, out = rate(entry, "input_cost_per_token") or 0, rate(entry, "output_cost_per_token") or 0
    read, write = rate(entry, "cache_read_input_token_cost"), rate(entry, "cache_creation_input_token_cost")
    if read is None and pair.model.provider == "fireworks_ai":
        from litellm.constants import FIREWORKS_AI_DEFAULT_CACHE_READ_RATE_RATIO as share

        read = text * Decimal(repr(share))
    standard = {kind: text for kind in INPUT_KINDS} | {kind: out for kind in OUTPUT_KINDS}
    standard["cache_read"] = text if read is None else read
    standard["cache_write_5m"] = text if write is None else write
    standard["cache_write_1h"] = rate(entry, "cache_creation_input_token_cost_above_1hr") or standard["cache_write_5m"]
    return {kind: standard[kind] for kind in rates}


CLASS_IGNORED = ("fireworks_ai", "xai", "databricks", "deepseek", "dashscope", "qwencloud", "qwen_ai_platform")


def rule_batch_elsewhere(pair: Pair, rates: dict) -> dict | None:
    """LiteLLM's batch calculator resolves the name once more, finds no prices under the other name and answers zero."""
    if pair.service_class != "batch" or pair.model.entry.get("input_cost_per_token_batches") is not None:
        return None
    return {kind: Decimal(0) for kind in rates}


def rule_batch_cached_audio(pair: Pair, rates: dict) -> dict | None:
    """LiteLLM bills cached audio in a batch at the text price."""
    if pair.service_class != "batch" or "cache_read_audio" not in rates:
        return None
    text = rate(pair.model.entry, "input_cost_per_token_batches")
    return None if text is None else {**rates, "cache_read_audio": rates.get("cache_read", text)}


def rule_priority_audio(pair: Pair, rates: dict) -> dict | None:
    """LiteLLM's map has a priority price for audio input that its calculator does not see."""
    standard = rate(pair.model.entry, "input_cost_per_audio_token")
    if pair.service_class != "priority" or "input_audio" not in rates or standard is None:
        return None
    return {**rates, "input_audio": standard}


def rule_other_units(pair: Pair, rates: dict) -> dict | None:
    """Models billed by the second or character: LiteLLM has no cost for their tokens."""
    units = ("input_cost_per_second", "output_cost_per_second", "input_cost_per_character")
    if not any(pair.model.entry.get(unit) for unit in units):
        return None
    return {kind: Decimal(0) for kind in rates}


ARITHMETIC_RULES = [
    (rule_reasoning_as_output, "LiteLLM bills xAI's reasoning tokens at the output price even where its map prices them apart"),
    (rule_perplexity_ignores_cache, "LiteLLM's Perplexity calculator knows no cache, tier or class: everything is plain input or output"),
    (rule_one_hour_write_ignored, "LiteLLM's DashScope calculator bills hour-long cache writes at the five-minute price"),
    (rule_halved_without_a_batch_price, "no batch price in the map: LiteLLM halves the standard price and bills cached tokens without a price at nothing; we use the standard price and mark it as an estimate"),
    (rule_batch_without_output_price, "the map has a batch price for input only: LiteLLM halves the standard output price; we use the standard price"),
    (rule_media_outside_tiers, "LiteLLM bills image input without its own price at the standard text price in every tier and class"),
    (rule_fireworks_cache_default, "LiteLLM assumes a fixed share of the input price for Fireworks cache reads that its map does not price"),
    (rule_vertex_128k, "LiteLLM's Vertex calculator for models with a 128k tier chooses the output tier by output tokens and knows no cache"),
    (rule_class_ignored, "LiteLLM's calculator for this provider is not told the service tier and bills the standard price"),
    (rule_batch_elsewhere, "LiteLLM's batch calculator looks the name up a second time, finds no price there and answers zero"),
    (rule_batch_cached_audio, "LiteLLM bills cached audio in a batch at the text price"),
    (rule_priority_audio, "LiteLLM's calculator does not see the priority price for audio input in its map and bills the standard one"),
    (rule_other_units, "billed by seconds or characters: LiteLLM has no cost for the tokens"),
]


def explained_by_arithmetic(pair: Pair, answer: dict) -> str | None:
    rates = {kind: Decimal(pico) for kind, pico in rates_of(answer)[1].items()}
    for rule, reason in ARITHMETIC_RULES:
        theirs = rule(pair, rates)
        if theirs is not None and equal(cost(pair.usage, theirs), pair.litellm):
            return reason
    return None


# ---- pass b: where two price lists differ ------------------------------------------------------------------------------


def explained_by_lists(pair: Pair, base: dict, imported: dict) -> str | tuple | None:
    """Our arithmetic on LiteLLM's list gives LiteLLM's amount, so what is left is a difference between the lists."""
    if imported["list_usd"] is None or not equal(Decimal(imported["list_usd"]), pair.litellm):
        return None
    (_, ours, our_sku), (_, theirs, their_sku) = rates_of(base), rates_of(imported)
    differing = [kind for kind in pair.usage if ours.get(kind) != theirs.get(kind)]
    if not differing:
        return None
    if (":" in our_sku.split("/")[-1]) != (":" in their_sku.split("/")[-1]) and pair.service_class != "standard":
        lacking = "the base catalogue" if base["charge"] == "estimated" else "LiteLLM's map"
        return f"{lacking} has no {pair.service_class} price"
    if (">" in our_sku) != (">" in their_sku):
        return f"only {'the base catalogue' if '>' in our_sku else 'LiteLLM'} has a price for this much context"
    tier = our_sku.split(">")[1] if ">" in our_sku else ""
    own = [kind for kind in differing if not (ours.get(kind) == ours.get(whole(kind)) and theirs.get(kind) == theirs.get(whole(kind)))]
    where = pair.service_class + (f" over {tier}" if tier else "")
    return ("published rate differs", where, tuple((kind, usd(ours.get(kind)), usd(theirs.get(kind))) for kind in own or differing))


def whole(kind: str) -> str | None:
    """A kind that both lists price like plain input or output differs only because that does."""
    return None if kind in ("input", "output") else "input" if kind in INPUT_KINDS else "output"


def usd(pico: int | None) -> str:
    if pico is None:
        return "none"
    return f"{(Decimal(pico) / 10**6).normalize():f}"


# ---- report -----------------------------------------------------------------------------------------------------------


def make_pairs(models: list[Model], at_least: int) -> list[Pair]:
    rng = random.Random(SEED)
    each = max(2, -(-at_least // max(len(models), 1)))
    pairs = []
    for model in models:
        for _ in range(each):
            # Mostly classes that the map prices; now and then another one, to see what each side makes of it.
            weights = [6, *(2 if model.prices_class(suffix) else 0.05 for suffix in ("flex", "priority", "batches"))]
            service_class = rng.choices(["standard", "flex", "priority", "batch"], weights)[0]
            pairs.append(Pair(model, service_class, random_usage(rng, model.kinds())))
    return pairs


def write_table(path: str, summary: list[str], first: Counter, second: dict) -> None:
    with open(path, "w", encoding="utf-8") as out:
        out.write("# Prices compared with LiteLLM\n\n")
        out.write("Written by `tests/prices/compare.sh`; do not edit. Rates are USD per million tokens, ours / LiteLLM's.\n\n")
        out.write("\n".join(summary) + "\n")
        out.write("\n## Our arithmetic on LiteLLM's own price map\n\n| provider | pairs | why LiteLLM's amount is another |\n|---|---:|---|\n")
        for (provider, reason), count in sorted(first.items()):
            out.write(f"| {provider} | {count} | {reason} |\n")
        out.write("\n## The base catalogue and LiteLLM's price map\n\nBoth are kept by hand from the providers' pages at their own pace; where a rate differs, one of them is behind.\n")
        out.write("`farthing price import` takes LiteLLM's, an override settles a single price.\n\n| difference | models | pairs |\n|---|---:|---:|\n")
        by_reason = defaultdict(Counter)
        for model, reasons in second.items():
            for reason, count in reasons.items():
                by_reason[short(reason)][model] += count
        for reason, counts in sorted(by_reason.items(), key=lambda item: -sum(item[1].values())):
            out.write(f"| {reason} | {len(counts)} | {sum(counts.values())} |\n")
        out.write("\n| provider | model | pairs | difference |\n|---|---|---:|---|\n")
        for (provider, model), reasons in sorted(second.items()):
            out.write(f"| {provider} | {model.replace('|', '/')} | {sum(reasons.values())} | {'<br>'.join(in_words(reasons))} |\n")


def in_words(reasons: Counter) -> list[str]:
    """The reasons of one model, its differing rates collected into one line for each class and tier."""
    rates = defaultdict(dict)
    for _, where, values in (reason for reason in reasons if isinstance(reason, tuple)):
        rates[where] |= {kind: f"{kind} {ours} / {theirs}" for kind, ours, theirs in values}
    lists = [f"published rate differs ({where}): " + "; ".join(kinds[kind] for kind in sorted(kinds)) for where, kinds in sorted(rates.items())]
    return sorted(reason for reason in reasons if isinstance(reason, str)) + lists


def short(reason: str | tuple) -> str:
    return reason[0] if isinstance(reason, tuple) else reason


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", required=True, help="the built example price_pairs")
    parser.add_argument("--table", required=True, help="the Markdown file to write")
    arguments = parser.parse_args()
    price_map = os.path.join(os.path.dirname(litellm.__file__), "model_prices_and_context_window_backup.json")

    every = known_models()
    models = [model for model in every if model.found_again()]
    hidden = len(every) - len(models)

    # Pass a.
    pairs = make_pairs(models, PAIRS_MIN)
    answers, rejects = ask(arguments.binary, [pair.line(pair.model.provider) for pair in pairs], "--litellm", price_map)
    rejected = {reject["model"] for reject in rejects}
    counts, first, unexplained = Counter(), Counter(), []
    for pair, answer in zip(pairs, answers):
        if pair.model.key in rejected:
            counts["not imported"] += 1
        elif pair.litellm is None:
            counts["LiteLLM raises an error"] += 1
        elif answer["list_usd"] is None:
            reason = "we do not price a kind without any price; LiteLLM bills it at nothing"
            if answer["reason"] != "unknown_rate":
                unexplained.append((pair, answer, "unpriced"))
            counts["explained"] += 1
            first[(pair.model.provider, reason)] += 1
        elif equal(Decimal(answer["list_usd"]), pair.litellm):
            counts["equal"] += 1
        elif (reason := explained_by_arithmetic(pair, answer)) is not None:
            counts["explained"] += 1
            first[(pair.model.provider, reason)] += 1
        else:
            unexplained.append((pair, answer, None))
    summary_a = f"- our arithmetic on LiteLLM's map: {len(pairs)} pairs over {len(models)} models: " + ", ".join(
        f"{count} {what}" for what, count in sorted(counts.items())
    )

    # Pass b.
    lines = [Pair.line(pair, BASE_PROVIDER.get(pair.model.provider, pair.model.provider)) for pair in pairs]
    known = {
        pair.model.key
        for pair, answer in zip(pairs, ask(arguments.binary, lines)[0])
        if answer["reason"] != "unknown_model"
    }
    both = [model for model in models if model.key in known]
    pairs = make_pairs(both, PAIRS_MIN)
    lines = [pair.line(BASE_PROVIDER.get(pair.model.provider, pair.model.provider)) for pair in pairs]
    base_answers = ask(arguments.binary, lines)[0]
    imported_answers = ask(arguments.binary, [pair.line(pair.model.provider) for pair in pairs], "--litellm", price_map)[0]
    counts_b, second = Counter(), defaultdict(Counter)
    for pair, base, imported in zip(pairs, base_answers, imported_answers):
        key = (pair.model.provider, pair.model.name)
        if pair.litellm is None:
            counts_b["LiteLLM raises an error"] += 1
            continue
        if base["list_usd"] is not None and equal(Decimal(base["list_usd"]), pair.litellm):
            counts_b["equal"] += 1
            continue
        if base["list_usd"] is None:
            reason = f"the base catalogue lists the model without a price for this kind ({base['reason']})"
        elif imported["reason"] == "unknown_rate":
            reason = "LiteLLM's map has no price for a kind of token that was used, and LiteLLM bills it at nothing"
        elif pair.model.key in rejected:
            reason = "LiteLLM's entry cannot be imported exactly: finer than a picodollar, or by time of day"
        else:
            reason = explained_by_lists(pair, base, imported) or (
                explained_by_arithmetic(pair, imported) if imported["list_usd"] is not None else None
            )
        if reason is None:
            unexplained.append((pair, base, imported))
            continue
        counts_b["explained"] += 1
        second[key][reason] += 1
    agreeing = sum(1 for model in both if (model.provider, model.name) not in second)
    summary_b = (
        f"- the base catalogue against LiteLLM: {len(pairs)} pairs over {len(both)} models known to both "
        f"({agreeing} of them without any difference): " + ", ".join(f"{count} {what}" for what, count in sorted(counts_b.items()))
    )
    notes = [
        f"LiteLLM {litellm_version()}, seed {SEED}, prices of {AT}, equal means to within {TOLERANCE} USD.",
        "",
        summary_a,
        summary_b,
        f"- {len(rejects)} entries of the map are not imported (no price per token, finer than a picodollar a token, or by time of day)",
        f"- {hidden} keys of the map are left out: LiteLLM finds another entry when asked for them by provider and name",
        f"- unexplained: {len(unexplained)}",
    ]
    print("\n".join(notes))
    write_table(arguments.table, notes, first, second)
    for pair, answer, more in unexplained[:40]:
        print("UNEXPLAINED", pair.model.key, pair.service_class, pair.usage, "LiteLLM", pair.litellm, "ours", answer, more, file=sys.stderr)
    if unexplained:
        sys.exit(f"{len(unexplained)} differences are not explained by any rule")
    if min(len(pairs), sum(counts.values())) < PAIRS_MIN:
        sys.exit("too few pairs")


def litellm_version() -> str:
    from importlib.metadata import version

    return version("litellm")


if __name__ == "__main__":
    main()
