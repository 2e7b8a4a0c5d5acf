// The status page's script: asks the relay how it stands, shows it, and steers it, all over the API.
// Whatever comes from outside (names, addresses, answers) is put in as text and never as markup.

const EVERY_MS = 3000;
const MOST_DEAD = 10;
const TOKEN = "relay-token";
const SVG = "http://www.w3.org/2000/svg";

const $ = (id) => document.getElementById(id);
const path = (...parts) => parts.map(encodeURIComponent).join("/");
const count = (number, one, many = `${one}s`) => `${number} ${number === 1 ? one : many}`;

let skew = 0; // how far the relay's clock is ahead of the browser's
let standing = ""; // which endpoints stand how; said aloud when it changes
let deadSeen = null; // the numbers that the list of the dead was made for
let deadCursor = null;

// Talking to the relay

class Refused extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

async function call(method, where, content) {
  const headers = {};
  const token = sessionStorage.getItem(TOKEN);
  if (token) headers.Authorization = `Bearer ${token}`;
  if (content !== undefined) headers["Content-Type"] = "application/json";
  const response = await fetch(`v1/${where}`, {
    method, headers, cache: "no-store", body: content === undefined ? undefined : JSON.stringify(content),
  });
  const text = await response.text();
  const answer = response.headers.get("Content-Type")?.includes("json") ? JSON.parse(text, exactly) : {};
  if (response.ok) return answer;
  const mistakes = (answer.errors ?? []).map((each) => `${each.pointer} ${each.detail}`).join("; ");
  throw new Refused(response.status, mistakes || answer.detail || `The relay answered ${response.status}.`);
}

// Keeps integers beyond 2^53 as they were written, where the browser can (JSON.rawJSON).
function exactly(_key, value, context) {
  const large = typeof value === "number" && Number.isInteger(value) && !Number.isSafeInteger(value);
  return large && context?.source && JSON.rawJSON ? JSON.rawJSON(context.source) : value;
}

function say(text) {
  $("said").textContent = text;
}

// Runs what a button does: once at a time, and says what came of it or why not.
function acting(button, action) {
  button.addEventListener("click", async () => {
    if (button.ariaBusy === "true") return;
    button.ariaBusy = "true";
    try {
      await action();
    } catch (error) {
      say(error.message);
    } finally {
      button.ariaBusy = null;
    }
  });
  return button;
}

// Building the document

function el(tag, properties, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (name.startsWith("data-") || name === "colspan") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// Fills an element, but touches it only if what it says has changed: a selection or a focus stays.
const filled = new WeakMap();
function fill(element, ...children) {
  const told = JSON.stringify(children.map((each) => each?.outerHTML ?? each));
  if (filled.get(element) === told) return;
  filled.set(element, told);
  element.replaceChildren(...children.filter((child) => child !== null && child !== undefined));
}

function button(label, of, action) {
  return acting(el("button", { type: "button" }, label, of ? el("span", { className: "unseen" }, ` ${of}`) : null), action);
}

function cell(label, tag = "td") {
  const element = el(tag, { "data-label": label });
  if (tag === "th") element.scope = "row";
  return element;
}

const small = (text) => el("small", {}, text);
// What cannot be seen (control characters, changes of direction) is written out, so that text is what it seems.
const plain = (text) => text.replace(/[^\P{C}\n\t]/gu, (each) => `\\u{${each.codePointAt(0).toString(16)}}`);
const foreign = (text, tag = "span") => el(tag, { className: "foreign" }, plain(text));

function duration(seconds) {
  if (seconds < 10) return `${Math.round(seconds * 10) / 10} s`;
  for (const [size, unit] of [[86400, "d"], [3600, "h"], [60, "min"]]) {
    if (seconds >= size) return `${Math.floor(seconds / size)} ${unit}`;
  }
  return `${Math.round(seconds)} s`;
}

function time(at) {
  const ahead = (Date.parse(at) - Date.now() - skew) / 1000;
  let text = "now";
  if (ahead >= 1) text = `in ${duration(Math.round(ahead))}`;
  if (ahead <= -1) text = `${duration(Math.round(-ahead))} ago`;
  return el("time", { dateTime: at, title: at }, text);
}

// Keeps the rows of a table for what they are about, so that a focused button outlives a refresh.
function keep(body, items, key, make, update, nothing) {
  const rows = new Map([...body.children].filter((row) => row.about).map((row) => [row.about, row]));
  const wanted = items.map((item) => {
    const row = rows.get(key(item)) ?? make(item);
    row.about = key(item);
    update(row, item);
    return row;
  });
  if (!wanted.length) wanted.push(body.querySelector(".nothing") ?? nothing());
  for (const row of [...body.children]) if (!wanted.includes(row)) row.remove();
  wanted.forEach((row, index) => {
    if (body.children[index] !== row) body.insertBefore(row, body.children[index] ?? null);
  });
}

const nothing = (text, columns) => () =>
  el("tr", { className: "nothing" }, el("td", { colspan: columns }, text));

// The endpoints

function endpointRow({ id }) {
  const row = el("tr");
  row.cells_ = ["State", "Success", "p95", "Waiting", "Dead", "Next try", "Last error"].map((label) => cell(label));
  row.name = cell("Endpoint", "th");
  row.pause = button("Pause", id, () => steer(id, row.state === "paused" ? "resume" : "pause"));
  row.retry = button("Resume", id, async () => {
    await steer(id, "resume");
    row.pause.focus();
  });
  row.test = button("Test", id, () => openTester(row.endpoint));
  row.append(row.name, ...row.cells_, el("td", { className: "actions" }, row.pause, row.retry, row.test));
  return row;
}

function updateEndpoint(row, each) {
  row.endpoint = each;
  row.state = each.state;
  fill(row.name, each.id, foreign(each.url, "small"), each.description ? foreign(each.description, "small") : null);
  const rate = Math.floor((each.success_rate ?? 0) * 1000) / 10;
  const shown = [
    [el("span", { className: "state", "data-state": each.state }, each.state), each.since ? el("small", {}, time(each.since)) : null],
    each.success_rate === null ? ["–"] : [`${rate} %`, small(`of ${each.attempts}`)],
    [each.p95_milliseconds === null ? "–" : `${each.p95_milliseconds} ms`],
    [String(each.pending), each.oldest_pending_seconds === null ? null : small(`oldest ${duration(each.oldest_pending_seconds)}`)],
    [String(each.dead)],
    [each.next_attempt_at ? time(each.next_attempt_at) : "–"],
    each.last_error ? [each.last_error, el("small", {}, `${each.explanation}, `, time(each.last_failure_at))] : ["–"],
  ];
  shown.forEach((children, index) => fill(row.cells_[index], ...children));
  row.cells_[1].dataset.low = String(each.success_rate !== null && each.success_rate < 0.95);
  row.cells_[4].dataset.low = String(each.dead > 0);
  row.cells_[6].dataset.over = String((each.last_success_at ?? "") > (each.last_failure_at ?? ""));
  row.pause.firstChild.data = each.state === "paused" ? "Resume" : "Pause";
  row.retry.hidden = !["down", "gone"].includes(each.state);
}

async function steer(id, action) {
  const settings = await call("POST", `webhooks/settings/${path(id, action)}`);
  await refresh();
  say(`${id} is ${settings.state}.`);
}

// A test event

async function openTester({ id, events }) {
  const { data } = await call("GET", "event-types");
  const wanted = data.filter((each) => each.sample !== null && events.some((pattern) => matches(pattern, each.event)));
  $("tester").about = id;
  $("tester-title").textContent = `Test ${id}`;
  $("tester-said").replaceChildren();
  $("tester-event").replaceChildren(...wanted.map((each) => el("option", {}, each.event)));
  $("tester-why").textContent = wanted.length
    ? "Sent now, once, signed like a real one and kept nowhere."
    : `The catalogue has no sample of what ${id} is subscribed to: add one to [events."…"] in the config.`;
  $("tester-choice").hidden = $("tester-send").hidden = !wanted.length;
  $("tester").showModal();
}

function matches(pattern, type) {
  return pattern === "*" || pattern === type || (pattern.endsWith(".*") && type.startsWith(pattern.slice(0, -1)));
}

async function sendTest() {
  const wanted = { event: $("tester-event").value, endpoint: $("tester").about };
  fill($("tester-said"), "Sending …");
  try {
    const { data } = await call("POST", "webhooks/test", wanted);
    fill($("tester-said"), ...data.flatMap((each) => [
      el("p", {}, each.ok ? `Delivered: ${each.endpoint} answered ${each.status} in ${each.milliseconds} ms.` : `Failed after ${each.milliseconds} ms: ${each.error}.`),
      each.answer ? foreign(each.answer, "pre") : null,
    ]));
  } catch (error) {
    fill($("tester-said"), error.message);
  }
}

// Failures and the dead

function eventCell(element, type, id) {
  fill(element, foreign(type), el("small", {}, el("a", { href: `#${id}`, className: "id" }, id)));
}

function failureRow(each) {
  const row = el("tr");
  const [when, endpoint, event, attempt, error, answer] =
    [cell("When"), cell("Endpoint", "th"), cell("Event"), cell("Attempt"), cell("Error"), cell("Answer")];
  row.append(when, endpoint, event, attempt, error, answer);
  row.when = when;
  endpoint.append(each.endpoint);
  eventCell(event, each.event, each.event_id);
  attempt.append(each.dead ? `${each.number}, the last` : String(each.number));
  error.append(each.error, small(each.explanation));
  answer.append(foreign(each.answer ?? ""));
  return row;
}

function deadRow({ story, delivery }) {
  const row = el("tr");
  const last = delivery.attempts.at(-1);
  const [when, endpoint, event, attempts, error, answer] =
    [cell("Accepted"), cell("Endpoint", "th"), cell("Event"), cell("Attempts"), cell("Error"), cell("Answer")];
  const again = button("Replay", `${story.id} to ${delivery.endpoint}`, () => replay(story.id, delivery.endpoint));
  row.append(when, endpoint, event, attempts, error, answer, el("td", { className: "actions" }, again));
  row.when = when;
  endpoint.append(delivery.endpoint);
  eventCell(event, story.event, story.id);
  attempts.append(String(delivery.attempts.length));
  error.append((delivery.expired_at ? "max_age" : last?.error) ?? "");
  answer.append(foreign(last?.answer ?? ""));
  return row;
}

function updateDead(row, item) {
  row.item = item;
  fill(row.when, time(item.story.accepted_at));
}

async function replay(id, endpoint) {
  const { count: number } = await call("POST", `events/${path(id)}/replay`, { endpoint });
  deadSeen = null;
  const focused = document.activeElement.closest("#dead");
  await refresh();
  if (focused && !document.activeElement.closest("#dead")) $("dead-title").focus();
  say(number ? `${id} goes to ${endpoint} again.` : `${id} is on its way to ${endpoint} already.`);
}

async function replayAll() {
  const chosen = $("dead-of").value;
  const endpoints = [...$("dead-of").options].map((each) => each.value).filter((id) => id && (!chosen || id === chosen));
  const which = chosen ? `dead deliveries of ${chosen}` : "dead deliveries of every endpoint";
  if (!endpoints.length || !window.confirm(`Send all ${which} again?`)) return;
  let number = 0;
  for (const id of endpoints) {
    number += (await call("POST", `webhooks/settings/${path(id)}/replay`, { state: "dead" })).count;
  }
  deadSeen = null;
  await refresh();
  say(`${count(number, "delivery goes", "deliveries go")} out again.`);
}

async function showDead(status, { older = false } = {}) {
  const having = status.endpoints.filter((each) => each.dead);
  const seen = JSON.stringify(having.map((each) => [each.id, each.dead]));
  const body = $("dead").tBodies[0];
  if (!older && seen === deadSeen) {
    for (const row of body.rows) if (row.item) updateDead(row, row.item);
    return;
  }
  const chosen = $("dead-of").value;
  const options = [["", "every endpoint"], ...having.map((each) => [each.id, `${each.id} (${each.dead})`])];
  fill($("dead-of"), ...options.map(([value, label]) => el("option", { value }, label)));
  $("dead-of").value = options.some(([value]) => value === chosen) ? chosen : "";
  $("dead-filter").hidden = !having.length;
  const query = new URLSearchParams({ state: "dead", limit: MOST_DEAD });
  if ($("dead-of").value) query.set("endpoint", $("dead-of").value);
  if (older && deadCursor) query.set("cursor", deadCursor);
  const page = having.length ? await call("GET", `events?${query}`) : { data: [], next_cursor: null };
  deadSeen = seen;
  deadCursor = page.next_cursor;
  $("more-dead").hidden = deadCursor === null;
  const found = page.data.flatMap((story) => story.deliveries
    .filter((each) => each.state === "dead" && [each.endpoint, ""].includes($("dead-of").value))
    .map((delivery) => ({ story, delivery })));
  const shown = older ? [...body.rows].filter((row) => row.item).map((row) => row.item) : [];
  keep(body, [...shown, ...found], ({ story, delivery }) => `${story.id} ${delivery.endpoint} ${delivery.attempts.length}`,
    deadRow, updateDead, nothing("Nothing was given up.", 7));
}

// The last hour

function plot(minutes) {
  const total = (name) => minutes.reduce((sum, each) => sum + each[name], 0);
  const [accepted, delivered, failed] = ["accepted", "delivered", "failed"].map(total);
  const most = Math.max(...minutes.map((each) => Math.max(each.accepted, each.delivered)));
  const worst = Math.max(...minutes.map((each) => each.failed));
  fill($("hour"),
    el("span", { className: "accepted" }, `${accepted} accepted`), " ", el("span", { className: "delivered" }, `${delivered} delivered`), " ",
    el("span", { className: "failed" }, count(failed, "failed attempt")), " ",
    el("span", { className: "peak" }, `at most ${Math.max(most, worst)} a minute`));
  const told = JSON.stringify(minutes);
  if (filled.get($("plot")) === told) return;
  filled.set($("plot"), told);
  // One scale for both directions: what was accepted and delivered goes up, what failed down.
  const scale = Math.min(72 / Math.max(most, 1), 24 / Math.max(worst, 1));
  const height = (number) => (number ? Math.max(2, number * scale) : 0);
  const svg = shape("svg", { viewBox: "0 0 600 100", preserveAspectRatio: "none", role: "img", "aria-labelledby": "hour-title hour" });
  svg.append(shape("rect", { class: "base", x: 0, y: 74, width: 600, height: 1 }));
  minutes.forEach((each, index) => {
    const x = index * 10;
    const title = shape("title", {});
    title.textContent = `${each.at.slice(11, 16)} UTC: ${each.accepted} accepted, ${each.delivered} delivered, ${each.failed} failed`;
    const group = shape("g", {});
    group.append(title, shape("rect", { class: "hit", x, y: 0, width: 10, height: 100 }));
    const bars = [["accepted", 0.8, 74 - height(each.accepted), each.accepted, 4], ["delivered", 5, 74 - height(each.delivered), each.delivered, 4], ["failed", 0.8, 75, each.failed, 8.2]];
    for (const [name, offset, y, number, width] of bars) {
      if (number) group.append(shape("rect", { class: name, x: x + offset, y, width, height: height(number) }));
    }
    svg.append(group);
  });
  $("plot").hidden = $("axis").hidden = false;
  $("plot").replaceChildren(svg);
}

function shape(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

// One event's whole story

async function tell(id, { anew = true } = {}) {
  let story;
  try {
    story = await call("GET", `events/${path(id)}`);
  } catch (error) {
    if (!anew) return;
    story = null;
    $("story-said").textContent = error.message;
  }
  $("story").about = id;
  $("story").over = story === null || story.deliveries.every((each) => each.state !== "pending");
  $("story-title").textContent = story ? story.event : "No such event";
  if (anew && story) $("story-said").textContent = "";
  const focused = document.activeElement?.dataset.replays;
  fill($("story-told"), ...(story ? chapters(story) : []));
  if (focused) ($("story-told").querySelector(`[data-replays="${CSS.escape(focused)}"]`) ?? $("story-title")).focus();
  if (!$("story").open) $("story").showModal();
  if (anew) $("story-title").focus();
}

function chapters(story) {
  const facts = [["Id", el("code", {}, story.id)], ["Accepted", exact(story.accepted_at)], ["Timestamp", story.timestamp]];
  const list = el("dl", {}, ...facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
  const data = foreign(JSON.stringify(story.data, null, 2), "pre");
  data.tabIndex = 0;
  data.ariaLabel = "Data";
  data.role = "group";
  const deliveries = story.deliveries.map((each) => chapter(story, each));
  return [list, data, ...(deliveries.length ? deliveries : [el("p", {}, "No endpoint was subscribed to it.")])];
}

function chapter(story, delivery) {
  const state = el("span", { className: "state", "data-state": delivery.state }, delivery.state);
  const following = delivery.next_attempt_at ? el("small", {}, "next try ", exact(delivery.next_attempt_at)) : null;
  const expired = delivery.expired_at ? el("small", {}, "waited too long, since ", exact(delivery.expired_at)) : null;
  const head = el("header", {}, el("h3", {}, delivery.endpoint, " ", state), following, expired);
  if (delivery.state !== "pending") {
    const again = button("Replay", `to ${delivery.endpoint}`, async () => {
      await replay(story.id, delivery.endpoint);
      $("story-said").textContent = $("said").textContent;
      await tell(story.id, { anew: false });
    });
    again.dataset.replays = delivery.endpoint;
    head.append(again);
  }
  const table = el("table", { className: "attempts" }, el("caption", { className: "unseen" }, `Attempts at ${delivery.endpoint}`),
    el("thead", {}, el("tr", {}, ...["Attempt", "At", "Took", "Result", "Answer"].map((each) => el("th", { scope: "col" }, each)))),
    el("tbody", {}, ...delivery.attempts.map((each) => el("tr", {},
      el("th", { scope: "row", "data-label": "Attempt" }, String(each.number)),
      el("td", { "data-label": "At" }, exact(each.at)),
      el("td", { "data-label": "Took" }, `${each.milliseconds} ms`),
      el("td", { "data-label": "Result" }, each.error ?? `delivered, ${each.status}`),
      el("td", { "data-label": "Answer" }, foreign(each.answer ?? ""))))));
  return el("section", {}, head, delivery.attempts.length ? table : el("p", {}, "Not attempted yet."));
}

const exact = (at) => el("time", { dateTime: at }, at.replace("T", " ").replace(/\.\d+Z$/, " UTC"));

// Keeping up

function show(status) {
  skew = Date.parse(status.at) - Date.now();
  $("at").dateTime = status.at;
  $("at").textContent = `${status.at.slice(11, 19)} UTC`;
  $("sentence").textContent = status.sentence;
  const apart = status.endpoints.filter((each) => each.state !== "active");
  const source = status.sources.some((each) => each.error !== null || each.refused > 0);
  const troubled = status.dead > 0 || source || apart.some((each) => each.state !== "paused");
  $("sentence").dataset.stands = !status.ready ? "not" : troubled ? "troubled" : "well";
  document.title = !status.ready ? "relay: not ready" : apart.length ? `relay: ${count(apart.length, "endpoint")} not active` : "relay";
  const now = JSON.stringify([status.ready, apart.map((each) => [each.id, each.state])]);
  if (standing && standing !== now) say(status.sentence);
  standing = now;
  plot(status.minutes);
  keep($("endpoints").tBodies[0], status.endpoints, (each) => each.id, endpointRow, updateEndpoint,
    nothing("No endpoint yet: add one to the config or through the API.", 9));
  keep($("failures").tBodies[0], status.failures, (each) => `${each.event_id} ${each.endpoint} ${each.number}`, failureRow,
    (row, each) => fill(row.when, time(each.at)), nothing("No attempt has failed lately.", 6));
}

let refreshing = null;
let again = false;

// One at a time; whoever asks meanwhile gets one that begins after it asked.
async function refresh() {
  if (refreshing) {
    again = true;
    return refreshing;
  }
  refreshing = (async () => {
    do {
      again = false;
      await look();
    } while (again);
  })();
  try {
    await refreshing;
  } finally {
    refreshing = null;
  }
}

async function look() {
  try {
    const status = await call("GET", "status");
    show(status);
    $("data").hidden = $("finder").hidden = false;
    $("entry").hidden = true;
    $("forget").hidden = !sessionStorage.getItem(TOKEN);
    if (document.body.dataset.lost === "true") say("The relay answers again.");
    document.body.dataset.lost = "false";
    await showDead(status);
    if ($("story").open && !$("story").over) await tell($("story").about, { anew: false });
  } catch (error) {
    if (error.status === 401) askForToken();
    else lose(error);
  }
}

function lose(error) {
  if (document.body.dataset.lost === "true") return;
  document.body.dataset.lost = "true";
  say(error.status ? error.message : `The relay does not answer; this is how it was at ${$("at").textContent}.`);
}

function askForToken() {
  $("token-said").textContent = sessionStorage.getItem(TOKEN) ? "That is not one of the relay's tokens." : "";
  sessionStorage.removeItem(TOKEN);
  $("data").hidden = $("finder").hidden = $("forget").hidden = true;
  for (const dialog of [$("story"), $("tester")]) dialog.close();
  if (!$("entry").hidden) return;
  $("entry").hidden = false;
  $("token").focus();
}

async function keepUp() {
  for (;;) {
    await new Promise((resume) => setTimeout(resume, EVERY_MS));
    if (!document.hidden && $("entry").hidden) await refresh();
  }
}

function begin() {
  for (const table of [$("endpoints"), $("dead")]) {
    table.tHead.rows[0].append(el("th", { scope: "col", className: "actions" }, "Actions"));
  }
  for (const table of [$("endpoints"), $("failures"), $("dead")]) table.tBodies[0].replaceChildren();
  $("dead-title").tabIndex = -1;
  $("finder").addEventListener("submit", (event) => {
    event.preventDefault();
    const id = $("event-id").value.trim();
    if (window.location.hash === `#${id}`) tell(id);
    else window.location.hash = id;
  });
  $("entry").addEventListener("submit", async (event) => {
    event.preventDefault();
    sessionStorage.setItem(TOKEN, $("token").value.trim());
    $("token").value = "";
    await refresh();
    if ($("entry").hidden) open();
  });
  acting($("forget"), async () => {
    sessionStorage.removeItem(TOKEN);
    await refresh();
  });
  acting($("tester-send"), sendTest);
  acting($("replay-all"), replayAll);
  $("dead-filter").addEventListener("submit", (event) => event.preventDefault());
  $("dead-of").addEventListener("change", () => { deadSeen = null; refresh(); });
  acting($("more-dead"), async () => showDead(await call("GET", "status"), { older: true }));
  $("story").addEventListener("close", () => window.history.replaceState(null, "", window.location.pathname));
  window.addEventListener("hashchange", open);
  document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
}

function open() {
  const id = decodeURIComponent(window.location.hash.slice(1));
  if (id && $("entry").hidden) tell(id);
}

begin();
await refresh();
open();
keepUp();
