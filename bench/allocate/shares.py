#!/usr/bin/env python3
"""Each request's seconds of its engine, by DuckDB and by Polars: the same tier-B shares that `farthing` computes by a sweep.

    shares.py duckdb|polars|compare DIR --constants JSON

Reads DIR/requests-*.parquet and writes DIR/ENGINE.parquet (request, seconds); `compare` holds both against DIR/farthing-*.parquet.
Prints one JSON object.

The formulation. Three events a request (scheduled, first token, last token), each with what it changes in the sums over the
active requests. Running sums in the order of time give the sums between any two events, those give the functions of time that all
share (steps a second, blend of the roofline, scale), and a second running sum their integrals. A request pays the difference of
the integrals at its ends times its own coefficients; its coefficients are what its events change, so that is one more sum,
grouped by request, and nothing has to be joined.
"""
import argparse, json, resource, sys, time

THREADS = 2

# What one event changes in the sums over the active requests. r: tokens a second while prefilling, d: while decoding;
# a context is pa + r t, or da + d t; t in seconds.
REQUESTS = """
    SELECT request, engine, scheduled_us AS t0, first_token_us AS t1, last_token_us AS t2,
           greatest(input_tokens - cached_tokens, 1) / ((first_token_us - scheduled_us) * 1e-6) AS r,
           cached_tokens - greatest(input_tokens - cached_tokens, 1) / ((first_token_us - scheduled_us) * 1e-6) * (scheduled_us * 1e-6) AS pa,
           1e6 / (first_token_us - scheduled_us) AS turns,
           CASE WHEN output_tokens >= 2 AND last_token_us > first_token_us THEN 1.0 ELSE 0.0 END AS decodes,
           CASE WHEN output_tokens >= 2 AND last_token_us > first_token_us
                THEN (output_tokens - 1) / ((last_token_us - first_token_us) * 1e-6) ELSE 0.0 END AS d,
           CASE WHEN output_tokens >= 2 AND last_token_us > first_token_us
                THEN input_tokens - (output_tokens - 1) / ((last_token_us - first_token_us) * 1e-6) * (first_token_us * 1e-6) ELSE 0.0 END AS da
    FROM read_parquet('{dir}/requests-*.parquet')"""

SUMS = ["prefilling", "p_a", "p_rate", "p_ra", "p_rr", "p_turns", "decoding", "d_a", "d_rate"]


def duckdb_sql(dir, c, out):
    sums = ", ".join(f"sum({name}) OVER w AS s_{name}" for name in SUMS)
    shared = ["heads", "memory", "memory_t", "decode", "decode_t", "prefill", "prefill_t"]
    integrals = ", ".join(f"coalesce(sum(f_{name}) OVER before, 0) AS i_{name}" for name in shared)
    return f"""
COPY (
WITH requests AS ({REQUESTS.format(dir=dir)}),
events AS (
    SELECT request, engine, t0 AS t, 1.0 AS prefilling, pa AS p_a, r AS p_rate, r * pa AS p_ra, r * r AS p_rr, turns AS p_turns,
           0.0 AS decoding, 0.0 AS d_a, 0.0 AS d_rate FROM requests
    UNION ALL
    SELECT request, engine, t1, -1.0, -pa, -r, -r * pa, -r * r, -turns, decodes, da, d FROM requests
    UNION ALL
    SELECT request, engine, t2, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0, -da, -d FROM requests WHERE decodes > 0
),
summed AS (
    SELECT *, {sums}, (coalesce(lead(t) OVER w, t) - t) * 1e-6 AS dt, (coalesce(lead(t) OVER w, t) + t) * 0.5e-6 AS middle
    FROM events WINDOW w AS (PARTITION BY engine ORDER BY t ROWS UNBOUNDED PRECEDING)
),
batch AS (
    SELECT *, s_prefilling + s_decoding AS heads,
           greatest(s_d_a + s_d_rate * middle, 0) AS decode_context, greatest(s_p_a + s_p_rate * middle, 0) AS prefill_context,
           {c['alpha']} * s_p_rate + {c['beta']} * greatest(s_p_ra + s_p_rr * middle, 0) AS prefill_compute,
           CASE WHEN s_prefilling > 0.5 THEN greatest(s_p_rate / {c['step_tokens']}, s_p_turns / s_prefilling)
                WHEN s_decoding > 0.5 THEN s_d_rate / s_decoding ELSE 0 END AS steps
    FROM summed
),
work AS (
    SELECT *, steps * ({c['alpha']} * s_decoding + {c['beta']} * decode_context) + prefill_compute AS compute,
           steps * {c['gamma']} * (decode_context + prefill_context) AS memory, steps * {c['weights']} AS once
    FROM batch
),
blend AS (
    SELECT *, {c['overlap']} * CASE WHEN compute <= once + memory THEN 1.0 ELSE once / (compute - memory) END AS tau FROM work
),
scaled AS (
    SELECT *, CASE WHEN heads > 0.5 THEN dt / (steps * {c['overhead']} + once + ({1 - c['overlap']} + tau) * memory + (1 - tau) * compute)
                   ELSE 0 END AS scale
    FROM blend
),
functions AS (
    SELECT request, engine, t, prefilling, p_a, p_rate, p_ra, p_rr, decoding, d_a, d_rate,
           CASE WHEN heads > 0.5 THEN steps / heads * scale ELSE 0 END AS f_heads,
           ({1 - c['overlap']} + tau) * steps * scale AS f_memory, ({1 - c['overlap']} + tau) * steps * scale * middle AS f_memory_t,
           (1 - tau) * steps * scale AS f_decode, (1 - tau) * steps * scale * middle AS f_decode_t,
           (1 - tau) * scale AS f_prefill, (1 - tau) * scale * middle AS f_prefill_t
    FROM scaled
),
integrals AS (
    SELECT *, {integrals} FROM functions
    WINDOW before AS (PARTITION BY engine ORDER BY t ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)
)
SELECT request, -sum({c['overhead'] + c['weights']} * (prefilling + decoding) * i_heads
                     + {c['gamma']} * ((p_a + d_a) * i_memory + (p_rate + d_rate) * i_memory_t)
                     + {c['alpha']} * (p_rate * i_prefill + decoding * i_decode)
                     + {c['beta']} * (p_ra * i_prefill + p_rr * i_prefill_t + d_a * i_decode + d_rate * i_decode_t)) AS seconds
FROM integrals GROUP BY request
) TO '{out}' (FORMAT parquet)"""


def by_duckdb(dir, c):
    import duckdb
    connection = duckdb.connect(config={"threads": THREADS, "preserve_insertion_order": False})
    begin = time.monotonic()
    connection.execute(duckdb_sql(dir, c, f"{dir}/duckdb.parquet"))
    return f"DuckDB {duckdb.__version__}, SQL", time.monotonic() - begin


def by_polars(dir, c):
    import os
    os.environ["POLARS_MAX_THREADS"] = str(THREADS)
    import polars as pl
    col, when = pl.col, pl.when
    begin = time.monotonic()
    requests = pl.scan_parquet(f"{dir}/requests-*.parquet").select(
        "request", "engine",
        t0=col("scheduled_us"), t1=col("first_token_us"), t2=col("last_token_us"), cached=col("cached_tokens"), input=col("input_tokens"),
        r=pl.max_horizontal(col("input_tokens") - col("cached_tokens"), 1) / ((col("first_token_us") - col("scheduled_us")) * 1e-6),
        turns=1e6 / (col("first_token_us") - col("scheduled_us")),
        decodes=((col("output_tokens") >= 2) & (col("last_token_us") > col("first_token_us"))).cast(pl.Float64),
        d=when((col("output_tokens") >= 2) & (col("last_token_us") > col("first_token_us")))
        .then((col("output_tokens") - 1) / ((col("last_token_us") - col("first_token_us")) * 1e-6)).otherwise(0.0),
    ).with_columns(
        pa=col("cached") - col("r") * (col("t0") * 1e-6),
        da=when(col("decodes") > 0).then(col("input") - col("d") * (col("t1") * 1e-6)).otherwise(0.0),
    )

    def event(at, prefills, decodes):
        return dict(request=col("request"), engine=col("engine"), t=col(at), prefilling=pl.lit(prefills), p_a=prefills * col("pa"),
                    p_rate=prefills * col("r"), p_ra=prefills * col("r") * col("pa"), p_rr=prefills * col("r") * col("r"),
                    p_turns=prefills * col("turns"), decoding=decodes * col("decodes"), d_a=decodes * col("da"), d_rate=decodes * col("d"))

    def engine_shares(events):
        """The running sums and integrals of one engine's events."""
        events = events.sort("t")
        events = events.with_columns(
            *[col(name).cum_sum().alias(f"s_{name}") for name in SUMS],
            dt=(col("t").shift(-1, fill_value=col("t").last()) - col("t")) * 1e-6,
            middle=(col("t").shift(-1, fill_value=col("t").last()) + col("t")) * 0.5e-6,
        ).with_columns(
            heads=col("s_prefilling") + col("s_decoding"),
            decode_context=(col("s_d_a") + col("s_d_rate") * col("middle")).clip(0),
            prefill_context=(col("s_p_a") + col("s_p_rate") * col("middle")).clip(0),
            prefill_compute=c["alpha"] * col("s_p_rate") + c["beta"] * (col("s_p_ra") + col("s_p_rr") * col("middle")).clip(0),
            steps=when(col("s_prefilling") > 0.5)
            .then(pl.max_horizontal(col("s_p_rate") / c["step_tokens"], col("s_p_turns") / col("s_prefilling")))
            .when(col("s_decoding") > 0.5).then(col("s_d_rate") / col("s_decoding")).otherwise(0.0),
        ).with_columns(
            compute=col("steps") * (c["alpha"] * col("s_decoding") + c["beta"] * col("decode_context")) + col("prefill_compute"),
            memory=col("steps") * c["gamma"] * (col("decode_context") + col("prefill_context")),
            once=col("steps") * c["weights"],
        ).with_columns(
            tau=c["overlap"] * when(col("compute") <= col("once") + col("memory")).then(1.0).otherwise(col("once") / (col("compute") - col("memory")))
        ).with_columns(of_memory=1 - c["overlap"] + col("tau"), of_compute=1 - col("tau")).with_columns(
            scale=when(col("heads") > 0.5).then(
                col("dt") / (col("steps") * c["overhead"] + col("once") + col("of_memory") * col("memory") + col("of_compute") * col("compute"))
            ).otherwise(0.0)
        )
        functions = dict(
            heads=when(col("heads") > 0.5).then(col("steps") / col("heads") * col("scale")).otherwise(0.0),
            memory=col("of_memory") * col("steps") * col("scale"), memory_t=col("of_memory") * col("steps") * col("scale") * col("middle"),
            decode=col("of_compute") * col("steps") * col("scale"), decode_t=col("of_compute") * col("steps") * col("scale") * col("middle"),
            prefill=col("of_compute") * col("scale"), prefill_t=col("of_compute") * col("scale") * col("middle"),
        )
        i = {name: value.cum_sum().shift(1, fill_value=0.0) for name, value in functions.items()}
        seconds = -((c["overhead"] + c["weights"]) * (col("prefilling") + col("decoding")) * i["heads"]
                    + c["gamma"] * ((col("p_a") + col("d_a")) * i["memory"] + (col("p_rate") + col("d_rate")) * i["memory_t"])
                    + c["alpha"] * (col("p_rate") * i["prefill"] + col("decoding") * i["decode"])
                    + c["beta"] * (col("p_ra") * i["prefill"] + col("p_rr") * i["prefill_t"]
                                   + col("d_a") * i["decode"] + col("d_rate") * i["decode_t"]))
        return events.select("request", seconds=seconds).group_by("request").agg(col("seconds").sum())

    # One lazy query for each engine, all of them run together.
    engines = pl.scan_parquet(f"{dir}/requests-*.parquet").select(col("engine").unique()).collect()["engine"].to_list()
    found = []
    for engine in engines:
        own = requests.filter(col("engine") == engine)
        found.append(engine_shares(pl.concat([
            own.select(**event("t0", 1.0, 0.0)), own.select(**event("t1", -1.0, 1.0)),
            own.filter(col("decodes") > 0).select(**event("t2", 0.0, -1.0)),
        ])))
    pl.concat(found).sink_parquet(f"{dir}/polars.parquet")
    return f"Polars {pl.__version__}, lazy expressions", time.monotonic() - begin


def compare(dir):
    """How far each is from farthing: the part of all seconds that another request pays, and the largest relative difference of one
    request. The sums over days of absolute times cost SQL digits that the sweep, which begins afresh each hour, keeps."""
    import duckdb, os
    connection = duckdb.connect(config={"threads": THREADS})
    found = {}
    for engine in ("duckdb", "polars"):
        if not os.path.exists(f"{dir}/{engine}.parquet"):
            continue
        ours, both, moved, largest = connection.execute(f"""
            SELECT (SELECT count(*) FROM read_parquet('{dir}/farthing-*.parquet')), count(*),
                   sum(abs(theirs.seconds - ours.seconds)) / 2 / sum(ours.seconds), max(abs(theirs.seconds - ours.seconds) / ours.seconds)
            FROM read_parquet('{dir}/farthing-*.parquet') ours JOIN read_parquet('{dir}/{engine}.parquet') theirs USING (request)""").fetchone()
        if ours != both or not moved <= 1e-6 or not largest <= 1e-3:
            sys.exit(f"{engine} and farthing differ: {both} of {ours} requests, {moved} of all seconds, one request by {largest}")
        found[engine] = {"moved": moved, "largest": largest}
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["duckdb", "polars", "compare"])
    parser.add_argument("dir")
    parser.add_argument("--constants", type=json.loads, required=True)
    arguments = parser.parse_args()
    if arguments.what == "compare":
        print(json.dumps(compare(arguments.dir)))
        return
    name, seconds = (by_duckdb if arguments.what == "duckdb" else by_polars)(arguments.dir, arguments.constants)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"name": name, "seconds": seconds, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
