"use strict";
// Reads the live figures every two seconds. Everything is written as text, never as markup: labels come from clients.

const byId = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en");
let before = null;

function element(name, text, kind) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

// Amounts are decimal strings and never floats: they are counted in whole picodollars.
const PICO = 10n ** 12n;

function pico(text) {
  const [whole, fraction = ""] = text.replace("-", "").split(".");
  const amount = BigInt(whole) * PICO + BigInt((fraction + "0".repeat(12)).slice(0, 12));
  return text.startsWith("-") ? -amount : amount;
}

// Places that show the smallest amount of a column with two significant digits, between 2 and 9.
function placesFor(texts) {
  const sizes = texts.filter((text) => text !== null && text !== undefined).map(pico).map((n) => (n < 0n ? -n : n)).filter((n) => n > 0n);
  if (!sizes.length) return 2;
  const smallest = sizes.reduce((a, b) => (a < b ? a : b));
  return Math.min(9, Math.max(2, 14 - smallest.toString().length));
}

function dollars(text, places) {
  if (text === null || text === undefined) return "unknown";
  const amount = pico(text);
  // An amount that stands alone has four significant digits below a dollar.
  places ??= amount > -PICO && amount < PICO && amount !== 0n ? Math.min(9, placesFor([text]) + 2) : 2;
  const unit = 10n ** BigInt(12 - places);
  const rounded = ((amount < 0n ? -amount : amount) + unit / 2n) / unit;
  const scale = 10n ** BigInt(places);
  return (amount < 0n ? "-$" : "$") + number.format(rounded / scale) + "." + (rounded % scale).toString().padStart(places, "0");
}

function counted(count, noun) {
  return number.format(count) + " " + noun + (count === 1 ? "" : "s");
}

function share(text) {
  return text === null ? "–" : (100 * Number(text)).toFixed(1) + " %";
}

function fill(table, heads, rows, foot) {
  const line = (cells, cell) => {
    const row = element("tr");
    cells.forEach((text, index) => row.append(element(cell, text, heads[index][1])));
    return row;
  };
  const head = element("thead");
  head.append(line(heads.map((column) => column[0]), "th"));
  const body = element("tbody");
  rows.forEach((cells) => body.append(line(cells, "td")));
  if (!rows.length) body.append(line(["nothing yet"], "td"));
  table.replaceChildren(head, body);
  if (foot) {
    const end = element("tfoot");
    end.append(line(foot, "td"));
    table.append(end);
  }
}

function tiles(live) {
  const costs = live.costs;
  let rate = "–";
  if (before) {
    const seconds = (live.monotonic_us - before.monotonic_us) / 1e6;
    if (seconds > 0) rate = ((live.gateway.requests - before.gateway.requests) / seconds).toFixed(1);
  }
  const figures = [
    ["requests/s", rate],
    ["requests", number.format(costs.total.requests)],
    ["charged by providers", dollars(costs.request_cost)],
    ["unattributed", share(costs.unattributed_share)],
    ["pool cost unallocated", dollars(costs.unallocated_pool_cost)],
    ["running now", number.format(live.gateway.in_flight)],
  ];
  byId("tiles").replaceChildren(...figures.map(([name, value]) => {
    const tile = element("div");
    tile.append(element("dt", name), element("dd", value));
    return tile;
  }));
}

function costs(report) {
  const heads = [["team"], ["model"], ["requests", "number"], ["attempts", "number detail"], ["input tokens", "number detail"],
    ["output tokens", "number detail"], ["cost", "number"]];
  const places = placesFor(report.rows.map((row) => row.effective_cost));
  const cells = (sums, cost) =>
    [sums.requests, sums.attempts, sums.input_tokens, sums.output_tokens].map((n) => number.format(n)).concat(cost);
  const rows = report.rows.map((row) => {
    const own = row.line === "request";
    const why = row.self_hosted_attempts === row.attempts ? "by allocation" : "unknown";
    const name = own ? row.key[0] ?? "unattributed" : row.line === "unallocated" ? "pool cost not yet allocated" : row.line;
    return [name, row.key[1] ?? "–", ...cells(row, row.effective_cost === null ? why : dollars(row.effective_cost, places))];
  });
  fill(byId("costs"), heads, rows, ["total", "", ...cells(report.total, dollars(report.total.effective_cost, places))]);
  const notes = [];
  if (report.total.unpriced_attempts) notes.push("Unpriced: " + counted(report.total.unpriced_attempts, "attempt") + ", whose cost is unknown, not zero.");
  if (report.total.self_hosted_attempts) notes.push("On our own pools: " + counted(report.total.self_hosted_attempts, "attempt") + ", whose cost comes by allocation.");
  if (report.total.estimated_attempts) notes.push("Estimated: the amounts of " + counted(report.total.estimated_attempts, "attempt") + ".");
  byId("notes").textContent = notes.join(" ");
}

function show(live) {
  tiles(live);
  costs(live.costs);
  const poolPlaces = placesFor(live.pools.map((pool) => pool.cost));
  const taskPlaces = placesFor(live.tasks.map((task) => task.effective_cost));
  fill(byId("pools"), [["pool"], ["owner"], ["GPUs"], ["USD per GPU-hour", "number detail"], ["cost", "number"],
      ["busy", "number"], ["idle", "number"], ["waste", "number detail"], ["not yet allocated", "number"]],
    live.pools.map((pool) => [pool.pool, pool.owner ?? "–", pool.gpus + " × " + pool.gpu, pool.usd_per_gpu_hour, dollars(pool.cost, poolPlaces),
      dollars(pool.busy, poolPlaces), dollars(pool.idle, poolPlaces), dollars(pool.waste, poolPlaces), dollars(pool.unallocated, poolPlaces)]));
  byId("scaled").hidden = !live.scaling.length;
  fill(byId("scaling"), [["deployment"], ["mode"], ["load", "number"], ["ready", "number"], ["on their way", "number"], ["desired", "number"],
      ["static plan", "number detail"], ["why", "detail"]],
    live.scaling.map((one) => [one.deployment + " on " + one.pool, one.stopped_by ? "stopped by " + one.stopped_by : one.mode, one.load ?? "unknown", one.ready, one.pending,
      one.desired ?? "–", one.static_replicas, one.failure ?? one.reason ?? "–"]));
  fill(byId("tasks"), [["task"], ["team"], ["feature", "detail"], ["requests", "number"], ["input tokens", "number detail"],
      ["output tokens", "number detail"], ["provider cost", "number"]],
    live.tasks.map((task) => [task.task, task.team ?? "–", task.feature ?? "–", number.format(task.requests), number.format(task.input_tokens), number.format(task.output_tokens),
      task.effective_cost === null ? "by allocation" : dollars(task.effective_cost, taskPlaces)]));
  byId("figures").hidden = false;
  before = live;
}

function say(text, bad) {
  byId("state").textContent = text;
  byId("state").className = bad ? "bad" : "";
}

async function refresh() {
  const token = sessionStorage.getItem("farthing-token");
  try {
    const answer = await fetch("/api/v1/live", { headers: token ? { authorization: "Bearer " + token } : {} });
    byId("login").hidden = answer.status !== 401;
    if (answer.status === 401) {
      say("this server wants its admin token", false);
      return;
    }
    if (!answer.ok) throw new Error("the server answered " + answer.status);
    const live = await answer.json();
    show(live);
    if (live.lost_records) say(number.format(live.lost_records) + " records were lost: see farthing verify", true);
    else say("as of " + new Date(live.at).toLocaleTimeString(), false);
  } catch (error) {
    say("no answer: " + error.message, true);
  }
}

byId("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("farthing-token", byId("token").value);
  refresh();
});

async function forever() {
  if (!document.hidden) await refresh();
  setTimeout(forever, 2000);
}
forever();
