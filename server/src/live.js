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

// Amounts are decimal strings and stay strings: a float would round them.
function dollars(text) {
  if (text === null || text === undefined) return "unknown";
  const [whole, fraction = ""] = text.replace("-", "").split(".");
  const first = fraction.search(/[1-9]/);
  const places = whole !== "0" ? 2 : Math.max(2, first < 0 ? 2 : first + 3);
  const sign = text.startsWith("-") ? "-" : "";
  return sign + "$" + number.format(BigInt(whole)) + "." + (fraction + "00").slice(0, Math.max(2, places));
}

function share(text) {
  return text === null ? "–" : (100 * Number(text)).toFixed(1) + " %";
}

function fill(table, heads, rows, foot) {
  const line = (cells, cell) => {
    const row = element("tr");
    cells.forEach((text, index) => row.append(element(cell, text, heads[index][1] ? "number" : "")));
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
  const heads = [["team"], ["model"], ["requests", 1], ["attempts", 1], ["input tokens", 1], ["output tokens", 1], ["cost", 1]];
  const cells = (sums, cost) =>
    [sums.requests, sums.attempts, sums.input_tokens, sums.output_tokens].map((n) => number.format(n)).concat(cost);
  const rows = report.rows.map((row) => {
    const own = row.line === "request";
    const why = row.self_hosted_attempts === row.attempts ? "by allocation" : "unknown";
    const name = own ? row.key[0] ?? "unattributed" : row.line === "unallocated" ? "pool cost not yet allocated" : row.line;
    return [name, row.key[1] ?? "–", ...cells(row, row.effective_cost === null ? why : dollars(row.effective_cost))];
  });
  fill(byId("costs"), heads, rows, ["total", "", ...cells(report.total, dollars(report.total.effective_cost))]);
  const notes = [];
  if (report.total.unpriced_attempts) notes.push(number.format(report.total.unpriced_attempts) + " attempts are unpriced: their cost is unknown, not zero.");
  if (report.total.self_hosted_attempts) notes.push(number.format(report.total.self_hosted_attempts) + " attempts ran on own pools: their cost comes by allocation.");
  if (report.total.estimated_attempts) notes.push(number.format(report.total.estimated_attempts) + " amounts are estimates.");
  byId("notes").textContent = notes.join(" ");
}

function show(live) {
  tiles(live);
  costs(live.costs);
  fill(byId("pools"), [["pool"], ["owner"], ["GPUs"], ["USD per GPU-hour", 1], ["cost", 1], ["not yet allocated", 1]],
    live.pools.map((pool) => [pool.pool, pool.owner ?? "–", pool.gpus + " × " + pool.gpu, pool.usd_per_gpu_hour, dollars(pool.cost), dollars(pool.unallocated)]));
  fill(byId("tasks"), [["task"], ["team"], ["feature"], ["requests", 1], ["input tokens", 1], ["output tokens", 1], ["provider cost", 1]],
    live.tasks.map((task) => [task.task, task.team ?? "–", task.feature ?? "–", number.format(task.requests), number.format(task.input_tokens), number.format(task.output_tokens),
      task.effective_cost === null ? "by allocation" : dollars(task.effective_cost)]));
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
